"""Who judges answers in free words: any server that speaks OpenAI's chat protocol, or what one replied before.

    judge = OpenAICompatible("http://localhost:8000/v1", "some-model")
    reply = judge.ask(system, user)

A key is read from an environment variable that the user names, and goes to the server and nowhere else: not into names,
files or messages. Requests follow no redirect and carry no password of a .netrc.
"""

from __future__ import annotations

import email.utils
import json
import math
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import requests

from vlm.metrics.judged import digest_of
from vlm.run.run_folder import read_rows
from vlm.types import UserError

BACKOFF = 0.5  # seconds before a request is sent again; twice as many before the next time, and so on
LONGEST_BACKOFF = 30.0
LONGEST_WAIT = 600.0  # seconds that a server may ask us to wait; one that asks for more ends the run
_LARGEST_ANSWER = 2**20  # bytes of an answer of a server that are read
_BUSY = (408, 409, 425, 429)
_OF_THE_REQUEST = (400, 413, 422)  # may be due to this very text: too long, or not to a filter's liking


class Reply(str):
    """What a judge replied, with the name of the model that says it wrote it and when."""

    model: str = ""
    date: str = ""


class Unanswered(Exception):
    """No reply to a request, after all retries: its item was not asked, and the same command asks it again."""


class Refused(Exception):
    """The server does not take this request as it is: its item is not judged."""


@dataclass(frozen=True, kw_only=True)
class JudgeName:
    """What makes scores comparable: those of two judges are never put together."""

    model: str
    endpoint: str  # host, port and path
    temperature: float | None = 0.0  # None: the server's own
    json_mode: bool = True
    max_tokens: int | None = None

    def __str__(self) -> str:
        return f"{self.model} at {self.endpoint}, temperature {self.temperature}"


class Judge(Protocol):
    """Anything that can be asked."""

    name: JudgeName
    patience: int | None  # requests in a row without success after which to stop; None: never

    def ask(self, system: str, user: str) -> Reply:
        """The reply to one request. Called from several threads.

        Raises:
            Unanswered, Refused: as there.
            UserError: no request can succeed (no such model, a wrong key); the run stops.
        """

    def close(self) -> None:
        """Ends waiting in all threads."""


