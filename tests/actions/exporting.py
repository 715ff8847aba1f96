"""The command line that exports an example network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def export_words(words: Callable[..., list[str]], network: str, file: Path, *overrides: str) -> list[str]:
    """Words of `taoq ... export` of a checkpoint of the examples into a file; `words` is that of the fixtures."""
    source = next(word for word in words("export", network) if word.startswith("quantize.model_path="))
    checkpoint = source.partition("=")[2]
    export = [f"export.checkpoint={checkpoint}", f"export.onnx_file={file}", "export.on_cpu=true"]
    return words("export", network, *export, *overrides)
