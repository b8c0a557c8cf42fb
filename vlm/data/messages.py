"""Objects between processes over a socket: what is large travels once, in a nameless piece of memory.

A message is a pickle. Its tensors and arrays from `SMALL` bytes on are not copied into the pickle but written to a
memfd, the descriptor goes over the socket, and the receiver's tensors lie in the same pages. A memfd has no name and
takes nothing of /dev/shm, so nothing of it can be left behind, whoever is killed.
"""

from __future__ import annotations

import io
import os
import pickle
import socket
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlm.types import UserError

SMALL = 64 << 10  # bytes of a tensor that stay in the pickle; each larger one keeps its message's memory alive
_INLINE = 16 << 10  # bytes of a pickle that fits into the socket itself
_MOST = 48 << 10  # bytes of a message in the socket
_END = b"."  # no message is empty: that is how the other end's death is told
_ALIGN = 64
_FLAGS = getattr(socket, "MSG_CMSG_CLOEXEC", 0)


class Closed(Exception):
    """The process at the other end is gone."""


def pair() -> tuple[socket.socket, socket.socket]:
    """Two ends between which `send` and `receive` work."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


class Packed:
    """A pickled object, ready to be sent any number of times.

    Raises whatever pickling raises; OSError where there is no memory or descriptor to be had.
    """

    def __init__(self, value: Any) -> None:
        buffers: list[memoryview] = []
        stream = io.BytesIO()
        _Pickler(stream, protocol=5, buffer_callback=lambda buffer: _keep_small(buffer, buffers)).dump(value)
        pickled = stream.getbuffer()
        self.inline: bytes | None = None
        self.memory: int | None = None  # descriptor of the memfd
        if not buffers and len(pickled) <= _INLINE:
            self.inline = bytes(pickled)
        else:
            self.memory = _to_memory([pickled, *buffers])

    def close(self) -> None:
        if self.memory is not None:
            os.close(self.memory)
            self.memory = None

    def __del__(self) -> None:
        if getattr(self, "memory", None) is not None:
            self.close()


def send(to: socket.socket, note: Sequence[Any], packed: Packed) -> None:
    """Send plain values (`note`) and an object. BlockingIOError: a non-blocking socket is full, nothing was sent.

    Raises Closed.
    """
    head = pickle.dumps((tuple(note), packed.inline))
    descriptors = [] if packed.memory is None else [packed.memory]
    long = len(head) > _MOST
    if long:
        descriptors.insert(0, _to_memory([memoryview(head)]))
    try:
        socket.send_fds(to, [b"" if long else head, _END], descriptors, socket.MSG_NOSIGNAL)
    except ConnectionError as error:
        raise Closed from error
    finally:
        if long:
            os.close(descriptors[0])


class Message:
    """What came: `note`, and the object, which is unpickled when `load` is called."""

    def __init__(self, note: tuple[Any, ...], inline: bytes | None, memory: Tensor | None) -> None:
        self.note, self._inline, self._memory = note, inline, memory

    def load(self, on_main: Callable[[], None] | None = None) -> Any:
        """The object. Once only: its tensors are the message's own memory.

        Args:
            on_main: called before something of `__main__` is looked up.
        """
        pieces = [memoryview(self._inline)] if self._inline is not None else _pieces(self._memory)
        self._inline = self._memory = None
        return _Unpickler(io.BytesIO(pieces[0]), pieces[1:], on_main).load()


def receive(source: socket.socket, *, shared: bool = True) -> Message:
    """The next message. BlockingIOError: a non-blocking socket has none. Raises Closed.

    Args:
        shared: whether writing to large tensors may write to the sender's memory; else pages are copied on writing,
            as is needed where the same `Packed` goes to several.
    """
    for last in (False, True):
        try:
            head, descriptors, flags, _ = socket.recv_fds(source, _MOST + len(_END), 2, _FLAGS)
            break
        except ConnectionResetError as error:  # told once, before what the other end had sent already
            if last:
                raise Closed from error
    if not head:
        raise Closed
    try:
        if flags & socket.MSG_CTRUNC:
            raise UserError(
                "what was loaded could not be received: this process may open no more files; raise `ulimit -n`"
            )
        if head == _END:
            head = bytes(_pieces(_mapped(descriptors[0], shared=False))[0])
            os.close(descriptors.pop(0))
        note, inline = pickle.loads(head)
        return Message(note, inline, _mapped(descriptors[0], shared) if descriptors else None)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


# Memory --------------------------------------------------------------------------------------------------------------


def _keep_small(buffer: pickle.PickleBuffer, large: list[memoryview]) -> bool:
    """True: the buffer stays in the pickle."""
    raw = buffer.raw()
    if raw.nbytes < SMALL:
        return True
    large.append(raw)
    return False


def _to_memory(pieces: Sequence[memoryview]) -> int:
    """A memfd: the number of pieces and their lengths as uint64, then the pieces, each aligned."""
    table = np.array([len(pieces), *(piece.nbytes for piece in pieces)], np.uint64)
    descriptor = os.memfd_create("vlm-message", os.MFD_CLOEXEC)
    try:
        place = 0
        for piece in (table.data, *pieces):
            _write(descriptor, piece, place)
            place = _aligned(place + piece.nbytes)
        os.ftruncate(descriptor, place)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _write(descriptor: int, data: memoryview, place: int) -> None:
    rest = data.cast("B")
    while rest:
        done = os.pwrite(descriptor, rest, place)
        rest, place = rest[done:], place + done


def _aligned(place: int) -> int:
    return -(-place // _ALIGN) * _ALIGN


def _mapped(descriptor: int, shared: bool) -> Tensor:
    """(bytes,) uint8: the memory itself. It holds no descriptor, unlike Python's mmap, and goes with its last view."""
    size = os.fstat(descriptor).st_size
    return torch.from_file(f"/proc/self/fd/{descriptor}", shared=shared, size=size, dtype=torch.uint8)


