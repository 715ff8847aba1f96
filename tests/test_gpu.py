"""The same job on a CUDA device; skipped without one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

Taoq = Callable[..., tuple[int, str, str]]
Words = Callable[..., list[str]]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BOTH = "weights: {{dtype: {0}}}, activations: {{dtype: {0}}}"
VARIANTS = [
    ("torchao", "weight_only_ptq", "{{module_name: Linear, weights: {{dtype: {0}}}}}", "int8"),
    ("torchao", "weight_only_ptq", "{{module_name: Linear, weights: {{dtype: {0}}}}}", "fp8_e4m3fn"),
    ("modelopt.pytorch", "static_ptq", "{{module_name: '*', " + BOTH + "}}", "int8"),
    ("modelopt.pytorch", "static_ptq", "{{module_name: '*', " + BOTH + "}}", "fp8_e4m3fn"),
]


@pytest.mark.parametrize(("backend", "mode", "rule", "dtype"), VARIANTS)
def test_quantize_and_evaluate_on_a_gpu(
    taoq: Taoq, digits_words: Words, tmp_path: Path, backend: str, mode: str, rule: str, dtype: str
) -> None:
    words = digits_words("quantize", "vit_tiny", "quantize.device=cuda", f"quantize.backend={backend}")
    code, out, err = taoq(*words, f"quantize.mode={mode}", f"quantize.layers=[{rule.format(dtype)}]")
    assert code == 0, err
    assert " s on cuda:0; " in out
    accuracy = []
    for device in ("cuda", "cpu"):  # an artifact made on a GPU is for any machine
        checkpoint = f"evaluate.checkpoint={tmp_path / 'results' / 'quantize'}"
        code, _, err = taoq(*digits_words("evaluate", "vit_tiny", checkpoint, f"evaluate.device={device}"))
        assert code == 0, err
        results = json.loads((tmp_path / "results" / "evaluate" / "results.json").read_text())
        accuracy.append(results["metrics"]["val_acc_1"])
    assert min(accuracy) >= 0.97
    assert accuracy[0] == pytest.approx(accuracy[1], abs=0.005)


def test_a_detector_on_a_gpu(taoq: Taoq, scenes_words: Words, tmp_path: Path) -> None:
    code, _, err = taoq(*scenes_words("quantize", "quantize.device=cuda"))
    assert code == 0, err
    precision = []
    for device in ("cuda", "cpu"):
        code, _, err = taoq(*scenes_words("evaluate", f"evaluate.device={device}"))
        assert code == 0, err
        results = json.loads((tmp_path / "results" / "evaluate" / "results.json").read_text())
        precision.append(results["metrics"]["val_mAP"])
    assert min(precision) > 0.8
    assert precision[0] == pytest.approx(precision[1], abs=0.01)


def test_a_gpu_that_is_not_there_is_refused(taoq: Taoq, digits_words: Words) -> None:
    count = torch.cuda.device_count()
    code, _, err = taoq(*digits_words("quantize", "vit_tiny", f"quantize.device=cuda:{count}"))
    assert code == 2
    assert f"there is no cuda:{count}: this machine has {count} GPU(s)\n" in err
