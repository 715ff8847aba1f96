# SPDX-License-Identifier: Apache-2.0
"""Read the value of an override by the grammar of Hydra, which the command lines of TAO follow.

The grammar is that of https://hydra.cc/docs/1.3/advanced/override_grammar/basic, without sweeps and functions.
Interpolations stay text. It differs from YAML in what TAO's users write: `[*fc*,BatchNorm2d]` is a list of two patterns
(an alias in YAML), and `{image_dir:/data}` has a value (none in YAML).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_PART = r"\$\{[^}]*\}|\\[\\()\[\]{}:=, \t]|[\w/\-\\+.$%*@?| \t]"
"""A part of an unquoted text: an interpolation, an escaped character, or a character without a meaning of its own."""
_KEY = re.compile(f"(?:{_PART})+", re.ASCII)
_TEXT = re.compile(f"(?:{_PART}|:)+", re.ASCII)
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""")
_ESCAPED = re.compile(r"(\$\{[^}]*\})|\\([\\()\[\]{}:=, \t])")
_INT = re.compile(r"[+-]?(0|[1-9](_?\d)*)", re.ASCII)
_FLOAT = re.compile(r"[+-]?(\d[\d_]*\.(\d[\d_]*)?|\.\d[\d_]*|\d[\d_]*(?=[eE]))([eE][+-]?\d+)?", re.ASCII)
_WORDS = {"null": None, "true": True, "false": False}


class NotHydraError(ValueError):
    """A text that is not in the grammar."""


def parse_value(text: str) -> object:
    """Convert the value of an override into plain data; an empty text is an empty string.

    Raises:
        NotHydraError: If the text is not in the grammar.
    """
    if not text.strip():
        return ""
    value, end = _element(text, _blank(text, 0))
    if _blank(text, end) < len(text):
        raise NotHydraError(text)
    return value


def _element(text: str, start: int) -> tuple[object, int]:
    """Read the element at an index. Returns it with the index after it."""
    first = text[start : start + 1]
    if first == "[":
        return _items(text, start, "]", _element)
    if first == "{":
        pairs, end = _items(text, start, "}", _pair)
        return dict(pairs), end
    if quoted := _QUOTED.match(text, start):
        return _unquote(quoted[0]), quoted.end()
    if (word := _TEXT.match(text, start)) and word[0].strip():
        return _primitive(word[0].strip()), word.end()
    raise NotHydraError(text)


def _items(text: str, start: int, close: str, read: Callable[[str, int], tuple[T, int]]) -> tuple[list[T], int]:
    """Read the items of a list or dictionary whose bracket is at an index, up to the bracket that closes it."""
    items: list[T] = []
    position = _blank(text, start + 1)
    while text[position : position + 1] != close or items:  # An empty list has no item; a comma is followed by one.
        item, position = read(text, position)
        items.append(item)
        position = _blank(text, position)
        if text[position : position + 1] == close:
            break
        if text[position : position + 1] != ",":
            raise NotHydraError(text)
        position = _blank(text, position + 1)
    return items, position + 1


def _pair(text: str, start: int) -> tuple[tuple[object, object], int]:
    """Read an entry `key: value` of a dictionary."""
    key = _KEY.match(text, start)
    if not key or text[key.end() : key.end() + 1] != ":":
        raise NotHydraError(text)
    value, end = _element(text, _blank(text, key.end() + 1))
    return (_primitive(key[0].strip()), value), end


def _primitive(word: str) -> object:
    if word.lower() in _WORDS:
        return _WORDS[word.lower()]
    if _INT.fullmatch(word):
        return int(word)
    return float(word) if _FLOAT.fullmatch(word) else _unescape(word)


def _unescape(text: str) -> str:
    """Remove the backslashes of escaped characters, outside of interpolations."""
    return _ESCAPED.sub(lambda match: match[1] or match[2], text)


def _unquote(text: str) -> str:
    """Remove quotes. Inside them a backslash escapes the quote only, and a backslash before it."""
    quote, inner = text[0], text[1:-1]
    return re.sub(rf"(\\*)({quote}|$)", lambda match: match[1][: len(match[1]) // 2] + match[2], inner)


def _blank(text: str, start: int) -> int:
    """Return the index of the next character that is neither a space nor a tab."""
    while text[start : start + 1] in (" ", "\t"):
        start += 1
    return start
