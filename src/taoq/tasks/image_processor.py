# SPDX-License-Identifier: Apache-2.0
"""Read the image processor in a folder of Hugging Face."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from PIL import Image

from taoq.errors import Fault, SpecError, TaoqError, first_line
from taoq.tasks.sections import TaskSpec, checkpoints

PROCESSOR_FILE = "preprocessor_config.json"


def processor_folder(spec: TaskSpec, folder: str, where: str) -> str:
    """Return the folder of an image processor.

    Args:
        spec: The spec.
        folder: The folder that it names; empty for the first checkpoint that is such a folder.
        where: The field that names it, for messages.

    Raises:
        SpecError: If there is none.
    """
    folders = [path for path in ([folder] if folder else checkpoints(spec)) if Path(path, PROCESSOR_FILE).is_file()]
    if not folders:
        what = f"{folder} is no folder" if folder else "no checkpoint of the spec is a folder"
        hint = "write huggingface/FOLDER with the folder that has it"
        raise SpecError(Fault(where, f"{what} with {PROCESSOR_FILE}", hint))
    return folders[0]


def read_processor(folder: str, where: str) -> Any:
    """Return the image processor of preprocessor_config.json; its class fills in what the file leaves out.

    The class is that of transformers: code in the folder is never run. It is the one that resizes with Pillow, as taoq
    does and as networks were trained, where transformers has that; the others resize tensors, which differs by up to 8
    levels of 255 in places, with the interpolation bicubic.

    Args:
        folder: The folder.
        where: The field that names it, for messages.

    Raises:
        TaoqError: If the file is missing or cannot be read.
    """
    from transformers import AutoImageProcessor

    options = {"local_files_only": True, "trust_remote_code": False, "backend": "pil"}
    try:
        return cast(Any, AutoImageProcessor).from_pretrained(folder, **options)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        what = f"{folder} has no {PROCESSOR_FILE} that transformers can read: {first_line(error)}"
        raise TaoqError(Fault(where, what, "name a folder with the file of an image processor")) from None


def given(size: Any) -> dict[str, int]:
    """Return the parts of a size of a processor (height, width, shortest_edge, ...) that are not None, by name."""
    return {name: value for name, value in sorted(dict(size or {}).items()) if value}


def interpolation_of(processor: Any) -> str:
    """Return the interpolation of a processor's resize, by its name in taoq."""
    return Image.Resampling(int(processor.resample)).name.lower()
