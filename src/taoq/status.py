# SPDX-License-Identifier: Apache-2.0
"""The log of a run: status.json (JSON lines, TAO's fields), log.txt, and progress on a terminal."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from taoq.errors import Fault, TaoqError

T = TypeVar("T")


class Status:
    """Appends lines to `<results_dir>/status.json`, as TAO's watchers read it."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "status.json"

    def write(self, status: str, message: str, kpi: Mapping[str, float] | None = None) -> None:
        """Append one line. `status` is STARTED, RUNNING, SUCCESS or FAILURE."""
        now = time.localtime()
        line: dict[str, object] = {
            "date": f"{now.tm_mon}/{now.tm_mday}/{now.tm_year}",
            "time": time.strftime("%H:%M:%S", now),
            "status": status,
            "verbosity": "ERROR" if status == "FAILURE" else "INFO",
            "message": message,
        }
        if kpi:
            line["kpi"] = dict(kpi)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


@contextlib.contextmanager
def run_status(directory: Path, task: str, action: str) -> Iterator[Status]:
    """Make the results folder and keep its status.json and log.txt while an action runs.

    Whatever ends the action, the last line is SUCCESS or FAILURE: an error, a bug, Ctrl-C, SIGTERM.

    Raises:
        TaoqError: The folder cannot be made or written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "log.txt").open("a", encoding="utf-8").close()
        handler = logging.FileHandler(directory / "log.txt", encoding="utf-8", delay=True)
        status = Status(directory)
        status.write("STARTED", f"Starting {task} {action}.")
    except OSError as error:
        what = f"cannot be a results folder: {error.strerror}"
        raise TaoqError(Fault(str(directory), what, "choose another folder with results_dir=...")) from None
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger("taoq")
    root.addHandler(handler)
    try:
        yield status
    except BaseException as error:
        message = str(error).replace("\nhint:", " hint:") or type(error).__name__
        if isinstance(error, KeyboardInterrupt | SystemExit):
            message = "interrupted"
        status.write("FAILURE", f"{action.capitalize()} failed: {message}")
        raise
    else:
        status.write("SUCCESS", f"{action.capitalize()} finished successfully.")
    finally:
        root.removeHandler(handler)
        handler.close()


def track(items: Iterable[T], total: int, what: str, count: str = "paths") -> Iterator[T]:
    """Go through batches with a progress bar on stderr: rate and remaining time, nothing off a terminal.

    Args:
        items: Batches.
        total: Number of images in all of them.
        what: What is going on, for the bar.
        count: Attribute of a batch with one entry per image.
    """
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.1f} images/s"),
        TimeRemainingColumn(),
    )
    started = time.monotonic()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(what, total=total, rate=0.0)
        done = 0
        for item in items:
            yield item
            done += len(getattr(item, count))
            progress.update(bar, completed=done, rate=done / max(time.monotonic() - started, 1e-9))


def steps(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Go through things that take long with a progress bar on stderr: remaining time, nothing off a terminal.

    Args:
        items: The things.
        total: How many there are.
        what: What is going on, for the bar.
    """
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track as bar

    yield from bar(items, what, total, console=Console(stderr=True), transient=True)
