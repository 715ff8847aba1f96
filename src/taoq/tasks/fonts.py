# SPDX-License-Identifier: Apache-2.0
"""Draw names of classes in any script, with the fonts of the machine."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import ImageFont

from taoq.errors import Notice, abbreviated

log = logging.getLogger(__name__)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_PREFERRED = ("Noto Sans", "Source Han Sans", "WenQuanYi", "Microsoft YaHei", "PingFang", "Hiragino", "DejaVu Sans")
"""How families of fonts begin that draw many scripts well, the preferred ones first."""
_NUMBER = "class {}"


@dataclass(frozen=True)
class DrawnNames:
    """Names as pictures show them.

    Attributes:
        names: The names; those that no font of the machine can draw are numbers.
        file: File of the font that draws them; None for the fonts that Pillow and matplotlib bring.
    """

    names: tuple[str, ...]
    file: Path | None = None

    def font(self, points: int) -> Font:
        """Return the font of Pillow, of a size in pixels."""
        return ImageFont.load_default(points) if self.file is None else ImageFont.truetype(str(self.file), points)


def drawn_names(names: Sequence[str], where: str) -> DrawnNames:
    """Return names of classes as pictures can show them.

    The font that comes with Pillow draws ASCII only. For other names, the font of the machine is used that draws most
    of them. A name that it cannot draw becomes the number of its class, and a warning says so.

    Args:
        names: Names of the classes, by index.
        where: The field that names the classes, for the warning.
    """
    if all(name.isascii() for name in names):
        return DrawnNames(tuple(names))
    file, characters = _best_font(frozenset("".join(names)))
    drawn = tuple(name if _can_draw(name, characters) else _NUMBER.format(index) for index, name in enumerate(names))
    replaced = [name for name, shown in zip(names, drawn, strict=True) if name != shown]
    if replaced:
        what = f"no font of this machine draws {abbreviated(replaced)}: pictures show the number of the class; "
        log.warning(Notice(where, what + "a font such as Noto Sans CJK draws them"))
    return DrawnNames(drawn, file)


def _can_draw(name: str, characters: frozenset[str]) -> bool:
    return all(character in characters or character.isascii() for character in name)


@functools.cache
def _best_font(needed: frozenset[str]) -> tuple[Path | None, frozenset[str]]:
    """Return the font of the machine with most of the characters, and which of them it has."""
    from matplotlib.font_manager import fontManager

    best: tuple[tuple[int, int], Path | None, frozenset[str]] = ((0, 0), None, frozenset())
    for entry in fontManager.ttflist:
        if entry.style != "normal" or str(entry.weight) not in ("400", "normal", "regular"):
            continue
        if entry.name.replace(" ", "").startswith("LastResort"):  # It has a box for every character.
            continue
        characters = needed & _characters(entry.fname)
        rank = next(
            (place for place, family in enumerate(_PREFERRED) if entry.name.startswith(family)), len(_PREFERRED)
        )
        if characters and (len(characters), -rank) > best[0]:
            best = ((len(characters), -rank), Path(entry.fname), characters)
    return best[1], best[2]


def _characters(file: str) -> frozenset[str]:
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(map(chr, FT2Font(file).get_charmap()))
    except (OSError, RuntimeError):
        return frozenset()
