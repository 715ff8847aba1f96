"""Artifacts of manifest schema 1, one of each backend, written by taoq before its public API: they load for ever."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from taoq.pipeline.artifacts import read_artifact
from taoq.pipeline.experiment import bind
from taoq.pipeline.models import open_artifact, open_runtime
from taoq.quantization.backends import load_backend
from taoq.spec.load import spec_from_dict
from taoq.tasks import load_task

KEPT = Path(__file__).parent / "schema_1"
every_backend = pytest.mark.parametrize("backend", ["torchao", "modelopt.pytorch", "modelopt.onnx", "onnxruntime"])


@every_backend
def test_a_kept_artifact_gives_the_outputs_that_it_gave(backend: str) -> None:
    task, manifest = load_task("classification_pyt"), read_artifact(KEPT / backend).manifest
    assert (manifest.schema_version, manifest.backend) == (1, backend)
    experiment = bind(task, spec_from_dict(manifest.spec, task.spec))
    section = dataclasses.replace(experiment.spec.evaluate, checkpoint=str(KEPT / backend), device="cpu")
    images = torch.linspace(-2, 2, 4 * 3 * 32 * 32).reshape(4, 3, 32, 32).sin()
    output = open_runtime(experiment, section, "evaluate").run({"input": images})["output"]
    # another processor sums in another order, and a sum near a tie is then rounded the other way
    torch.testing.assert_close(output, load_file(KEPT / "outputs.safetensors")[backend], rtol=0, atol=0.05)


@every_backend
def test_what_is_quantized_in_a_kept_artifact_is_what_its_plan_says(backend: str) -> None:
    task, artifact = load_task("classification_pyt"), read_artifact(KEPT / backend)
    experiment = bind(task, spec_from_dict(artifact.manifest.spec, task.spec))
    applied = load_backend(backend).applied(open_artifact(experiment, artifact).model)
    rows = {row["layer"]: row for row in artifact.manifest.plan if row["weights"] or row["activations"]}
    assert set(applied) == set(rows)
    for name, row in rows.items():
        for part, scheme in (("weights", applied[name].weights), ("activations", applied[name].activations)):
            assert (scheme and scheme.to_json()) == (row[part] and {**row[part], "asked": row[part]["dtype"]})
