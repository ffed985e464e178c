"""Stable Diffusion 1.5 and SDXL of full size, with random weights, are trained, saved and reloaded.

The peak of each process is that of its physical memory, in which the pages of mapped files count too.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from d2f_fast.files.tensor_stream import LazyTensor, write_tensor_stream
from d2f_fast.models.single_file import family_table

GIB = 2**30
CLIENT, RUN = (Path(__file__).parent / name for name in ("full_size_client.py", "full_size_run.py"))
# Of the memory that is no page of a file. Computed: bfloat16 weights of the UNet, float32 weights of the other parts
# (2.5 and 8.6 GiB), and the activations of one image, libraries and float32 products of the tests beside them.
OWN_LIMITS_GIB = {"sd1": 5.0, "sdxl": 14.0}
LIMIT_GIB = 24.0


def write_model(folder: Path, family: Any, tokenizer: Path) -> None:
    """Write a pipeline folder of a family in float16, whose matrices repeat one block of normal random numbers."""
    table = family_table(family)
    with torch.device("meta"):
        parts: dict[str, nn.Module] = {
            "unet": UNet2DConditionModel.from_config(table["unet"]),
            "vae": AutoencoderKL.from_config(table["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**table["text_encoder"])),
        }
        if "text_encoder_2" in table:
            parts["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**table["text_encoder_2"]))
    block = torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    for name, part in parts.items():
        (folder / name).mkdir(parents=True)
        config = dict(table[name]) | ({"transformers_version": "4.46.0"} if "text" in name else {})
        (folder / name / "config.json").write_text(json.dumps(config))
        stem = "model" if "text" in name else "diffusion_pytorch_model"
        prefix = "text_model." if "text" in name else ""
        tensors = {
            key if key.startswith((prefix, "text_projection.")) else prefix + key: _tensor(key, value, block)
            for key, value in part.state_dict().items()
            if not key.endswith("position_ids")
        }
        write_tensor_stream(folder / name / f"{stem}.safetensors", tensors, {"format": "pt"})
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(table["scheduler"]))
    (folder / "model_index.json").write_text(json.dumps(table["model_index"]))
    for name in table["pad_tokens"]:
        CLIPTokenizer.from_pretrained(tokenizer).save_pretrained(folder / name)


def _tensor(key: str, value: Tensor, block: Tensor) -> LazyTensor:
    """Return a weight of a norm as 1, a bias as 0, and a matrix as random numbers that keep the size of its input."""
    shape = tuple(value.shape)

    def load() -> Tensor:
        if len(shape) < 2:
            return torch.full(shape, float(key.endswith(".weight")), dtype=torch.float16)
        scale = 0.5 * value[0].numel() ** -0.5
        repeated = (block * scale).half().repeat(-(-value.numel() // block.numel()))
        return repeated[: value.numel()].reshape(shape)

    return LazyTensor(shape, torch.float16, load)


def run(arguments: list[Any]) -> tuple[str, float]:
    """Run Python with arguments, and return what it prints and the seconds that it took."""
    started = time.monotonic()
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, time.monotonic() - started


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_full_size_model_is_trained_saved_and_reloaded(family: str, tiny_folder: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "model", family, tiny_folder / "tokenizer")
    (tmp_path / "images").mkdir()
    for number in range(2):
        Image.new("RGB", (256, 256), (80 * number, 40, 200)).save(tmp_path / "images" / f"{number}.png")
        (tmp_path / "images" / f"{number}.txt").write_text("ab")
    train = [RUN, "train", "--train_data_dir", tmp_path / "images", "--output_dir", tmp_path / "run"]
    train += ["--pretrained_model_name_or_path", tmp_path / "model", "--mixed_precision", "bf16", "--resolution", 256]
    train += ["--train_batch_size", 1, "--max_train_steps", 2, "--rank", 4, "--learning_rate", 1e-3, "--ema_decay", 0]
    output, seconds = run(train)
    own, peak = (int(number) * 1024 / GIB for number in output.splitlines()[-1].split())
    print(f"\n{family}: training of 2 steps took {seconds:.0f} s, peak {peak:.2f} GiB, {own:.2f} GiB without files")
    assert own < OWN_LIMITS_GIB[family] and peak < LIMIT_GIB
    single = tmp_path / "merged.safetensors"
    convert = [RUN, "convert", tmp_path / "model", single, "--lora", tmp_path / "run", "--dtype", "fp16"]
    output, seconds = run(convert)
    own, peak = (int(number) * 1024 / GIB for number in output.splitlines()[-1].split())
    print(f"{family}: conversion to a single file took {seconds:.0f} s, peak {peak:.2f} GiB")
    output, seconds = run([CLIENT, tmp_path / "model", tmp_path / "run", single])
    peft, kohya, difference, error, moved = json.loads(output.splitlines()[-1])
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / GIB
    print(f"{family}: reloading took {seconds:.0f} s; largest peak of all {peak:.2f} GiB; {peft} and {kohya} layers;")
    print(f"{family}: files differ by {difference:.1e}, single file by {error:.1e}; smallest update {moved:.1e}")
    assert peft == kohya > 100
    assert moved > 0
    assert difference <= 1e-6
    assert error <= 2**-11
