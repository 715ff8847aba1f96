# SPDX-License-Identifier: Apache-2.0
"""Read the lists of a large JSON file entry by entry, so that the whole file is never in memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from taoq.plain import Plain

_CHUNK = 2**20
"""Bytes that are read at a time."""
_space = re.compile(r"[ \t\n\r]*").match
_decode = json.JSONDecoder().raw_decode
_COMPRESSED = {b"\x1f\x8b": "gzip", b"PK": "zip", b"BZ": "bzip2", b"\xfd7": "xz"}
"""First bytes of compressed files."""


class NotJson(Exception):
    """The file is not one JSON value. The message completes the sentence `FILE ...`."""

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint


def read_lists(path: Path, take: Mapping[str, Callable[[Plain], None]]) -> dict[str, bool] | None:
    """Pass the entries of lists in the outermost object of a JSON file to functions, in the order of the file.

    UTF-8 (with or without a byte order mark), UTF-16 and UTF-32 are read. As for `json`, NaN and Infinity are numbers.

    Args:
        path: The file.
        take: A function for each list, by key. All other values are parsed and dropped.

    Returns:
        Whether the value is a list, for each key of the outermost object; None if the outermost value is no object.

    Raises:
        OSError: If the file cannot be read.
        NotJson: If it is not JSON.
    """
    with path.open("rb") as file:
        start = file.read(4)
        for magic, name in _COMPRESSED.items():
            if start.startswith(magic):
                raise NotJson(f"is compressed ({name})", "unpack it")
        file.seek(0)
        text = _Text(file, json.detect_encoding(start))
        if text.peek() != "{":
            text.drop()
            text.end()
            return None
        are_lists = _read_object(text, take)
        text.end()
        return are_lists


def _read_object(text: _Text, take: Mapping[str, Callable[[Plain], None]]) -> dict[str, bool]:
    are_lists: dict[str, bool] = {}
    text.skip("{")
    if text.peek() == "}":
        text.skip("}")
        return are_lists
    while True:
        key = text.value()
        if not isinstance(key, str):
            raise NotJson("is not JSON")
        if key in are_lists and key in take:
            raise NotJson(f"has '{key}' twice", "keep one of them")
        text.skip(":")
        are_lists[key] = text.peek() == "["
        if are_lists[key]:
            text.entries(take.get(key, _drop))
        else:
            text.value()
        if text.skip(",}") == "}":
            return are_lists


def _drop(value: Plain) -> None:
    """Ignore an entry."""


class _Text:
    """The text of a file, of which a part around the current place is in memory."""

    def __init__(self, file: BinaryIO, encoding: str) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._bytes_read = 0
        self._ended = False
        self._text = ""
        self._at = 0

    def value(self) -> Plain:
        """Read the next value."""
        self.peek()
        while True:
            try:
                value, end = _decode(self._text, self._at)
            except RecursionError:
                raise NotJson("is not JSON") from None
            except ValueError:
                if self._more():  # The value may have been cut off.
                    continue
                raise NotJson("is not JSON") from None
            if end > len(self._text) - 3 and self._more():  # A number may go on: 1 is all that is read of `1e-`.
                continue
            self._at = end
            return value

    def entries(self, take: Callable[[Plain], None]) -> None:
        """Read a list, passing its entries to a function."""
        self.skip("[")
        if self.peek() == "]":
            self.skip("]")
            return
        while True:
            take(self.value())
            if self.skip(",]") == "]":
                return

    def drop(self) -> None:
        """Read a value, and forget it: a list entry by entry."""
        if self.peek() == "[":
            self.entries(_drop)
        else:
            self.value()

    def peek(self) -> str:
        """Return the next character that is no white space, and go there; an empty string at the end."""
        while True:
            self._at = _space(self._text, self._at).end()  # type: ignore[union-attr]  # matches any text
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def skip(self, expected: str) -> str:
        """Read one of several characters, and return it."""
        char = self.peek()
        if not char or char not in expected:
            raise NotJson("is not JSON")
        self._at += 1
        return char

    def end(self) -> None:
        """Check that nothing follows."""
        if char := self.peek():
            if char in "{[":
                raise NotJson("has several JSON values, as in JSON Lines", "write one object, with all images")
            raise NotJson("is not JSON")

    def _more(self) -> bool:
        """Read more of the file, and forget the text before the current place. Return whether there was more."""
        if self._ended:
            return False
        rest = self._text[self._at :]
        # The rest doubles each time that a value is not complete, so that a long value is not parsed many times.
        data = self._file.read(max(_CHUNK, len(rest)))
        self._ended = not data
        try:
            self._text, self._at = rest + self._decoder.decode(data, final=self._ended), 0
        except UnicodeDecodeError as error:
            if not error.encoding.startswith("utf-8"):
                raise NotJson("is not JSON") from None
            pending = len(error.object) - len(data)  # Bytes of the chunk before, which end with half a character.
            where = self._bytes_read - pending + error.start
            what = f"is not UTF-8: byte {where} is 0x{error.object[error.start]:02x}"
            raise NotJson(what, "save it in UTF-8") from None
        self._bytes_read += len(data)
        return True
