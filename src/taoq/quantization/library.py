# SPDX-License-Identifier: Apache-2.0
"""Keep what libraries print from the user's screen, and the settings that they change from the process."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

_log = logging.getLogger("taoq.library")


@contextlib.contextmanager
def library_output(level: int = logging.DEBUG) -> Iterator[None]:
    """Send what a library prints, logs to the root logger and warns of to the log.

    Args:
        level: The level there; log.txt has every level, the screen `logging.INFO` and above.
    """
    printed = io.StringIO()
    root, collector = logging.getLogger(), _Collector()
    root.addHandler(collector)  # without a handler, a library that logs to the root would set up printing for good
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
    """Passes on what libraries log to the root logger."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == "root":
            _log.debug(record.getMessage())


@contextlib.contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """Let an attribute of a library have another value for a while: the library has no argument for it.

    Args:
        owner: A module, class or object.
        name: Its attribute.
        value: The other value.
    """
    own = vars(owner)
    before = own.get(name)  # not getattr: a static method must come back as such
    inherited = name not in own
    setattr(owner, name, value)
    try:
        yield
    finally:
        if inherited:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
