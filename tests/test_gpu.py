"""The same job on a CUDA device; skipped without one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from support.commands import Taoq, Words, read_json, rules

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def metric_on_each_device(taoq: Taoq, tmp_path: Path) -> Callable[[Words, str], list[float]]:
    """A metric of the quantized model, evaluated on a GPU and on the CPU: an artifact of a GPU is for any machine."""

    def measure(words: Words, metric: str) -> list[float]:
        values = []
        for device in ("cuda", "cpu"):
            checkpoint = f"evaluate.checkpoint={tmp_path / 'results' / 'quantize'}"
            code, _, err = taoq(*words("evaluate", checkpoint, f"evaluate.device={device}"))
            assert code == 0, err
            values.append(read_json(tmp_path / "results" / "evaluate" / "results.json")["metrics"][metric])
        return values

    return measure


@pytest.mark.parametrize("dtype", ["int8", "fp8_e4m3fn"])
@pytest.mark.parametrize(
    ("backend", "mode", "pattern"),
    [("torchao", "weight_only_ptq", "Linear"), ("modelopt.pytorch", "static_ptq", "*")],
)
def test_quantize_and_evaluate_on_a_gpu(
    taoq: Taoq,
    digits_words: Words,
    metric_on_each_device: Callable[[Words, str], list[float]],
    backend: str,
    mode: str,
    pattern: str,
    dtype: str,
) -> None:
    def words(action: str, *overrides: str) -> list[str]:
        return digits_words(action, "vit_tiny", *overrides)

    layers = rules(dtype, pattern, activations=mode == "static_ptq")
    options = ("quantize.device=cuda", f"quantize.backend={backend}", f"quantize.mode={mode}", layers)
    code, out, err = taoq(*words("quantize", *options))
    assert code == 0, err
    assert " s on cuda:0; " in out
    on_gpu, on_cpu = metric_on_each_device(words, "val_acc_1")
    assert min(on_gpu, on_cpu) >= 0.97
    assert on_gpu == pytest.approx(on_cpu, abs=0.005)


def test_a_detector_on_a_gpu(
    taoq: Taoq, scenes_words: Words, metric_on_each_device: Callable[[Words, str], list[float]]
) -> None:
    code, _, err = taoq(*scenes_words("quantize", "quantize.device=cuda"))
    assert code == 0, err
    on_gpu, on_cpu = metric_on_each_device(scenes_words, "val_mAP")
    assert min(on_gpu, on_cpu) > 0.8
    assert on_gpu == pytest.approx(on_cpu, abs=0.01)


def test_a_gpu_that_is_not_there_is_refused(taoq: Taoq, digits_words: Words) -> None:
    count = torch.cuda.device_count()
    code, _, err = taoq(*digits_words("quantize", "vit_tiny", f"quantize.device=cuda:{count}"))
    assert code == 2
    assert f"there is no cuda:{count}: this machine has {count} GPU(s)\n" in err
