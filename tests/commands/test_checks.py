"""What several commands check alike before the slow imports, and refusals of all commands without torch."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from d2f_fast.commands.checks import check_lora_and_output
from d2f_fast.errors import CheckpointError, RefusedInputError
from d2f_fast.models.configs import MINIATURE_FOLDER


def test_missing_lora_and_a_file_as_output_are_refused_and_nothing_is_made(tmp_path: Path) -> None:
    check_lora_and_output((), str(tmp_path / "new"))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match="there is no such file or folder"):
        check_lora_and_output((f"{tmp_path / 'nope'}:0.5",), str(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(RefusedInputError, match="cannot be made a folder"):
        check_lora_and_output((), str(tmp_path / "file"))


KEYS = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
CHECKPOINT = ("trainable.safetensors", "ema.safetensors", "optimizer.safetensors")


def write_lora(path: Path, name: str, rows: int, *columns: int, **header: str) -> None:
    """Write a LoRA of rank 2 for one layer, in kohya's form where the layer has one of its names."""
    is_kohya = name.startswith("lora_")
    down, up = ("lora_down", "lora_up") if is_kohya else ("lora_A", "lora_B")
    tensors = {f"{name}.{down}.weight": np.ones((2, *columns), "f4"), f"{name}.{up}.weight": np.ones((rows, 2), "f4")}
    tensors |= {f"{name}.alpha": np.array(2.0, "f4")} if is_kohya else {}
    save_file(tensors, path, header or None)


def write_model(folder: Path, scheduler: dict[str, Any], tags: dict[str, str], channels: int = 4) -> None:
    """Copy the miniature with other entries, and with a first layer of another number of channels."""
    shutil.copytree(MINIATURE_FOLDER, folder)
    changes = {"scheduler/scheduler_config.json": scheduler, "unet/config.json": {"in_channels": channels}}
    for name, entries in changes.items():
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | entries))
    if tags:
        (folder / "d2f.json").write_text(json.dumps(tags))
    if channels != 4:
        weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(weights)
        tensors["conv_in.weight"] = np.tile(tensors["conv_in.weight"], (1, channels // 4, 1, 1))
        save_file(tensors, weights)


def write_checkpoint(run: Path, lacking: str = "", step: int = 2) -> None:
    """Write `checkpoint-2` of a run without a file, and with a step in its manifest."""
    folder = run / "checkpoint-2"
    folder.mkdir(parents=True)
    for name in CHECKPOINT:
        if name != lacking:
            save_file({"x": np.ones(1, "f4")}, folder / name)
    (folder / "state.json").write_text(json.dumps({"identity": {}, "samples": 1, "skipped_steps": 0}))
    files = {path.name: {"size": path.stat().st_size, "sha256": ""} for path in folder.iterdir()}
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "step": step, "files": files}))


@pytest.fixture
def files(tmp_path: Path, write_pairs: Callable[..., Path]) -> Path:
    """Folder of models, LoRA, data and checkpoints that do not fit each other."""
    write_lora(tmp_path / "xl.safetensors", f"unet.{KEYS}", 48, 2048)
    write_lora(tmp_path / "sd1.safetensors", f"unet.{KEYS}", 48, 768)
    write_lora(tmp_path / "xl_kohya.safetensors", f"lora_unet_{KEYS.replace('.', '_')}", 48, 2048)
    write_lora(tmp_path / "xl_sgm.safetensors", "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k", 48, 2048)
    write_lora(tmp_path / "own.safetensors", f"unet.{KEYS}", 48, 128)
    write_lora(tmp_path / "in4.safetensors", "unet.conv_in", 48, 4, 3, 3)
    tags = {"d2f.task": "depth", "d2f.depth_normalization": "affine"}
    write_lora(tmp_path / "in4_depth.safetensors", "unet.conv_in", 48, 4, 3, 3, **tags)
    write_lora(tmp_path / "in8.safetensors", "unet.conv_in", 48, 8, 3, 3, **tags)
    write_model(tmp_path / "zero_snr", {"rescale_betas_zero_snr": True}, {})
    for name, value in (("shift", "wide"), ("prediction_type", "noise"), ("recommended_guidance", "many")):
        write_model(tmp_path / f"bad_{name}", {}, {f"d2f.{name}": value})
    write_model(tmp_path / "eight", {}, {}, channels=8)
    write_pairs(tmp_path / "p16" / "0.tar", shape=(16, 8, 8))
    for name in "ab":
        write_pairs(tmp_path / name / f"{name}.tar", meta={"model": name * 16})
    (tmp_path / "data").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "data" / "0.png")
    (tmp_path / "data" / "0.txt").write_text("a")
    write_checkpoint(tmp_path / "lacking", "trainable.safetensors")
    write_checkpoint(tmp_path / "other_step", step=7)
    write_checkpoint(tmp_path / "damaged")
    path = tmp_path / "damaged" / "checkpoint-2" / "optimizer.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    return tmp_path