def _pieces(memory: Tensor | None) -> list[memoryview]:
    assert memory is not None, "a message is loaded once"
    block = memory.numpy().data
    count = int(np.frombuffer(block, np.uint64, 1)[0])
    place, pieces = _aligned(8 * (count + 1)), []
    for length in np.frombuffer(block, np.uint64, count, 8).tolist():
        pieces.append(block[place : place + length])
        place = _aligned(place + length)
    return pieces


# Tensors -------------------------------------------------------------------------------------------------------------


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if type(value) is not Tensor or not _is_plain(value):
            return NotImplemented
        if not value.numel():
            return _empty, (tuple(value.shape), value.dtype)
        # in the order in which it lies in memory: moving colours outwards would cost more than all the rest
        order = sorted(range(value.ndim), key=value.stride().__getitem__, reverse=True)
        stored = value.detach().permute(order).contiguous()
        data = pickle.PickleBuffer(stored.reshape(-1).view(torch.uint8).numpy().data)
        return _tensor, (data, tuple(stored.shape), value.dtype, tuple(np.argsort(order).tolist()))


def _is_plain(value: Tensor) -> bool:
    """A tensor that its bytes and its shape describe."""
    plain = value.device.type == "cpu" and value.layout == torch.strided and not value.requires_grad
    return plain and not (value.is_quantized or value.is_conj() or value.is_neg() or value.__dict__)


def _tensor(data: Any, shape: tuple[int, ...], dtype: torch.dtype, order: tuple[int, ...]) -> Tensor:
    return torch.frombuffer(data, dtype=dtype).reshape(shape).permute(order)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, buffers: Sequence[memoryview], on_main: Callable[[], None] | None) -> None:
        super().__init__(stream, buffers=buffers)
        self._on_main = on_main

    def find_class(self, module: str, name: str) -> Any:
        if module == "__main__" and self._on_main is not None:
            self._on_main()
        return super().find_class(module, name)
