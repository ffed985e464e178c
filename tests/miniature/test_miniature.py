"""Test the miniature as its users load it: a stock pipeline folder in the package."""

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from d2f_fast.evaluation.accuracy import corner_colours
from d2f_fast.miniature import MINIATURE, emoji


def generate(pipe: StableDiffusionPipeline, caption: str, seed: int, steps: int = 2) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    return pipe(caption, num_inference_steps=steps, generator=generator, output_type="np").images[0]


def test_loaded_pipeline_equals_the_stock_pipeline_of_its_folder(pipe: StableDiffusionPipeline) -> None:
    stock = StableDiffusionPipeline.from_pretrained(MINIATURE, dtype=torch.float32, local_files_only=True)
    stock.set_progress_bar_config(disable=True)
    first = generate(stock, "a dog on a red background", seed=3)
    assert first.shape == (emoji.SIZE, emoji.SIZE, 3)
    assert np.array_equal(first, generate(pipe, "a dog on a red background", seed=3))
    assert not np.array_equal(first, generate(pipe, "a dog on a red background", seed=4))


def test_pipeline_has_the_parts_and_noise_schedule_of_stable_diffusion(pipe: StableDiffusionPipeline) -> None:
    assert all(p.dtype == torch.float32 for p in (*pipe.unet.parameters(), *pipe.vae.parameters()))
    assert pipe.safety_checker is None and pipe.feature_extractor is None
    assert pipe.scheduler.config.prediction_type == "epsilon"
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    np.testing.assert_allclose(pipe.scheduler.alphas_cumprod, np.cumprod(1 - betas), rtol=1e-4)


def test_generated_background_has_the_captioned_colour(pipe: StableDiffusionPipeline) -> None:
    images = [
        generate(pipe, f"a teacup without handle on a {c} background", seed=0, steps=10) for c in emoji.BACKGROUNDS
    ]
    found = corner_colours(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) * 2 - 1, emoji.background_palette())
    assert (found == torch.arange(len(emoji.BACKGROUNDS))).sum() >= 7


def test_shipped_weights_are_finite_and_half_precision() -> None:
    files = sorted(MINIATURE.parent.rglob("*.safetensors"))
    assert len(files) == 5
    for path in files:
        for key, tensor in load_file(path).items():
            if tensor.is_floating_point():
                assert tensor.dtype == torch.float16, f"{path}: {key}"
                assert tensor.isfinite().all(), f"{path}: {key}"


def test_package_is_small_and_holds_no_local_path() -> None:
    files = [path for path in MINIATURE.parent.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 16e6
    for path in MINIATURE.rglob("*config.json"):
        assert "_name_or_path" not in path.read_text(), path
