"""What a model is taken for: read from its scheduler, overridden by options, and stated with its source."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler

from d2f_fast.errors import ModelError, RefusedInputError
from d2f_fast.models.base_model import BaseModel
from d2f_fast.models.facts import same_schedule, state_facts
from d2f_fast.models.load import load_pipeline
from d2f_fast.models.options import ModelOptions
from d2f_fast.models.save import stock_flow_scheduler

TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def facts_of(folder: Path, **options: Any) -> str:
    return str(BaseModel.load(folder, options=ModelOptions(**options)).facts)


def test_folder_states_its_facts_with_their_source(folder: Path) -> None:
    config = folder / "scheduler" / "scheduler_config.json"
    stated = json.loads(config.read_text()) | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    config.write_text(json.dumps(stated))
    assert facts_of(folder) == (
        "a UNet other than SD1.x, SD2.x and SDXL, v-prediction (scheduler_config.json),"
        " zero terminal SNR (scheduler_config.json)"
    )
    del stated["prediction_type"], stated["rescale_betas_zero_snr"]
    config.write_text(json.dumps(stated))
    assert facts_of(folder) == (
        "a UNet other than SD1.x, SD2.x and SDXL, ε-prediction (default of diffusers' DDIMScheduler),"
        " no zero terminal SNR (default of diffusers' DDIMScheduler)"
    )


def test_options_come_before_the_scheduler_configuration(folder: Path) -> None:
    model = BaseModel.load(folder, options=ModelOptions("v_prediction", True))
    assert str(model.facts) == (
        "a UNet other than SD1.x, SD2.x and SDXL, v-prediction (option --prediction_type),"
        " zero terminal SNR (option --rescale_betas_zero_snr)"
    )
    assert model.alignment.prediction_type == "v_prediction" and model.alignment.schedule.zero_terminal_snr
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rescale_betas_zero_snr": True}))
    with pytest.raises(ModelError, match="zero terminal SNR"):
        BaseModel.load(folder)
    assert facts_of(folder, rescale_betas_zero_snr=False).endswith(
        "no zero terminal SNR (option --no_rescale_betas_zero_snr)"
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_loaded_pipeline_is_of_the_given_prediction_type(tiny_folder: Path, prediction_type: Any) -> None:
    for model in (tiny_folder, "miniature"):
        pipeline = load_pipeline(model, options=ModelOptions(prediction_type))
        own = load_pipeline(model)
        assert pipeline.scheduler.config.prediction_type == prediction_type
        assert type(pipeline.scheduler) is type(own.scheduler)
        assert torch.equal(pipeline.scheduler.alphas_cumprod, own.scheduler.alphas_cumprod)


def test_pipeline_object_takes_the_options_too(pipeline: Any) -> None:
    scheduler = pipeline.scheduler
    try:
        model = BaseModel(pipeline, ModelOptions("v_prediction"))
        assert model.alignment.prediction_type == "v_prediction"
        assert "no zero terminal SNR (the pipeline's scheduler)" in str(model.facts)
    finally:
        pipeline.scheduler = scheduler


def test_zero_terminal_snr_gives_a_class_without_it_the_table_of_diffusers() -> None:
    pndm = PNDMScheduler(**TABLE, skip_prk_steps=True, steps_offset=1)
    got = same_schedule(pndm, PNDMScheduler, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    expected = DDIMScheduler(**TABLE, rescale_betas_zero_snr=True)
    assert isinstance(got, EulerDiscreteScheduler) and got.config.prediction_type == "v_prediction"
    # Euler stores 2**-24 in place of the last zero, so that its own sigmas stay finite.
    torch.testing.assert_close(got.alphas_cumprod, expected.alphas_cumprod, rtol=0, atol=2**-24)


def test_entry_that_a_class_ignores_does_not_reach_another_class() -> None:
    ignored = PNDMScheduler.from_config({**TABLE, "rescale_betas_zero_snr": True})
    kept = same_schedule(ignored, PNDMScheduler, prediction_type="v_prediction")
    assert isinstance(kept, PNDMScheduler) and "rescale_betas_zero_snr" not in kept.config


def test_default_that_is_the_table_of_the_base_stays_in_another_class() -> None:
    linear = DDIMScheduler()  # its table lies in its defaults
    moved = same_schedule(linear, EulerDiscreteScheduler, timestep_spacing="trailing")
    torch.testing.assert_close(moved.alphas_cumprod, linear.alphas_cumprod)
    assert moved.config.timestep_spacing == "trailing"


def test_shift_by_image_size_that_is_ignored_is_named(pipeline: Any) -> None:
    scheduler = pipeline.scheduler
    try:
        for dynamic in (True, False):
            pipeline.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=dynamic)
            line = str(BaseModel(pipeline).facts)
            assert line.endswith(", its shift by image size (use_dynamic_shifting) is ignored") == dynamic
    finally:
        pipeline.scheduler = scheduler


def test_family_is_that_of_the_network(pipeline: Any, tiny_xl: Any) -> None:
    config = dict(pipeline.unet.config)
    for width, name in ((768, "SD1.x"), (1024, "SD2.x"), (2048, "a UNet other than SD1.x, SD2.x and SDXL")):
        pipeline.unet.register_to_config(cross_attention_dim=width)
        assert state_facts(pipeline, ModelOptions(), "x").family == name
    pipeline.unet.register_to_config(**config)
    tiny_xl.unet.register_to_config(cross_attention_dim=2048)
    assert state_facts(tiny_xl, ModelOptions(), "x").family == "SDXL"
    assert str(BaseModel(load_pipeline("miniature")).facts).startswith("the miniature, ε-prediction (")


@pytest.mark.parametrize("stated", [True, False])
def test_noise_schedule_of_a_folder_that_predicts_the_flow_is_refused(folder: Path, stated: bool) -> None:
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "flow_prediction"}))
    with pytest.raises(RefusedInputError, match="rescale_betas_zero_snr has no effect with a model that predicts the"):
        facts_of(folder, rescale_betas_zero_snr=stated)


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler(), stock_flow_scheduler(1000, 3.0)], ids=str)
def test_rectified_flow_that_is_read_as_diffusion_gets_the_table_of_stable_diffusion(
    pipeline: Any, scheduler: Any
) -> None:
    pipeline.scheduler = scheduler
    model = BaseModel(pipeline, ModelOptions(prediction_type="v_prediction"))
    expected = DDIMScheduler(**TABLE).alphas_cumprod
    torch.testing.assert_close(model.pipeline.scheduler.alphas_cumprod, expected)
    assert model.flow.prediction_type == "v_prediction"
    assert BaseModel(pipeline).facts.prediction_type == "v_prediction"
