# SPDX-License-Identifier: Apache-2.0
"""Images of files as lazy batches, for every task. Nothing is ever written into their folders."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from taoq.errors import Fault, Notice, TaoqError
from taoq.files import digest
from taoq.tasks.base import Batch, Targets

log = logging.getLogger(__name__)

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Image files, in any case of letters."""


@dataclass(frozen=True)
class ImageBatches:
    """Images of a list of files, transformed, in order; can be gone through again.

    Attributes:
        input: Name of the model's input.
        paths: Image files.
        transform: PIL image to a tensor, of the same shape for all.
        targets: What the metric needs of some samples: from their indices, and the width and height of each image.
        batch_size: Images per batch; the last one may be smaller.
        workers: Processes that read.
    """

    input: str
    paths: Sequence[Path]
    transform: Callable[[Image.Image], Tensor]
    targets: Callable[[Sequence[int], Sequence[tuple[int, int]]], Targets]
    batch_size: int
    workers: int

    @property
    def num_samples(self) -> int:
        """Number of images."""
        return len(self.paths)

    @property
    def key(self) -> str:
        """A digest of all that the batches depend on; files count by their size and time."""
        stats = [(path, path.stat()) for path in self.paths]
        files = [(str(path.absolute()), stat.st_size, stat.st_mtime_ns) for path, stat in stats]
        return digest([files, self.transform, self.targets, self.batch_size])

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches.

        Raises:
            TaoqError: An image cannot be read.
        """
        # reader processes cost more than they bring where there is but one batch
        workers = min(self.workers, _processors()) if self.num_samples > self.batch_size else 0
        loader: DataLoader[_Sample | Fault] = DataLoader(
            _Images(self), batch_size=self.batch_size, num_workers=workers, collate_fn=self._collate
        )
        for batch in loader:
            if isinstance(batch, Fault):
                raise TaoqError(batch)
            yield batch

    def _collate(self, samples: list[_Sample | Fault]) -> Batch | Fault:
        good: list[_Sample] = []
        for sample in samples:
            if isinstance(sample, Fault):
                return sample
            good.append(sample)
        images = torch.stack([sample.image for sample in good])
        targets = self.targets([sample.index for sample in good], [sample.size for sample in good])
        return Batch({self.input: images}, targets, [str(self.paths[sample.index]) for sample in good])


@dataclass(frozen=True)
class _Sample:
    image: Tensor
    index: int
    size: tuple[int, int]


class _Images(Dataset[_Sample | Fault]):
    def __init__(self, batches: ImageBatches) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return self._batches.num_samples

    def __getitem__(self, index: int) -> _Sample | Fault:
        path = self._batches.paths[index]
        try:
            image = read_image(path)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            # a value, not an exception: the reader process could not hand a typed one over
            why = "its content is of no image format" if isinstance(error, UnidentifiedImageError) else str(error)
            what = f"cannot be read as an image: {why}"
            return Fault(str(path), what, "replace the file, or take it out of the folder")
        return _Sample(self._batches.transform(image), index, image.size)


def read_image(path: Path) -> Image.Image:
    """An image as RGB, turned upright by its EXIF orientation."""
    with Image.open(path) as file:
        ImageOps.exif_transpose(file, in_place=True)  # else it makes a copy where there is nothing to turn
        return file.convert("RGB")


def image_folder(images_dir: str, where: str) -> Path:
    """A folder of images.

    Args:
        images_dir: The folder.
        where: The field that names it, for messages.

    Raises:
        TaoqError: There is no such folder.
    """
    folder = Path(images_dir)
    if not folder.is_dir():
        what = f"{folder} is a file, not a folder" if folder.exists() else f"there is no folder {folder}"
        raise TaoqError(Fault(where, what, "name a folder of images"))
    return folder


def image_files(folder: Path, where: str) -> Iterator[Path]:
    """Image files below a folder, sorted, hidden ones left out.

    Raises:
        TaoqError: There is none.
    """
    found = False
    for parent, directories, files in os.walk(folder):
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and name.lower().endswith(SUFFIXES):
                found = True
                yield Path(parent, name)
    if not found:
        raise TaoqError(Fault(where, f"{folder} has no images", "image files end in " + ", ".join(SUFFIXES)))


def draw(paths: Sequence[Path], num_samples: int, seed: int) -> list[Path]:
    """A seeded draw of images for calibration, in random order; all of them where there are fewer."""
    if len(paths) < num_samples:
        what = f"is {num_samples}, there are {len(paths)} images: all are used"
        log.info(Notice("quantize.calibration.num_samples", what))
    shuffled = list(paths)
    random.Random(seed).shuffle(shuffled)
    return shuffled[:num_samples]


def _processors() -> int:
    """Processors that this process may use: fewer than the machine has, in a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
