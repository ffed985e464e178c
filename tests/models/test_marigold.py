"""The stock pipeline for depth: its scheduler, its text, and models that it cannot hold."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, MarigoldDepthPipeline, StableDiffusionPipeline

from d2f_fast.errors import ModelError
from d2f_fast.models.base_model import BaseModel
from d2f_fast.models.configs import check_one_text_encoder
from d2f_fast.models.marigold import depth_scheduler, empty_text, marigold_pipeline, text_encoders_of


@pytest.fixture(scope="module")
def pipeline(tiny_folder: Path) -> Any:
    return StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)


def test_scheduler_has_the_noise_table_of_the_base_and_ends_at_clean_latents(pipeline: Any) -> None:
    scheduler = depth_scheduler(pipeline.scheduler)
    assert type(scheduler) is DDIMScheduler
    assert torch.equal(scheduler.alphas_cumprod, pipeline.scheduler.alphas_cumprod)
    assert scheduler.final_alpha_cumprod == 1 and not scheduler.config.clip_sample
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]


def test_text_is_what_the_stock_pipeline_makes_of_the_empty_prompt(tiny_folder: Path, tmp_path: Path) -> None:
    model = BaseModel.load(tiny_folder)
    model.see_images()
    assert model.context_images == 1
    own = empty_text(model.pipeline)
    made = marigold_pipeline(
        model.pipeline, model.unet, depth_scheduler(model.pipeline.scheduler), "disparity", 16, steps=2
    )
    made.set_progress_bar_config(disable=True)
    made.save_pretrained(tmp_path)
    loaded = MarigoldDepthPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded(torch.rand(1, 3, 12, 16)).prediction.shape == (1, 12, 16, 1)
    assert torch.equal(loaded.empty_text_embedding, own)
    config = loaded.config
    assert (config.prediction_type, config.scale_invariant, config.shift_invariant) == ("disparity", True, True)
    assert (config.default_denoising_steps, config.default_processing_resolution) == (2, 16)


def test_model_with_two_text_encoders_is_refused(tiny_xl: Any) -> None:
    with pytest.raises(ModelError, match="depth needs a model with one text encoder: give one of Stable Diffusion 1"):
        check_one_text_encoder(text_encoders_of(tiny_xl))
