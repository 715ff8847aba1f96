# SPDX-License-Identifier: Apache-2.0
"""The command line: parse the words, run the action, turn a TaoqError into two lines and an exit code.

Has no logic of its own and imports nothing heavy, so that `--help` is fast.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import taoq
from taoq.actions import ACTIONS
from taoq.errors import Fault, Notice, SpecError, TaoqError, did_you_mean
from taoq.plain import JsonMapping
from taoq.plugins import BACKENDS, RUNTIMES, TASKS, Table
from taoq.spec.source import read_spec
from taoq.status import progress_bars
from taoq.tasks import load_task

if TYPE_CHECKING:
    from taoq.actions.base import Show

INTERRUPTED = 130
_COMPARE = "compare"
"""The only action whose task can be left out: its artifacts name it."""
_HELP = ("-h", "--help", "help")
_LAUNCHER = "model"
"""The task group of TAO's launcher that taoq's tasks are in: `tao model rtdetr evaluate ...`."""
_OTHER_GROUPS = {
    "deploy": (
        "TensorRT engines are built and run by TAO Deploy, not by taoq",
        "write the ONNX file for it with: taoq <task> export -e spec.yaml",
    ),
    "dataset": ("data sets are converted by TAO's data services, not by taoq", "tasks are {tasks}"),
}
"""The other task groups of TAO's launcher: what does their work, and what to do."""
_OTHER_ACTIONS = {
    "gen_trt_engine": "TensorRT engines are built by TAO Deploy, from the ONNX file that export or quantize writes",
    "distill": "taoq does not train: quantize what TAO has distilled",
}
"""Actions of TAO that taoq does not have and that are near none of its own, with a hint."""
_ONE_GPU = "taoq runs on one GPU, which the section of the action names: device=cuda:N, in export gpu_id=N"
_OPTIONS_OF_TAO = {
    "-k": "taoq does not encrypt files: leave it out",
    "-r": "write results_dir=FOLDER",
    "--results_dir": "write results_dir=FOLDER",
    "--gpus": _ONE_GPU,
    "--num_gpus": _ONE_GPU,
    "--gpu_ids": _ONE_GPU,
}
"""Options of older versions of TAO, with a hint."""
_OPTIONS = {"quantize": BACKENDS, "evaluate": RUNTIMES, "inference": RUNTIMES, "benchmark": RUNTIMES}
"""For each action with an `--options` flag, the table whose rows have the options."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `taoq <task> <action> -e spec.yaml [key=value ...]` and return the exit code."""
    return _guarded(sys.argv[1:] if arguments is None else list(arguments))


def classification_pyt() -> int:
    """Run the console script `classification_pyt <action> ...`, which TAO has too."""
    return _guarded(["classification_pyt", *sys.argv[1:]])


def rtdetr() -> int:
    """Run the console script `rtdetr <action> ...`, which TAO has too."""
    return _guarded(["rtdetr", *sys.argv[1:]])


def _guarded(words: list[str]) -> int:
    """Run a command line and return its exit code. An exception that leaves this function is a bug."""
    logger = logging.getLogger("taoq")
    level, propagate = logger.level, logger.propagate
    stderr = _log_to_stderr(logger)
    previous_handler = signal.signal(signal.SIGTERM, _terminated)
    locate: Callable[[str], str] = str
    try:
        request = _parse(words)
        if request.help:
            print(request.help)
            return 0
        action = importlib.import_module(ACTIONS[request.action].module)
        request = _with_task(request)
        source = read_spec(request.spec, request.overrides, command=shlex.join(["taoq", *words]))
        task = load_task(request.task)
        locate = functools.partial(source.locate, schema=task.spec)
        stderr.setFormatter(_Formatter(locate))
        with progress_bars():
            action.run(task, source, _screen(), **request.flags)
    except TaoqError as error:
        error.locate(locate)
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # stdout was closed early (`taoq ... | head`): without this, flushing the rest of it at exit would fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    finally:
        signal.signal(signal.SIGTERM, previous_handler)
        logger.removeHandler(stderr)
        logger.setLevel(level)
        logger.propagate = propagate
    return 0


