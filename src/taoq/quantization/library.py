# SPDX-License-Identifier: Apache-2.0
"""Redirect the output of libraries to the log, and patch their attributes temporarily."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

_log = logging.getLogger("taoq.library")


@contextlib.contextmanager
def library_output(level: int = logging.DEBUG) -> Iterator[None]:
    """Redirect stdout, warnings and messages of the root logger to the log of taoq.

    Args:
        level: Level to log at. log.txt records every level, the screen shows `logging.INFO` and above.
    """
    printed = io.StringIO()
    root, collector = logging.getLogger(), _Collector()
    # Without a handler, the first `logging.info` of a library would call basicConfig, which prints from then on.
    root.addHandler(collector)
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(printed):
        warnings.simplefilter("default")
        try:
            yield
        finally:
            root.removeHandler(collector)
            for line in printed.getvalue().splitlines():
                _log.log(level, line)
            for warning in caught:
                _log.log(level, "%s: %s", warning.category.__name__, warning.message)


class _Collector(logging.Handler):
    """Forwards messages of the root logger to the log of taoq."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == "root":
            _log.debug(record.getMessage())


@contextlib.contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """Replace an attribute within the context, for settings that a library has no argument for.

    Args:
        owner: A module, class or object.
        name: Name of the attribute.
        value: The temporary value.
    """
    own = vars(owner)
    before = own.get(name)  # getattr would unwrap a staticmethod
    inherited = name not in own
    setattr(owner, name, value)
    try:
        yield
    finally:
        if inherited:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
