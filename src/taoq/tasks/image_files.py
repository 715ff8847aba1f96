# SPDX-License-Identifier: Apache-2.0
"""Find image files in folders, for every task. Nothing is ever written into them."""

from __future__ import annotations

import functools
import logging
import os
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from taoq.errors import Fault, Notice, TaoqError
from taoq.tasks.pixels import image_formats

log = logging.getLogger(__name__)

_HEIF = (".heic", ".heif", ".hif")
_HARMLESS = ("thumbs.db", "desktop.ini")
"""Files that systems leave in folders, in lower case. Hidden files, such as .DS_Store, are never counted."""
_ABOUT_IMAGES = (".csv", ".json", ".md", ".tsv", ".txt", ".xml", ".yaml", ".yml")
"""Suffixes of files that describe the images beside them: not counted in the outermost folder."""


@functools.cache
def image_suffixes() -> tuple[str, ...]:
    """Return the suffixes of the image files that can be read, in lower case, sorted.

    Those of Pillow, and .heic and .heif if the package pillow-heif is installed.
    """
    formats = (*image_formats(), "MPO")
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in formats}
    return tuple(sorted(suffixes))


def image_folder(images_dir: str, where: str) -> Path:
    """Return the path of an existing folder of images.

    Args:
        images_dir: The folder, as written in the spec.
        where: The field that it is written in, for messages.

    Raises:
        TaoqError: If there is no such folder.
    """
    folder = Path(images_dir)
    if not images_dir:
        raise TaoqError(Fault(where, "one of the folders is empty text", "name a folder of images"))
    if not folder.is_dir():
        what = f"{folder} is a file, not a folder" if folder.exists() else f"there is no folder {folder}"
        raise TaoqError(Fault(where, what, "name a folder of images"))
    return folder


def image_files(folder: Path, where: str) -> list[Path]:
    """Return the image files below a folder, sorted, without hidden files and folders. Links are followed.

    Warns of files that are not read, by suffix, and of links that lead nowhere or back.

    Args:
        folder: The folder.
        where: The field that it is written in, for messages.

    Raises:
        TaoqError: If there are no images, or if a folder cannot be listed.
    """
    suffixes = image_suffixes()
    images: list[Path] = []
    unread: Counter[str] = Counter()

    def refuse(error: OSError) -> None:
        raise TaoqError(Fault(where, f"{error.filename} cannot be listed: {error.strerror}", "allow to read it"))

    for parent, directories, files in os.walk(folder, followlinks=True, onerror=refuse):
        visible = sorted(name for name in directories if not name.startswith("."))
        directories[:] = [name for name in visible if not _leads_back(Path(parent, name), folder, where)]
        for name in sorted(files):
            path, suffix = Path(parent, name), Path(name).suffix.lower()
            if name.startswith(".") or name.lower() in _HARMLESS:
                continue
            if path.is_symlink() and not path.exists():
                log.warning(Notice(where, f"{path} is left out: it is a link that leads nowhere"))
            elif suffix not in suffixes:
                if parent != str(folder) or suffix not in _ABOUT_IMAGES:
                    unread[suffix or "without a suffix"] += 1
            else:
                images.append(path)
    _warn_of_unread(unread, where)
    if not images:
        hint = "image files end in .jpg, .png, .webp, .tif or another suffix that Pillow reads"
        raise TaoqError(Fault(where, f"{folder} has no images", hint))
    return images


def _leads_back(path: Path, folder: Path, where: str) -> bool:
    """Return whether a link leads from a folder to itself, or to a folder that it is in, and say so."""
    above = [path.parent]
    while above[-1] != folder:
        above.append(above[-1].parent)
    if not any(part.is_symlink() for part in (path, *above[:-1])):
        return False
    real = path.resolve()
    if all(part.resolve() != real for part in above):
        return False
    log.warning(Notice(where, f"{path} is left out: a link leads back to the folder {real.name} that it is in"))
    return True


def _warn_of_unread(unread: Counter[str], where: str) -> None:
    if not unread:
        return
    counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(unread.items()))
    what = f"{unread.total()} file(s) are not read: {counts}"
    if any(suffix in _HEIF for suffix in unread):
        what += "; the package pillow-heif reads .heic and .heif"
    log.warning(Notice(where, what))


def draw(paths: Sequence[Path], num_samples: int, seed: int) -> list[Path]:
    """Draw a random sample of the images for calibration, in random order.

    Args:
        paths: The images.
        num_samples: Number of images to draw; with fewer images, all of them are used and a message is logged.
        seed: Seed of the draw.
    """
    if len(paths) < num_samples:
        what = f"is {num_samples}, there are {len(paths)} images: all are used"
        log.info(Notice("quantize.calibration.num_samples", what))
    shuffled = list(paths)
    random.Random(seed).shuffle(shuffled)
    return shuffled[:num_samples]