TRAIN = "train --train_data_dir data --init_lora"
ON_PAIRS = "train --output_dir out --pairs"
RESUME = "train --train_data_dir data --rank 2 --resume_from_checkpoint"
SAMPLE = "sample --prompts a --output_dir out"
DEPTH = "sample --task depth --image data/0.png --output_dir out"
OTHER_FAMILY = "it is a LoRA of SDXL (its text is 2048 wide), and this model is another network"
CHANNELS = "it is a LoRA of a network that takes {} channels, and this one takes {} "
ZERO_SNR = "prediction_type 'epsilon' with zero terminal SNR: "
REFUSALS = {
    f"{TRAIN} xl.safetensors": f"xl.safetensors: unet.{KEYS} changes a weight of 48 x 2048, which does not fit",
    f"{TRAIN} xl_kohya.safetensors": OTHER_FAMILY,
    f"{TRAIN} xl_sgm.safetensors:0.5": OTHER_FAMILY,
    "train --train_data_dir data --teacher base --teacher_lora xl.safetensors": OTHER_FAMILY,
    f"{SAMPLE} --lora xl_sgm.safetensors": OTHER_FAMILY,
    "pairs --train_data_dir data --output_dir out --lora xl.safetensors": OTHER_FAMILY,
    "evaluate --model miniature --straightness --prompts a --lora xl.safetensors": OTHER_FAMILY,
    "convert miniature out --lora xl_kohya.safetensors": OTHER_FAMILY,
    "convert xl.safetensors out.safetensors --lora sd1.safetensors": "the LoRA files are of different families",
    "export --output out --lora xl.safetensors": OTHER_FAMILY,
    f"{TRAIN} own.safetensors --rank 8": "rank is 8, and own.safetensors has rank 2: leave rank out",
    f"{TRAIN} own.safetensors --conv_rank 2": "conv_rank is 2, and own.safetensors has no such layers",
    f"{TRAIN} own.safetensors --target_modules to_q": "target_modules is to_q, and own.safetensors has 0 of its 14",
    f"{ON_PAIRS} p16": "0.tar has latents of 16 channels, and the model takes 4: train the model that made the pairs",
    f"{ON_PAIRS} a b": "b/b.tar was made with another model (bbbbbbbbbbbbbbbb) than a/a.tar (aaaaaaaaaaaaaaaa): give",
    f"{ON_PAIRS} a --resolution 64": "shorter side is 32 pixels, and the resolution is 64: give --resolution 32",
    "train --pretrained_model_name_or_path zero_snr --train_data_dir data": f"scheduler_config.json: {ZERO_SNR}",
    f"{SAMPLE} --rescale_betas_zero_snr": f"option --rescale_betas_zero_snr: {ZERO_SNR}",
    "export --model zero_snr --output out": ZERO_SNR,
    f"{RESUME} checkpoint-2 --output_dir lacking": "checkpoint-2/trainable.safetensors is missing",
    f"{RESUME} latest --output_dir other_step": "manifest.json has step 7, and the name of its folder says 2",
    f"{RESUME} checkpoint-2 --output_dir damaged": "checkpoint-2/optimizer.safetensors: not an intact safetensors",
    f"{SAMPLE} --model bad_shift": "bad_shift/d2f.json: d2f.shift must be a number from 0.001 to 1000, got wide",
    f"{SAMPLE} --model bad_prediction_type": "d2f.prediction_type must be epsilon, v_prediction, sample or flow_predi",
    "export --model bad_recommended_guidance --output out": "no usable d2f.recommended_guidance",
    "train --task depth --train_data_dir data --depth_scale 1 --init_lora in4.safetensors": CHANNELS.format(4, 8),
    f"{SAMPLE} --lora in8.safetensors": CHANNELS.format(8, 4),
    f"{DEPTH} --model eight --lora in4_depth.safetensors": CHANNELS.format(4, 8),
    "pairs --train_data_dir data --output_dir out --model eight": "have 4: give a text-to-image model",
    "evaluate --model eight --straightness --prompts a": "have 4: add --task depth for a model of depth, or give a",
    f"{SAMPLE} --model eight": "have 4: add --task depth for a model of depth, or --image for InstructPix2Pix, or",
    f"{DEPTH} --model miniature": "miniature is a text-to-image model, which sees no image",
    "export --output out --lora in8.safetensors": CHANNELS.format(8, 4),
    "export --model eight --components unet --output out --lora in4.safetensors": CHANNELS.format(4, 8),
}


def test_files_that_do_not_fit_are_refused_without_torch_and_nothing_is_written(files: Path) -> None:
    before = sorted(files.rglob("*"))
    code = """
import contextlib, io, json, sys
from d2f_fast.commands.main import main
from d2f_fast.export.to_onnx import main as export
for line in sys.argv[1:]:
    command, *options = line.split()
    with contextlib.redirect_stderr(io.StringIO()) as error:
        code = export(options) if command == "export" else main([command, *options])
    print(json.dumps([line, code, "torch" in sys.modules, error.getvalue()]))
"""
    done = subprocess.run([sys.executable, "-c", code, *REFUSALS], cwd=files, capture_output=True, text=True)
    found = {line: rest for line, *rest in map(json.loads, done.stdout.splitlines())}
    assert found.keys() == REFUSALS.keys(), done.stderr
    for line, (code, has_torch, error) in found.items():
        assert REFUSALS[line] in error and error.count("\n") == 1, (line, error)
        assert code == 2 and not has_torch, line
    assert sorted(files.rglob("*")) == before