def _screen() -> Show:
    """Return the function that prints results. Imported here because help does not need rich."""
    from taoq.views.tables import to_screen

    return to_screen


@dataclass(frozen=True, kw_only=True)
class _Request:
    """A parsed command line. For a request for help, only the help text is set."""

    help: str = ""
    task: str = ""
    action: str = ""
    spec: str | None = None
    overrides: Sequence[str] = ()
    flags: JsonMapping = field(default_factory=dict)


def _with_task(request: _Request) -> _Request:
    """Fill in the task and the spec of a `compare` request from its first artifact, where they are left out."""
    if request.action != _COMPARE:
        return request
    from taoq.pipeline.comparison import task_and_spec

    task, spec = task_and_spec(request.flags["artifacts"], request.spec)
    return dataclasses.replace(request, task=request.task or task, spec=spec)


def _parse(words: list[str]) -> _Request:
    """Parse a command line.

    Done by hand and not by argparse's subparsers, so that a misspelled word gets a suggestion instead of the usage.

    Raises:
        SpecError: If a word is missing or unknown.
    """
    if words[:1] == [_LAUNCHER] and _LAUNCHER not in TASKS.rows():
        words = words[1:]
    if words[:1] == ["--version"]:
        return _Request(help=f"taoq {taoq.__version__}")
    if not words or words[0] in _HELP:
        return _Request(help=_help_taoq())
    task = words[0]
    if task == _COMPARE:
        return _parse_action("", _COMPARE, words[1:])
    if task not in TASKS.rows():
        tasks = TASKS.names()
        if task in _OTHER_GROUPS:
            what, hint = _OTHER_GROUPS[task]
            raise SpecError(Fault(task, what, hint.format(tasks=", ".join(tasks))))
        hint = did_you_mean(task, (*tasks, _COMPARE), "tasks are " + ", ".join(tasks))
        raise SpecError(Fault(task, "there is no such task", hint))
    if len(words) == 1 or words[1] in _HELP:
        return _Request(help=_help_task(task))
    action = words[1]
    if action not in ACTIONS:
        hint = _OTHER_ACTIONS.get(action) or did_you_mean(action, ACTIONS, "actions are " + ", ".join(ACTIONS))
        raise SpecError(Fault(f"{task} {action}", "there is no such action", hint))
    return _parse_action(task, action, words[2:])


def _parse_action(task: str, action: str, words: list[str]) -> _Request:
    name = f"{task} {action}".lstrip()
    parser = _Parser(prog=f"taoq {name}", description=ACTIONS[action].summary, add_help=False)
    parser.add_argument("-h", "--help", action="store_true", help="show this text")
    parser.add_argument("-e", "--experiment_spec_file", metavar="SPEC", help="the spec, a YAML file")
    if action == "quantize":
        parser.add_argument("--dry-run", action="store_true", help="print the plan and stop before calibration")
    if action in _OPTIONS:
        parser.add_argument("--options", metavar="NAME", help=f"show the options of a {_OPTIONS[action].kind}")
    compares = action == _COMPARE
    metavar, description = "key=value", "override a field: quantize.device=cpu"
    if compares:
        metavar, description = "ARTIFACT|key=value", "artifact folders, each from a quantize run; or override a field"
    parser.add_argument("overrides", nargs="*", metavar=metavar, help=description)
    parsed = vars(parser.parse_intermixed_args(words))
    if parsed.pop("help"):
        return _Request(help=parser.format_help().rstrip())
    if backend_or_runtime := parsed.pop("options", None):
        return _Request(help=_help_options(action, backend_or_runtime))
    spec, overrides = parsed.pop("experiment_spec_file"), parsed.pop("overrides")
    if compares:
        # A word with `=` is an artifact if it exists: a folder of a sweep may be called lr=0.1.
        parsed["artifacts"] = [word for word in overrides if not _is_override(word) or Path(word).exists()]
        overrides = [word for word in overrides if word not in parsed["artifacts"]]
    if not spec and not compares and action != "default_specs":
        raise SpecError(Fault(name, "no spec is given", "add -e spec.yaml"))
    return _Request(task=task, action=action, spec=spec, overrides=overrides, flags=parsed)


