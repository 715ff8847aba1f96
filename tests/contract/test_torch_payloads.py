"""Payloads of the torch backends: code in them does not run, and they are no float checkpoints. Real libraries."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import taoq
from support.networks import (
    backend_of,
    every_torch_backend,
    fresh_tiny_net,
    quantized_tiny_net,
)
from support.pickles import Bomb
from taoq.checkpoint import load_weights
from taoq.errors import TaoqError
from taoq.files import sha256
from taoq.pipeline.artifacts import SCHEMA_VERSION, Manifest, versions
from taoq.pipeline.experiment import bind
from taoq.pipeline.models import open_runtime
from taoq.spec.load import spec_from_dict, spec_to_dict
from taoq.tasks import load_task


@every_torch_backend
@pytest.mark.parametrize("forced", [False, True], ids=["plain", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
@pytest.mark.parametrize("place", ["whole", "in_the_state", "in_the_library_state"])
def test_a_pickle_with_code_in_it_does_not_run(
    backend: str, forced: bool, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, crater = tmp_path / "payload.pth", tmp_path / "crater"
    backend_of(backend).save(quantized_tiny_net(backend, "int8"), path, {})
    stored = torch.load(path, weights_only=True)
    if place == "whole":
        stored = Bomb(crater)
    elif place == "in_the_state":
        (stored if backend == "torchao" else stored["model_state_dict"])["fc1.bias"] = Bomb(crater)
    else:
        stored["modelopt_state"] = Bomb(crater)
    torch.save(stored, path)
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(pickle.UnpicklingError):
        backend_of(backend).load(path, fresh_tiny_net)
    assert not crater.exists()


def test_the_pickle_of_these_tests_runs_where_it_may(tmp_path: Path) -> None:
    torch.save(Bomb(tmp_path / "crater"), tmp_path / "payload.pth")
    torch.load(tmp_path / "payload.pth", weights_only=False).close()
    assert (tmp_path / "crater").exists()


@every_torch_backend
def test_an_artifact_with_code_in_its_payload_is_refused(backend: str, tmp_path: Path) -> None:
    library, crater = backend_of(backend), tmp_path / "crater"
    task = dataclasses.replace(load_task("classification_pyt"), build_model=lambda *_: fresh_tiny_net())
    payload = tmp_path / library.capability.payload
    torch.save(Bomb(crater), payload)
    spec = spec_from_dict({"evaluate": {"device": "cpu"}}, task.spec)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        taoq=taoq.__version__,
        task=task.name,
        backend=backend,
        format="torch",
        payload=payload.name,
        sha256=sha256(payload),
        size=payload.stat().st_size,
        float_size=0,
        source={},
        spec=spec_to_dict(spec),
        plan=(),
        calibration={},
        versions=versions(library.capability.libraries),
    )
    (tmp_path / "manifest.json").write_text(json.dumps(dataclasses.asdict(manifest)))
    section = dataclasses.replace(spec.evaluate, checkpoint=str(tmp_path))
    with pytest.raises(TaoqError) as error:
        open_runtime(bind(task, spec), section, "evaluate")
    assert str(error.value) == (
        f"{payload}: holds objects besides tensors, which taoq does not load: they could run code\nhint: quantize again"
    )
    assert not crater.exists()


@every_torch_backend
def test_quantizing_an_artifact_is_refused(
    backend: str, tmp_path: Path, taoq: Callable[..., tuple[int, str, str]]
) -> None:
    artifact, spec = tmp_path / "artifact", tmp_path / "spec.yaml"
    artifact.mkdir()
    payload = artifact / backend_of(backend).capability.payload
    backend_of(backend).save(quantized_tiny_net(backend, "int8"), payload, {})
    (artifact / "manifest.json").write_text(json.dumps({"payload": payload.name}))
    for path in (artifact, payload):
        spec.write_text(
            f"results_dir: {tmp_path / 'results'}\n"
            "dataset: {num_classes: 10}\n"
            "quantize:\n"
            f"  backend: {backend}\n"
            f"  mode: {backend_of(backend).capability.modes[0]}\n"
            "  layers: [{module_name: Linear, weights: {dtype: int8}}]\n"
            f"  model_path: {path}\n"
            "  device: cpu\n"
        )
        assert taoq("classification_pyt", "quantize", "-e", str(spec)) == (
            2,
            "",
            f"{spec}:7: quantize.model_path: {path} is quantized already\n"
            "hint: give the float checkpoint it was made from\n",
        )
    assert not (tmp_path / "results").exists()


@every_torch_backend
def test_a_payload_without_its_manifest_is_not_a_float_checkpoint(backend: str, tmp_path: Path) -> None:
    path = tmp_path / "payload.pth"
    backend_of(backend).save(quantized_tiny_net(backend, "int8"), path, {})
    with pytest.raises(TaoqError) as error:
        load_weights(fresh_tiny_net(), str(path))
    assert str(error.value) == (
        f"{path}: is the payload of a quantized model, without the manifest.json that belongs to it\n"
        "hint: give the folder that quantize wrote, or quantize again"
    )
