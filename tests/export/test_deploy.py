"""Tests that run the examples of docs/deploy.md as they are printed, in a folder with an export."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from PIL import Image
from safetensors.torch import save_file

from d2f_fast.export.inference import OnnxPipeline
from d2f_fast.export.options import parse
from d2f_fast.lora.source import LORA_FILE

PAGE = (Path(__file__).resolve().parents[2] / "docs/deploy.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def beside_the_export(exported_miniature, tmp_path, monkeypatch):
    """Return a folder, made the current one, in which d2f-onnx is the export of the miniature."""
    (tmp_path / "d2f-onnx").symlink_to(exported_miniature[0])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python_examples_run_and_generate_the_image_of_the_pipeline(beside_the_export, capsys):
    names: dict[str, object] = {}
    blocks = _blocks("python")
    assert len(blocks) == 4
    for block in blocks:
        exec(block, names)
    image = np.asarray(Image.open("owl.png"), np.int16)
    (want,) = OnnxPipeline("d2f-onnx")(
        ["an owl on a blue background"], steps=4, guidance_scale=3.0, noise=names["noise"]
    )
    assert image.shape == (32, 32, 3) and image.std() > 10
    assert np.abs(image - np.asarray(want, np.int16)).max() <= 1
    # The page shows the engine command that the report holds.
    printed = capsys.readouterr().out.split()
    (shown,) = re.findall(r"\n    (trtexec .*?)\n\n", PAGE, re.DOTALL)
    assert shown.replace("\\\n", "").split() == printed


def test_sigmas_of_the_optimum_example_are_four_steps(exported_miniature):
    (listed,) = re.findall(r"sigmas=\[(.*?)\]", PAGE)
    scheduler = EulerDiscreteScheduler.from_pretrained(exported_miniature[0] / "scheduler")
    scheduler.set_timesteps(sigmas=[eval(sigma) for sigma in listed.split(",")])
    table = json.loads((exported_miniature[0] / "unet/steps.json").read_text())["4"]
    assert scheduler.timesteps.tolist() == pytest.approx(table["timesteps"], abs=0.05)
    assert scheduler.sigmas.tolist() == pytest.approx(table["sigmas"], rel=1e-5)


def test_commands_parse(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()  # the run of the page, whose LoRA must exist
    save_file({"unet.conv_in.lora_A.weight": torch.zeros(1, 4, 3, 3)}, f"run/{LORA_FILE}")
    commands = [line for block in _blocks("bash") for line in block.splitlines()]
    assert len(commands) == 4
    for line in commands:
        words = shlex.split(line, comments=True)
        assert words[:2] == ["python", "export/to_onnx.py"]
        parse(words[2:], "to_onnx.py").check()