def _is_override(word: str) -> bool:
    return "=" in word or word.startswith("~")


class _Parser(argparse.ArgumentParser):
    """An argparse parser that raises SpecError."""

    def error(self, message: str) -> NoReturn:
        option = message.removeprefix("unrecognized arguments: ").partition(" ")[0].partition("=")[0]
        hint = _OPTIONS_OF_TAO.get(option, f"see {self.prog} --help")
        raise SpecError(Fault(self.prog.removeprefix("taoq "), message, hint))


class _Formatter(logging.Formatter):
    """Format records as `warning: spec.yaml:7: field: text`: notices about a field get its line in the spec."""

    def __init__(self, locate: Callable[[str], str]) -> None:
        super().__init__()
        self._locate = locate

    def format(self, record: logging.LogRecord) -> str:
        message: object = record.msg
        where = f"{self._locate(message.where)}: " if isinstance(message, Notice) else ""
        text = message.what if isinstance(message, Notice) else record.getMessage()
        return ("warning: " if record.levelno >= logging.WARNING else "") + where + text


class _Once(logging.Filter):
    """Drop repeated messages: an action may open a model several times, which logs the same notices each time."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_new = message not in self._seen
        self._seen.add(message)
        return is_new


def _log_to_stderr(logger: logging.Logger) -> logging.Handler:
    logger.setLevel(logging.DEBUG)  # for log.txt, which gets every message
    logger.propagate = False
    handler = logging.StreamHandler()
    handler.setLevel(logging.INFO)
    handler.setFormatter(_Formatter(str))
    handler.addFilter(_Once())
    logger.addHandler(handler)
    return handler


def _terminated(signum: int, frame: object) -> NoReturn:  # noqa: ARG001 (a signal handler)
    sys.exit(128 + signum)  # raises SystemExit, so that status.json gets its last line


def _help_taoq() -> str:
    return (
        "usage: taoq <task> <action> -e spec.yaml [key=value ...]\n"
        "       taoq compare ARTIFACT ... [key=value ...]\n\n"
        "Quantize vision models from one YAML spec, and know what it cost.\n\n"
        f"{_help_table(TASKS)}\n\n{_help_actions()}\n\n{_help_table(BACKENDS)}\n\n{_help_table(RUNTIMES)}\n\n"
        "taoq <task> <action> --help says more. Each task is also a command: classification_pyt <action> ..."
    )


def _help_task(task: str) -> str:
    row = TASKS.rows()[task]
    return f"usage: taoq {task} <action> -e spec.yaml [key=value ...]\n\n{row.summary}{row.origin}\n\n{_help_actions()}"


def _help_actions() -> str:
    return "actions:\n" + "\n".join(f"  {name:<20} {info.summary}" for name, info in ACTIONS.items())


def _help_options(action: str, name: str) -> str:
    """List the options of a backend or runtime, which has to be imported for it."""
    if _OPTIONS[action] is BACKENDS:
        from taoq.quantization.backends import load_backend

        place, options = "quantize.backend_kwargs", load_backend(name).capability.options
    else:
        from taoq.runtimes import find_runtime

        place, options = f"{action}.runtime_kwargs", find_runtime(name, "--options").options
    if not options:
        return f"{name} has no options"
    width = max(map(len, options))
    return f"options of {name}, in {place}:\n" + "\n".join(f"  {key:<{width}}  {text}" for key, text in options.items())


def _help_table(table: Table) -> str:
    rows = "\n".join(f"  {row.name:<20} {row.summary}{row.origin}" for row in table.rows().values())
    return f"{table.kind}s:\n{rows}"
