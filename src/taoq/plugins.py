# SPDX-License-Identifier: Apache-2.0
"""Tables of tasks, backends and runtimes: those of taoq, and those that installed packages add.

A package adds a row with an entry point in the group `taoq.tasks`, `taoq.backends` or `taoq.runtimes`:

    [project.entry-points."taoq.tasks"]
    segmentation = "my_package.task:TASK"

Listing a table imports nothing. A row is imported when it is used: a package that cannot be imported is an error only
for the runs that use it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from taoq.errors import Fault, MissingDependency, Notice, SpecError, TaoqError, did_you_mean, first_line

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        name: Its name in specs and on the command line.
        target: Where its value is, as `module:attribute`.
        summary: One line for the help.
        distribution: The distribution that adds it; empty for taoq's own.
        version: Version of that distribution.
    """

    name: str
    target: str
    summary: str
    distribution: str = ""
    version: str = ""

    @property
    def origin(self) -> str:
        """` (my-package 1.0)` for the help; empty for taoq's own."""
        return f" ({self.distribution} {self.version})" if self.distribution else ""


@dataclass(frozen=True)
class Table:
    """Rows by name: taoq's own first, then those of entry points.

    Attributes:
        kind: The noun for a row in messages: "task", "backend", "runtime".
        group: The entry point group that adds rows.
        own: taoq's own rows.
    """

    kind: str
    group: str
    own: tuple[Row, ...]

    def rows(self) -> Mapping[str, Row]:
        """Return all rows, without importing their modules."""
        return _rows(self)

    def names(self) -> tuple[str, ...]:
        """Return the names of all rows."""
        return tuple(self.rows())

    def load(self, name: str, where: str) -> object:
        """Import the value of a row.

        Args:
            name: Name of the row.
            where: The field or command-line word with that name, for messages.

        Raises:
            SpecError: If there is no such row.
            MissingDependency: If a library that it needs is not installed.
            TaoqError: If the package that adds it cannot be imported.
        """
        if name not in self.rows():
            hint = did_you_mean(name, self.names(), f"choose one of {', '.join(self.names())}")
            raise SpecError(Fault(where, f"there is no {self.kind} {name}", hint))
        row = self.rows()[name]
        module, _, attribute = row.target.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if row.distribution:
                raise TaoqError(self._broken(row, where, error)) from error
            if package == "taoq":
                raise
            what = f"{self.kind} {name} needs the package '{error.name}'"
            raise MissingDependency(Fault(where, what, "install taoq with its lock file")) from error
        except Exception as error:  # the code of another package may raise anything
            if not row.distribution:
                raise
            raise TaoqError(self._broken(row, where, error)) from error

    def _broken(self, row: Row, where: str, error: Exception) -> Fault:
        what = f"{self.kind} {row.name} of {row.distribution} {row.version} cannot be imported: "
        what += f"{type(error).__name__}: {first_line(error)}"
        return Fault(where, what, f"repair {row.distribution}, or uninstall it")


@functools.cache
def _rows(table: Table) -> Mapping[str, Row]:
    rows = {row.name: row for row in table.own}
    points = importlib.metadata.entry_points(group=table.group)
    for point in sorted(points, key=lambda point: (point.dist.name if point.dist else "", point.name)):
        distribution = point.dist
        row = Row(
            name=point.name,
            target=point.value,
            summary=(distribution.metadata["Summary"] or "") if distribution else "",
            distribution=distribution.name if distribution else "an unknown distribution",
            version=distribution.version if distribution else "",
        )
        if row.name in rows:
            owner = rows[row.name].distribution or "taoq"
            what = f"of the package {row.distribution} is ignored: {owner} has a {table.kind} of this name"
            log.warning(Notice(f"{table.kind} {row.name}", what))
            continue
        rows[row.name] = row
    return rows


def distributions(rows: Sequence[Row]) -> dict[str, str]:
    """Return the version of each distribution that adds one of these rows, for manifests and reports."""
    return {row.distribution: row.version for row in rows if row.distribution}


TASKS = Table(
    "task",
    "taoq.tasks",
    (
        Row(
            "classification_pyt",
            "taoq.tasks.classification.task:TASK",
            "image classification (timm and torchvision networks)",
        ),
        Row("rtdetr", "taoq.tasks.rtdetr.task:TASK", "object detection with RT-DETR"),
    ),
)
BACKENDS = Table(
    "backend",
    "taoq.backends",
    (
        Row("torchao", "taoq.quantization.backends.torchao:BACKEND", "weight-only quantization in torch"),
        Row(
            "modelopt.pytorch",
            "taoq.quantization.backends.modelopt_pytorch.backend:BACKEND",
            "static quantization in torch, for accuracy studies",
        ),
        Row(
            "modelopt.onnx",
            "taoq.quantization.backends.modelopt_onnx.backend:BACKEND",
            "static quantization of ONNX files, for NVIDIA GPUs",
        ),
        Row(
            "onnxruntime",
            "taoq.quantization.backends.onnxruntime_static:BACKEND",
            "static quantization of ONNX files, for CPUs",
        ),
    ),
)
RUNTIMES = Table(
    "runtime",
    "taoq.runtimes",
    (
        Row("torch", "taoq.runtimes.torch:RUNTIME", "torch checkpoints and artifacts"),
        Row("onnxruntime", "taoq.runtimes.onnxruntime:RUNTIME", "ONNX files, on the CPU, a GPU or TensorRT"),
    ),
)