class Pace:
    """When the next request may be sent, for all threads together."""

    def __init__(self, per_minute: float | None) -> None:
        self._gap = 60 / per_minute if per_minute else 0.0
        self._lock = threading.Lock()
        self._next = 0.0
        self.stopped = threading.Event()

    def wait(self) -> None:
        """Blocks until it is this request's turn; Unanswered if the run ends meanwhile."""
        while True:
            with self._lock:
                now = time.monotonic()
                if now >= self._next:
                    self._next = now + self._gap
                    break
                seconds = self._next - now
            self.pause(seconds)
        if self.stopped.is_set():
            raise Unanswered("the run was ended")

    def hold(self, seconds: float) -> None:
        """No request of any thread for so long."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)

    def pause(self, seconds: float) -> None:
        if self.stopped.wait(seconds):
            raise Unanswered("the run was ended")


class OpenAICompatible:
    """A server with `POST {endpoint}/chat/completions`.

    Args:
        endpoint: such as https://host/v1; without password, query or fragment.
        model: as the server calls it.
        key_variable: environment variable that holds the key; None: no key is sent.
        temperature: of sampling; None: left out of the request.
        json_mode: demand a JSON object by `response_format` too (the prompts demand it anyway).
        max_tokens: longest reply; None: left out of the request.
        timeout: seconds that one request may take.
        retries: how often a request that found no answer is sent again.
        per_minute: most requests a minute; None: as fast as the server lets us.

    `is_open`: a key goes over the network unencrypted.

    Raises:
        UserError: the endpoint is none, or the variable is not set.
    """

    patience: int | None = 5

    def __init__(
        self,
        endpoint: str,
        model: str,
        *,
        key_variable: str | None = None,
        temperature: float | None = 0.0,
        json_mode: bool = True,
        max_tokens: int | None = None,
        timeout: float = 60.0,
        retries: int = 6,
        per_minute: float | None = None,
    ) -> None:
        self._url, shown = _checked_endpoint(endpoint)
        self._key = _key(key_variable)
        self.is_open = bool(self._key) and self._url.startswith("http:") and not _is_loopback(shown)
        self._timeout, self._retries = timeout, retries
        self._pace = Pace(per_minute)
        self._own = threading.local()
        self.name = JudgeName(
            model=model, endpoint=shown, temperature=temperature, json_mode=json_mode, max_tokens=max_tokens
        )

    def close(self) -> None:
        self._pace.stopped.set()

    def ask(self, system: str, user: str) -> Reply:
        failures, waited = 0, 0.0
        while True:
            self._pace.wait()
            told = 0.0
            try:
                status, headers, body = self._post(self._payload(system, user))
                if status == 200:
                    return self._reply(body)
                problem = f"status {status}{self._excerpt(body)}"
                self._check(status, problem, body)
                told = _retry_after(headers.get("Retry-After", ""))
            except requests.RequestException as error:
                problem = f"no answer ({type(error).__name__})"
            except _BadAnswer as error:
                problem = f"an answer that is none ({error})"
            if told:  # a wait that the server asks for is no failure
                waited += told
                if waited > LONGEST_WAIT:
                    raise UserError(
                        f"{self.name.endpoint}: {problem}: it wants us to wait {waited:.0f} s; come back then"
                    )
                self._pace.hold(told)
                continue
            failures += 1
            if failures > self._retries:
                raise Unanswered(f"{problem}, {failures} times")
            self._pace.pause(min(LONGEST_BACKOFF, BACKOFF * 2 ** (failures - 1)))

    def _payload(self, system: str, user: str) -> dict[str, Any]:
        name = self.name
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        payload: dict[str, Any] = {"model": name.model, "messages": messages}
        if name.temperature is not None:
            payload["temperature"] = name.temperature
        if name.max_tokens is not None:
            payload["max_tokens"] = name.max_tokens
        if name.json_mode:
            payload["response_format"] = {"type": "json_object"}
        return payload

    def _post(self, payload: dict[str, Any]) -> tuple[int, Any, bytes]:
        if not hasattr(self._own, "session"):
            self._own.session = requests.Session()
        until = time.monotonic() + self._timeout
        with self._own.session.post(
            self._url,
            json=payload,
            auth=self._authorise,
            timeout=self._timeout,
            allow_redirects=False,
            stream=True,
        ) as response:
            body = b""
            for piece in response.iter_content(65536):
                body += piece
                if len(body) > _LARGEST_ANSWER:
                    raise _BadAnswer(f"more than {_LARGEST_ANSWER} bytes")
                if time.monotonic() > until:
                    raise _BadAnswer(f"not whole after {self._timeout:g} s")
            return response.status_code, response.headers, body

    def _authorise(self, request: Any) -> Any:
        """Also keeps `requests` from sending what a .netrc has for the host."""
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _reply(self, body: bytes) -> Reply:
        try:
            answer = json.loads(body)
            text = answer["choices"][0]["message"]["content"]
            model = answer.get("model")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            raise _BadAnswer(f"no choices[0].message.content{self._excerpt(body)}") from error
        reply = Reply(self._without_key(text if isinstance(text, str) else ""))
        reply.model = self._without_key(model) if isinstance(model, str) else self.name.model
        reply.date = now()
        return reply

    def _check(self, status: int, problem: str, body: bytes) -> None:
        """Raises what a status means that no retry mends."""
        where = f"{self.name.endpoint}: {problem}"
        if status in (401, 403):
            raise UserError(f"{where}: name the environment variable that holds your key with --key-env")
        if status == 402 or (status == 429 and b"insufficient_quota" in body):
            raise UserError(f"{where}: the account has no quota left; the same command continues when it has")
        if status in _OF_THE_REQUEST:
            raise Refused(problem)
        if status not in _BUSY and status < 500:
            raise UserError(f"{where}: is --endpoint the address before /chat/completions, and --model right?")

    def _excerpt(self, body: bytes) -> str:
        text = self._without_key(body.decode("utf-8", "replace"))  # whole, so that no half of a key is left
        text = " ".join(text[:2000].split())[:300]
        return f": {text}" if text else ""

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


class _BadAnswer(Exception):
    """Not of the protocol, too large or too slow."""


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _checked_endpoint(endpoint: str) -> tuple[str, str]:
    """(where requests go, how it is named)."""
    try:
        parts = urlsplit(endpoint.strip())
        port = parts.port
    except ValueError as error:
        raise UserError(f"--endpoint: {error}") from None
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise UserError(
            "--endpoint holds a password, a query or a fragment, which would end up in files and messages: give "
            "scheme, host and path alone, and a key with --key-env"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"--endpoint {endpoint[:100]!r}: expected something like http://localhost:8000/v1")
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    shown = f"{host}{'' if port is None else f':{port}'}{path}"
    return f"{parts.scheme}://{shown}/chat/completions", shown


def _is_loopback(shown: str) -> bool:
    return re.match(r"(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:|/|$)", shown) is not None


def _key(variable: str | None) -> str:
    if variable is None:
        return ""
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable):  # it may be a key, given here by mistake: not repeated
        raise UserError("--key-env wants the name of an environment variable in capitals, such as OPENAI_API_KEY")
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(f"--key-env {variable}: this environment variable is not set or empty")
    if not key.isascii() or not key.isprintable():
        raise UserError(f"--key-env {variable}: the variable holds what no key can: blanks or letters beyond ASCII")
    return key


def _retry_after(text: str, clock: Callable[[], float] = time.time) -> float:
    """Seconds that a Retry-After header tells us to wait: a number of them, or a date; 0 where it says nothing."""
    try:
        return max(0.0, min(float(text), 1e9))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - clock())
    except (ValueError, TypeError, OverflowError):
        return 0.0


class Recorded:
    """A judge that replies what stands in a judged.jsonl, under the name of the judge that replied it.

    Args:
        file: a judged.jsonl, or rows {judge, asked, reply}.
        model: which model's replies, where the file has several.

    Raises:
        UserError: the file cannot be read, holds no reply, or those of several judges.
    """

    patience: int | None = None

    def __init__(self, file: Path, model: str | None = None) -> None:
        self._file = file
        self._replies: dict[str, Reply] = {}
        names = set()
        for row in read_rows(file):
            name, asked, text = row.get("judge"), row.get("asked"), row.get("reply")
            if not isinstance(name, dict) or not isinstance(asked, str) or not isinstance(text, str):
                raise UserError(f"{file}: a row without judge, asked or reply: it is no judged.jsonl")
            if model is not None and name.get("model") != model:
                continue
            names.add(json.dumps(name, sort_keys=True))
            reply = Reply(text)
            reply.model, reply.date = str(row.get("answered_by", "")), str(row.get("date", ""))
            self._replies[asked] = reply
        if not names:
            raise UserError(f"{file}: holds no reply{f' of {model}' if model else ''}")
        if len(names) > 1:
            judges = "; ".join(str(name_of(json.loads(name))) for name in sorted(names))
            raise UserError(
                f"{file}: holds replies of several judges, which do not go together: {judges}; give --model"
            )
        self.name = name_of(json.loads(names.pop()))

    def ask(self, system: str, user: str) -> Reply:
        asked = digest_of(system, user)
        if asked not in self._replies:
            raise Unanswered(f"{self._file} has no reply to this request")
        return self._replies[asked]

    def close(self) -> None:
        pass


def name_of(value: dict[str, Any]) -> JudgeName:
    """The name that `asdict` wrote. Raises UserError for anything else."""
    try:
        name = JudgeName(**value)
    except TypeError as error:
        raise UserError(f"{repr(value)[:100]} is not the name of a judge") from error
    texts = isinstance(name.model, str) and isinstance(name.endpoint, str)
    number = name.temperature is None or (type(name.temperature) in (int, float) and math.isfinite(name.temperature))
    if not texts or not number or asdict(name) != value:
        raise UserError(f"{repr(value)[:100]} is not the name of a judge")
    return name
