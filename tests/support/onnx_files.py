"""Changes of float.onnx, the exported network that the tests of bad input run on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Change = Callable[[onnx.ModelProto], Any]
"""Changes a model in place."""

EXPORT_AGAIN = "hint: export it again, or copy it again: a part may be missing\n"


def change_file(*changes: Change, path: Path | str = "float.onnx") -> None:
    """Change a file. What taoq wrote into it about itself stays: see `remove_properties`."""
    model = onnx.load(path)
    for change in changes:
        change(model)
    Path(path).write_bytes(model.SerializeToString())


def remove_properties(model: onnx.ModelProto) -> None:
    """Make it the file of another exporter."""
    del model.metadata_props[:]


def set_shape(value: onnx.ValueInfoProto, *sizes: int | str, dtype: int = TensorProto.FLOAT) -> None:
    """Declare another shape of an input or output."""
    value.CopyFrom(helper.make_tensor_value_info(value.name, dtype, sizes))


def set_classes(number: int) -> Change:
    """Make the network one of another number of classes."""

    def change(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            if tensor.name.startswith("fc."):
                array = numpy_helper.to_array(tensor)
                tensor.CopyFrom(numpy_helper.from_array(np.concatenate([array, array])[:number], tensor.name))
        set_shape(model.graph.output[0], "batch", number)

    return change
