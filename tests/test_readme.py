"""Every Python block of README.md runs on a small model, and every shell line is a command that exists."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from d2f_fast.commands.main import parse

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(python|bash)\n(.*?)```", README, re.DOTALL)
BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def run_block(words: str, names: dict[str, Any], replacements: dict[str, str]) -> dict[str, Any]:
    """Run the one Python block that holds `words`, after each replacement was found and made in it."""
    (block,) = [text for language, text in BLOCKS if language == "python" and words in text]
    for old, new in replacements.items():
        assert old in block
        block = block.replace(old, new)
    exec(block, names)
    return names


@pytest.fixture
def in_folder_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to an empty folder that has captioned images in `my_images`."""
    folder = tmp_path / "my_images"
    folder.mkdir()
    for i in range(2):
        Image.new("RGB", (20, 16), (100 * i, 50, 200)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"image {i}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_python_block_is_run_by_a_test() -> None:
    assert len([language for language, _ in BLOCKS if language == "python"]) == 3


def test_training_and_the_use_of_its_result_run(in_folder_of_images: Path, tiny_folder: Path) -> None:
    small = {BASE: str(tiny_folder), "rank=64, max_train_steps=2000": "rank=2, max_train_steps=2, resolution=16"}
    small |= {"my_python_run": "my_run"}  # the folder that the shell line would have made
    run_block("AlignedTrainer", {}, small)
    with Image.open(in_folder_of_images / "lighthouse.png") as image:
        assert image.size == (16, 16)

    small = {BASE: str(tiny_folder), "guidance_scale=7.5": "guidance_scale=7.5, width=16, height=16"}
    names = run_block("load_lora_weights", {}, small)
    assert names["image"].size == (16, 16)
    assert names["pipe"].get_active_adapters()


def test_three_lines_run_in_a_training_loop(tiny_folder: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder)
    latents, noise, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.rand(2)
    names: dict[str, Any] = {"pipeline": pipeline, "unet": pipeline.unet, "latents": latents, "noise": noise, "t": t}
    names["encoder_hidden_states"] = torch.randn(2, 8, 16)
    run_block("aligned_loss(model_output", names, {})["loss"].backward()
    assert pipeline.unet.conv_in.weight.grad.abs().sum() > 0


def test_shell_lines_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # the recipes are named relative to the clone
    lines = [line for language, text in BLOCKS if language == "bash" for line in text.splitlines()]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    checks: dict[str, Callable[[list[str]], Any]] = {
        "d2f": parse,
        "make": lambda words: [targets.index(target) for target in words],
        "pip": lambda words: (ROOT / words[words.index("-c") + 1]).read_bytes(),
    }
    commands = [shlex.split(line) for line in lines]
    assert {words[0] for words in commands} == set(checks)
    assert sum(words[0] == "d2f" for words in commands) >= 2
    for program, *arguments in commands:
        checks[program](arguments)
