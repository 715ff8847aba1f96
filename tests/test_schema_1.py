"""Artifacts of manifest schema 1, one of each backend, written by taoq before its public API: they load for ever."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from taoq.pipeline.artifacts import read_artifact

KEPT = Path(__file__).parent / "schema_1"
BACKENDS = ("torchao", "modelopt.pytorch", "modelopt.onnx", "onnxruntime")
