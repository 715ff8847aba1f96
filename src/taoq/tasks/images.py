# SPDX-License-Identifier: Apache-2.0
"""Image files as lazily loaded batches, for every task."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from taoq.errors import Fault, Notice, TaoqError
from taoq.files import digest
from taoq.tasks.base import Batch, Targets
from taoq.tasks.pixels import read_pixels

log = logging.getLogger(__name__)

_READING = 2
"""Version of what `read_pixels` makes of a file; a new one makes calibration ranges be measured again."""


@dataclass(frozen=True)
class ImageBatches:
    """Batches of transformed images from a list of files, in order. Can be iterated over several times.

    Attributes:
        input: Name of the model's input.
        paths: Image files.
        transform: Convert a PIL image into a tensor; all tensors have the same shape.
        targets: Return the targets of samples, given their indices and the (width, height) of each image in pixels.
        batch_size: Images per batch; the last batch may be smaller.
        workers: Number of processes that read images.
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
        """Digest of everything that the batches depend on. Files are identified by path, size and modification time."""
        stats = [(path, path.stat()) for path in self.paths]
        files = [(str(path.absolute()), stat.st_size, stat.st_mtime_ns) for path, stat in stats]
        return digest([files, _READING, self.transform, self.targets, self.batch_size])

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches.

        Raises:
            TaoqError: If an image cannot be read.
        """
        # Starting reader processes takes longer than reading a single batch.
        workers = min(self.workers, _processors()) if self.num_samples > self.batch_size else 0
        loader: DataLoader[_Sample | Fault] = DataLoader(
            _Images(self), batch_size=self.batch_size, num_workers=workers, collate_fn=self._collate
        )
        said: set[str] = set()
        for batch in loader:
            if isinstance(batch, Fault):
                raise TaoqError(batch)
            for scaled, path in batch.scaled.items():
                if scaled not in said:
                    log.info(Notice(path, f"{scaled}, here and in all images like it"))
            said.update(batch.scaled)
            yield batch.batch

    def _collate(self, samples: list[_Sample | Fault]) -> _Collated | Fault:
        readable: list[_Sample] = []
        for sample in samples:
            if isinstance(sample, Fault):
                return sample
            readable.append(sample)
        images = torch.stack([sample.image for sample in readable])
        targets = self.targets([sample.index for sample in readable], [sample.size for sample in readable])
        paths = [str(self.paths[sample.index]) for sample in readable]
        scaled = {sample.scaled: path for sample, path in zip(readable, paths, strict=True) if sample.scaled}
        return _Collated(Batch({self.input: images}, targets, paths), scaled)


@dataclass(frozen=True)
class _Sample:
    image: Tensor
    index: int
    size: tuple[int, int]
    scaled: str


@dataclass(frozen=True)
class _Collated:
    """A batch, with the path of an image for each way in which values were scaled."""

    batch: Batch
    scaled: Mapping[str, str]


class _Images(Dataset[_Sample | Fault]):
    def __init__(self, batches: ImageBatches) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return self._batches.num_samples

    def __getitem__(self, index: int) -> _Sample | Fault:
        path = self._batches.paths[index]
        try:
            pixels = read_pixels(path)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            # Returned, not raised: DataLoader rebuilds exceptions of worker processes from their text, without faults.
            reason = (
                "its content is not in a known image format"
                if isinstance(error, UnidentifiedImageError)
                else str(error)
            )
            what = f"cannot be read as an image: {reason}"
            return Fault(str(path), what, "replace the file, or take it out of the folder")
        return _Sample(self._batches.transform(pixels.image), index, pixels.image.size, pixels.scaled)


def save_picture(image: Image.Image, path: Path) -> None:
    """Write a picture in the format of its suffix, and create its folder; JPEG and WebP with the quality 95.

    A picture that this format cannot hold, such as one that is too large, becomes a PNG with `.png` after its suffix.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        image.save(path, quality=95)  # Formats without loss ignore it.
    except (ValueError, OverflowError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # An error of the disk, not of the format.
            raise
        path.unlink(missing_ok=True)
        png = path.with_name(f"{path.name}.png")
        log.warning(Notice(path.name, f"its picture is {png.name}, because its format cannot hold it: {error}"))
        image.save(png)


def _processors() -> int:
    """Return the number of processors that this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
