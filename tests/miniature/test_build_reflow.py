"""Test the captions of the reflow LoRA's pairs, and the shipped LoRA in other programs' hands."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from d2f_fast.lora.read import read_lora
from d2f_fast.miniature import MINIATURE, REFLOW_LORA, emoji
from d2f_fast.miniature.build_reflow import REPEATS_WITHOUT_COLOUR, UPDATE_SCALE, prompts, write_shipped
from d2f_fast.sampling.scheduler import Diff2FlowScheduler

PROMPTS = ["an owl on a blue background", "a clock on a red background", "a tulip"]
SIGMA_MAX = 14.614
# A program that has never heard of this package: it reads the sigmas in the file's header.
STOCK = """
import sys
import numpy as np
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from safetensors import safe_open

model, lora, output, first, *prompts = sys.argv[1:]
pipe = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32, local_files_only=True)
pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
pipe.load_lora_weights(lora)
with safe_open(lora, "pt") as file:
    sigmas = [float(sigma) for sigma in file.metadata()["d2f.recommended_sigmas"].split(",")]
for name, start in (("listed", sigmas[0]), ("schedule", float(first))):
    noise = torch.randn(len(prompts), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"sigmas": [start, *sigmas[1:]], "guidance_scale": 1.0, "output_type": "np"}
    np.save(output + f"/{name}.npy", pipe(prompts, latents=noise, **options).images)
assert "d2f_fast" not in sys.modules
print(len(sigmas) - 1)
"""


def test_every_caption_gets_a_pair_and_those_without_a_colour_get_more_in_a_fixed_order() -> None:
    captions, names, each = prompts(), len(emoji.names()), len(emoji.BACKGROUNDS) + 1
    first, more = captions[: names * each], captions[names * each :]
    assert len(set(first)) == len(first)
    assert captions == prompts() and first[:1000] != sorted(first)[:1000]
    without = {caption for caption in first if " background" not in caption}
    assert len(without) == names
    assert Counter(more) == dict.fromkeys(without, REPEATS_WITHOUT_COLOUR) and more != sorted(more)


def test_update_is_multiplied_by_the_constant_when_the_lora_is_written(tmp_path: Path) -> None:
    write_shipped(REFLOW_LORA, tmp_path / "again.safetensors")
    before, after = read_lora(REFLOW_LORA), read_lora(tmp_path / "again.safetensors")
    assert after.header == before.header and after.layers.keys() == before.layers.keys()
    for name in ("conv_in", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"):
        (key,) = (key for key in before.layers if key.endswith(name))
        weight = torch.zeros(before.layers[key].up.shape[0], before.layers[key].down[0].numel())
        old, new = before.layers[key].delta(weight), after.layers[key].delta(weight)
        torch.testing.assert_close(new, UPDATE_SCALE * old, rtol=1e-3, atol=1e-4)


def test_shipped_reflow_lora_is_small_and_says_how_to_sample_it() -> None:
    header = read_lora(REFLOW_LORA).header
    assert REFLOW_LORA.stat().st_size < 1.5e6
    assert header["d2f.recommended_guidance"] == "1.0" and header["d2f.recommended_steps"] == "2"
    assert header["d2f.data"] == "pairs" and header["d2f.pairs_guidance"] == "2"


@pytest.fixture
def reflow(pipe: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """Return the miniature with the reflow LoRA and this package's scheduler."""
    from d2f_fast.lora.merge import fuse_adapter

    fuse_adapter(pipe, REFLOW_LORA, 1.0)
    pipe.scheduler = Diff2FlowScheduler.from_config(pipe.scheduler.config)
    return pipe


def sample(pipe: StableDiffusionPipeline, **options: object) -> np.ndarray:
    noise = torch.randn(len(PROMPTS), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return pipe(PROMPTS, latents=noise, guidance_scale=1.0, output_type="np", **options).images


@pytest.mark.slow
def test_stock_pipeline_and_onnx_export_generate_the_images_of_this_package(
    reflow: StableDiffusionPipeline, tmp_path: Path
) -> None:
    from d2f_fast.export.folder import export_folder
    from d2f_fast.export.inference import OnnxPipeline
    from d2f_fast.export.options import ExportOptions

    command = [sys.executable, "-c", STOCK, *map(str, (MINIATURE, REFLOW_LORA, tmp_path, SIGMA_MAX)), *PROMPTS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2"]
    # From a sigma of the schedule both take the same steps.
    schedule = np.load(tmp_path / "schedule.npy")
    assert np.abs(schedule - sample(reflow, sigmas=[SIGMA_MAX, 1.0, 0.0])).max() <= 1e-4
    # A stock step from the listed first sigma stands for a step from pure noise, to 0.2 % of the noise.
    even = sample(reflow, num_inference_steps=2)
    listed = np.load(tmp_path / "listed.npy")
    assert np.abs(listed - even).max() <= 1 / 255 < np.abs(schedule - even).max()

    options = ExportOptions(output=str(tmp_path / "onnx"), lora=(str(REFLOW_LORA),), steps="2")
    report = export_folder(options)
    assert (report["recommended_guidance"], report["recommended_steps"]) == (1.0, 2)
    noise = torch.randn(len(PROMPTS), 4, 8, 8, generator=torch.Generator().manual_seed(0)).numpy()
    images = OnnxPipeline(tmp_path / "onnx", form="folder")(PROMPTS, steps=2, noise=noise)
    got = np.stack([np.asarray(image, np.float32) for image in images]) / 255
    assert np.abs(got - even).max() <= 1 / 255
    assert even.std() > 0.1
