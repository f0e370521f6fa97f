"""A large JSON object, one entry of its lists at a time: half a gigabyte of COCO takes megabytes to go through."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from io import BufferedIOBase
from typing import Any

from lepton_ray.errors import UsageError, shown

CHUNK_BYTES = 2**20
_SPACE = " \t\r\n"


def json_entries(stream: BufferedIOBase, wanted: frozenset[str], most: int, where: str) -> Iterator[tuple[str, Any]]:
    """Name and entry, in the order of the file, for each entry of the lists that go by the wanted names.

    Args:
        stream: the bytes of a JSON object.
        wanted: names whose values must be lists; all other values are skipped.
        most: bytes (characters) of one entry at most.
        where: begins messages.

    Raises UsageError for what is no JSON object, a wanted name without a list or that stands twice, and for entries
    beyond the limit.
    """
    reader = _Reader(stream, most, where)
    reader.expect("{")
    seen: set[str] = set()
    while reader.peek() != "}":
        name = reader.value()
        if not isinstance(name, str) or name in seen:
            raise UsageError(f"{where}: {shown(name)} stands twice or is no name; expected JSON with distinct names")
        seen.add(name)
        reader.expect(":")
        if name in wanted:
            reader.expect("[")
            while reader.peek() != "]":
                yield name, reader.value()
                reader.comma("]")
            reader.expect("]")
        else:
            reader.value()
        reader.comma("}")
    reader.expect("}")
    if missing := wanted - seen:
        raise UsageError(f"{where}: no list {shown(min(missing))}; expected {', '.join(sorted(wanted))}")


class _Reader:
    """The text of a stream, taken from the front value by value."""

    def __init__(self, stream: BufferedIOBase, most: int, where: str) -> None:
        self._stream, self._most, self._where = stream, most, where
        self._decoder = json.JSONDecoder()
        self._text, self._place = "", 0
        self._bytes = codecs.getincrementaldecoder("utf-8-sig")()
        self._ended = False

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            while self._place < len(self._text) and self._text[self._place] in _SPACE:
                self._place += 1
            if self._place < len(self._text) or not self._more():
                return self._text[self._place : self._place + 1]

    def expect(self, character: str) -> None:
        """Take a character. Raises UsageError where another comes."""
        if (found := self.peek()) != character:
            raise UsageError(f"{self._where}: {shown(found or 'its end')} where {shown(character)} was expected")
        self._place += 1

    def comma(self, end: str) -> None:
        """Take what stands between two entries, or nothing before the end."""
        if self.peek() != end:
            self.expect(",")
            if self.peek() == end:
                raise UsageError(f"{self._where}: {shown(end)} after a comma; expected another entry")

    def value(self) -> Any:
        """Take a value."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._place)
            except RecursionError as error:
                raise UsageError(f"{self._where}: a value nested too deep") from error
            except ValueError as error:
                self._refill(str(error), error)
                continue
            # a number at the end of what was read may go on
            if end < len(self._text) or not self._more():
                if end - self._place > self._most:
                    raise UsageError(f"{self._where}: a value has more than {self._most} bytes")
                self._place = end
                return value

    def _refill(self, reason: str, error: Exception) -> None:
        """More text for a value that has not ended yet."""
        left = len(self._text) - self._place
        if left > self._most:
            raise UsageError(f"{self._where}: a value has more than {self._most} bytes, or is no JSON") from error
        grown = max(CHUNK_BYTES, left)  # doubled, so that a long value is not parsed a thousand times
        if not self._more(grown):
            raise UsageError(f"{self._where}: no JSON that can be read, {shown(reason, 120)}") from error

    def _more(self, count: int = CHUNK_BYTES) -> bool:
        """Whether there was more text."""
        if self._ended:
            return False
        data = self._stream.read(count)
        self._ended = not data
        try:
            text = self._bytes.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            raise UsageError(f"{self._where}: is not UTF-8; save it as UTF-8") from error
        self._text, self._place = self._text[self._place :] + text, 0
        return bool(text) or not self._ended
