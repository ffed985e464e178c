"""The README's Python runs, and its shell commands are ones that exist."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from d2f_fast.commands.main import parse

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(python|bash)\n(.*?)```", README, re.DOTALL)


def python_block(words: str) -> str:
    (block,) = [text for language, text in BLOCKS if language == "python" and words in text]
    return block


def test_the_three_lines_run_in_a_training_loop(tiny_folder):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder)
    latents, noise, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.rand(2)
    names: dict[str, Any] = {"pipeline": pipeline, "unet": pipeline.unet, "latents": latents, "noise": noise, "t": t}
    names["encoder_hidden_states"] = torch.randn(2, 8, 16)
    exec(python_block("aligned_loss(model_output"), names)
    names["loss"].backward()
    assert pipeline.unet.conv_in.weight.grad.abs().sum() > 0


def test_sampling_in_a_stock_pipeline_runs(tiny_folder):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder)
    names: dict[str, Any] = {"pipe": pipe}
    exec(
        python_block("Diff2FlowScheduler").replace(
            "num_inference_steps=4", "num_inference_steps=1, width=16, height=16"
        ),
        names,
    )
    assert names["sigmas"] == pytest.approx([17.6146, 3, 1, 1 / 3, 0], rel=1e-5)


def test_the_commands_parse():
    commands = [line for language, text in BLOCKS if language == "bash" for line in text.splitlines()]
    ours = [shlex.split(line)[1:] for line in commands if line.startswith("d2f ") and "--help" not in line]
    assert len(ours) >= 3
    for arguments in ours:
        parse(arguments)
