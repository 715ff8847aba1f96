"""Artifacts of manifest schema 1, one of each backend, written by taoq before its public API: they load for ever."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from taoq.actions.open_model import open_runtime

from taoq.pipeline.artifacts import read_artifact
from taoq.spec.load import spec_from_dict
from taoq.tasks import load_task

KEPT = Path(__file__).parent / "schema_1"
BACKENDS = ("torchao", "modelopt.pytorch", "modelopt.onnx", "onnxruntime")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_kept_artifact_gives_the_outputs_that_it_gave(backend: str) -> None:
    task, manifest = load_task("classification_pyt"), read_artifact(KEPT / backend).manifest
    assert (manifest.schema_version, manifest.backend) == (1, backend)
    spec = spec_from_dict(manifest.spec, task.spec)
    section = dataclasses.replace(spec.evaluate, checkpoint=str(KEPT / backend), device="cpu")
    image = torch.linspace(-2, 2, 4 * 3 * 32 * 32).reshape(4, 3, 32, 32).sin()
    output = open_runtime(task, spec, section, "evaluate").run({"input": image})["output"]
    # another processor sums in another order, and a sum near a tie is then rounded the other way
    torch.testing.assert_close(output, load_file(KEPT / "outputs.safetensors")[backend], rtol=0, atol=0.05)
