# SPDX-License-Identifier: Apache-2.0
"""The log of a run: status.json (JSON lines with TAO's fields), log.txt, and progress bars."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import TypeVar

from taoq.errors import Fault, TaoqError

T = TypeVar("T")

_bars: ContextVar[bool] = ContextVar("bars", default=False)
"""Whether progress bars are shown. Only the command line turns them on: a Python caller may not want them on stderr."""


class Status:
    """Append lines to `<results_dir>/status.json`, in the form that TAO's tools read."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "status.json"

    def write(self, status: str, message: str, kpi: Mapping[str, float | str] | None = None) -> None:
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

    def running(self, message: str, kpi: Mapping[str, float | str] | None = None) -> None:
        """Append a RUNNING line."""
        self.write("RUNNING", message, kpi)


@contextlib.contextmanager
def run_status(directory: Path, task: str, action: str) -> Iterator[Status]:
    """Create the results folder, and write its status.json and log.txt while an action runs.

    However the action ends (an error, a bug, Ctrl-C, SIGTERM), the last line of status.json is SUCCESS or FAILURE.

    Raises:
        TaoqError: If the folder cannot be created or written.
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
        status.write("FAILURE", f"{action.capitalize()} failed: {_failure_message(error)}")
        raise
    else:
        status.write("SUCCESS", f"{action.capitalize()} finished successfully.")
    finally:
        root.removeHandler(handler)
        handler.close()


def _failure_message(error: BaseException) -> str:
    if isinstance(error, TaoqError):
        return "\n".join(f"{fault.where}: {fault.what} hint: {fault.hint}" for fault in error.faults)
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return "interrupted"
    return str(error) or type(error).__name__


@contextlib.contextmanager
def progress_bars() -> Iterator[None]:
    """Show progress bars on stderr inside this context, if stderr is a terminal."""
    token = _bars.set(sys.stderr.isatty())
    try:
        yield
    finally:
        _bars.reset(token)


def track(items: Iterable[T], total: int, what: str, count: Callable[[T], int] | None = None) -> Iterator[T]:
    """Iterate over `items`; inside `progress_bars`, draw a bar with the remaining time.

    Args:
        items: What to iterate over.
        total: Number of items; number of images if `count` is given.
        what: Description of the work, for the bar.
        count: Return the number of images of an item; the bar then shows images/s.
    """
    if not _bars.get():
        yield from items
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    if count:
        columns.insert(3, TextColumn("{task.fields[rate]:.1f} images/s"))
    started = time.monotonic()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(what, total=total, rate=0.0)
        done = 0
        for item in items:
            yield item
            done += count(item) if count else 1
            progress.update(bar, completed=done, rate=done / max(time.monotonic() - started, 1e-9))
