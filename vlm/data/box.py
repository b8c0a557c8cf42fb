"""A rectangle of a frame."""

from __future__ import annotations

from typing import NamedTuple


class Box(NamedTuple):
    """In pixels: rows top … top + height - 1, columns left … left + width - 1."""

    top: int
    left: int
    height: int
    width: int

    @property
    def rows(self) -> slice:
        """As an index of an array."""
        return slice(self.top, self.top + self.height)

    @property
    def columns(self) -> slice:
        """As an index of an array."""
        return slice(self.left, self.left + self.width)

    def within(self, outer: Box) -> Box:
        """The same rectangle, counted from the corner of another."""
        return self._replace(top=self.top - outer.top, left=self.left - outer.left)
