"""Command lines of the tests, and what they wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Taoq = Callable[..., tuple[int, str, str]]
"""Runs a command line in this process: (*words); returns exit code, stdout and stderr."""
Words = Callable[..., list[str]]
"""Words of a command line: (action, network, *overrides) on the digits, (action, *overrides) on the scenes."""
Refusal = Callable[..., tuple[int, list[str]]]
"""Runs an action that must fail: (action, *overrides); returns the exit code and the lines of its faults."""


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def status_lines(directory: Path) -> list[dict[str, Any]]:
    """The lines of a status.json."""
    return [json.loads(line) for line in (directory / "status.json").read_text(encoding="utf-8").splitlines()]


def rules(dtype: str = "int8", pattern: str = "*", *, activations: bool = True) -> str:
    """An override that quantizes the layers of one pattern."""
    tensor = {"dtype": dtype}
    rule = {"module_name": pattern, "weights": tensor, **({"activations": tensor} if activations else {})}
    return f"quantize.layers={json.dumps([rule])}"


def export_words(words: Words, network: str, file: Path, *overrides: str) -> list[str]:
    """Words of `taoq ... export` of a checkpoint of the examples into a file."""
    source = next(word for word in words("export", network) if word.startswith("quantize.model_path="))
    checkpoint = source.partition("=")[2]
    export = [f"export.checkpoint={checkpoint}", f"export.onnx_file={file}", "export.on_cpu=true"]
    return words("export", network, *export, *overrides)


def unchanged() -> None:
    """The damage of a case whose command line alone is wrong."""


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    """Change the content of a json file."""
    data = read_json(path)
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")
