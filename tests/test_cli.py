"""The command line: its help, its words, its exit codes."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import taoq as package
from support.commands import Taoq
from taoq.actions import ACTIONS
from taoq.plugins import TASKS
from taoq.tasks import load_task

HELP = """\
usage: taoq <task> <action> -e spec.yaml [key=value ...]
       taoq compare ARTIFACT ... [key=value ...]

Quantize vision models from one YAML spec, and know what it cost.

tasks:
  classification_pyt   image classification (timm and torchvision networks)
  rtdetr               object detection with RT-DETR

actions:
  quantize             quantize a checkpoint into an artifact
  evaluate             evaluate a float checkpoint or an artifact on labelled data
  inference            run a float checkpoint or an artifact on images
  export               export a checkpoint or an artifact to ONNX, and verify its outputs
  benchmark            measure the speed of a quantized model and of its float model
  analyze              rank the layers by what quantizing them costs
  compare              compare artifacts: accuracy, size, speed, layers
  default_specs        write a commented spec with all defaults

backends:
  torchao              weight-only quantization in torch
  modelopt.pytorch     static quantization in torch, for accuracy studies
  modelopt.onnx        static quantization of ONNX files, for NVIDIA GPUs
  onnxruntime          static quantization of ONNX files, for CPUs

runtimes:
  torch                torch checkpoints and artifacts
  onnxruntime          ONNX files, on the CPU, a GPU or TensorRT

taoq <task> <action> --help says more. Each task is also a command: classification_pyt <action> ...
"""


@pytest.mark.parametrize(
    "words", [[], ["--help"], ["-h"], ["help"], ["model"], ["model", "--help"]], ids=lambda words: " ".join(words)
)
def test_help_lists_tasks_actions_backends_and_runtimes(taoq: Taoq, words: list[str]) -> None:
    assert taoq(*words) == (0, HELP, "")


def test_help_of_a_task_lists_its_actions(taoq: Taoq) -> None:
    code, out, err = taoq("classification_pyt", "--help")
    assert (code, err) == (0, "")
    assert out.startswith("usage: taoq classification_pyt <action> -e spec.yaml [key=value ...]\n")
    assert [name for name in ACTIONS if f"\n  {name} " not in out] == []


def test_the_form_of_tao_s_launcher_is_the_same_command(taoq: Taoq) -> None:
    for words in (["rtdetr"], ["rtdetr", "evaluate", "--help"], ["compare", "--help"]):
        assert taoq("model", *words) == taoq(*words)


def test_help_of_an_action_shows_its_flags(taoq: Taoq) -> None:
    code, out, _ = taoq("classification_pyt", "quantize", "--help")
    assert code == 0
    assert "--dry-run" in out
    assert "--dry-run" not in taoq("classification_pyt", "evaluate", "-h")[1]


def test_version(taoq: Taoq) -> None:
    assert taoq("--version") == (0, f"taoq {package.__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["classification"], "classification: there is no such task\nhint: did you mean 'classification_pyt'?\n"),
        (["compar", "a"], "compar: there is no such task\nhint: did you mean 'compare'?\n"),
        (["yolo"], "yolo: there is no such task\nhint: tasks are classification_pyt, rtdetr\n"),
        (
            ["classification_pyt", "quantise"],
            "classification_pyt quantise: there is no such action\nhint: did you mean 'quantize'?\n",
        ),
        (
            ["classification_pyt", "train"],
            "classification_pyt train: there is no such action\n"
            "hint: actions are quantize, evaluate, inference, export, benchmark, analyze, compare, default_specs\n",
        ),
        (
            ["rtdetr", "gen_trt_engine", "-e", "a.yaml"],
            "rtdetr gen_trt_engine: there is no such action\n"
            "hint: TensorRT engines are built by TAO Deploy, from the ONNX file that export or quantize writes\n",
        ),
        (
            ["rtdetr", "distill", "-e", "a.yaml"],
            "rtdetr distill: there is no such action\nhint: taoq does not train: quantize what TAO has distilled\n",
        ),
        (
            ["deploy", "rtdetr", "evaluate", "-e", "a.yaml"],
            "deploy: TensorRT engines are built and run by TAO Deploy, not by taoq\n"
            "hint: write the ONNX file for it with: taoq <task> export -e spec.yaml\n",
        ),
        (
            ["dataset", "annotations", "convert"],
            "dataset: data sets are converted by TAO's data services, not by taoq\n"
            "hint: tasks are classification_pyt, rtdetr\n",
        ),
        (["model", "yolo"], "yolo: there is no such task\nhint: tasks are classification_pyt, rtdetr\n"),
        (["model", "rtdetr", "quantize"], "rtdetr quantize: no spec is given\nhint: add -e spec.yaml\n"),
        (["rtdetr", "quantize"], "rtdetr quantize: no spec is given\nhint: add -e spec.yaml\n"),
        (["classification_pyt", "quantize"], "classification_pyt quantize: no spec is given\nhint: add -e spec.yaml\n"),
        (
            ["classification_pyt", "evaluate", "-e", "a.yaml", "--dry-run"],
            "classification_pyt evaluate: unrecognized arguments: --dry-run\n"
            "hint: see taoq classification_pyt evaluate --help\n",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_word_gets_two_lines(taoq: Taoq, words: list[str], message: str) -> None:
    assert taoq(*words) == (2, "", message)


@pytest.mark.parametrize("script", ["taoq", "classification_pyt", "rtdetr"])
def test_console_scripts(script: str) -> None:
    command = Path(sys.executable).parent / script
    result = subprocess.run(
        [command, "--version" if script == "taoq" else "-h"], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"usage: taoq {script} " if script != "taoq" else "taoq ")


@pytest.mark.parametrize("name", TASKS.names())
def test_every_task_of_the_table_loads_under_its_name(name: str) -> None:
    assert load_task(name).name == name


@pytest.mark.parametrize("name", ACTIONS)
def test_every_action_of_the_table_has_a_run(name: str) -> None:
    assert callable(importlib.import_module(ACTIONS[name].module).run)
