"""`generate` against hand-written loops over the parts of stock pipelines."""

from typing import Any

import pytest
import torch
from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline
from PIL import Image

from d2f_fast.errors import RefusedInputError
from d2f_fast.sampling.generate import generate
from d2f_fast.sampling.scheduler import Diff2FlowScheduler

PROMPTS = ["ab", "cat"]


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_hand(
    pipe: StableDiffusionPipeline, size: int, steps: int, guidance_scale: float, negative_prompt: str, **options: Any
) -> list[Image.Image]:
    """Return square images of PROMPTS by a loop of one network call per condition and scheduler step."""
    scheduler = Diff2FlowScheduler.from_config(pipe.scheduler.config, **options)
    scheduler.set_timesteps(steps)
    count, side = len(PROMPTS), size // pipe.vae_scale_factor
    with torch.no_grad():
        positive, negative = pipe.encode_prompt(PROMPTS, "cpu", 1, True, [negative_prompt] * count)
        latents = torch.randn(count, 4, side, side, generator=seeded())
        for timestep in scheduler.timesteps:
            output = pipe.unet(latents, timestep, positive).sample
            if guidance_scale != 1:
                away = pipe.unet(latents, timestep, negative).sample
                output = away + guidance_scale * (output - away)
            latents = scheduler.step(output, timestep, latents).prev_sample
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return pipe.image_processor.postprocess(decoded)


def assert_alike(got: list[Image.Image], expected: list[Image.Image]) -> None:
    """Assert that images are the same up to one level of 255, which a sum in another order may cost."""
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.mode == "RGB" and ours.size == theirs.size
        levels = [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).int() for image in (ours, theirs)]
        assert (levels[0] - levels[1]).abs().max() <= 1
        assert levels[0].float().std() > 1  # the images are not blank


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "heun", "shift": 2.0},
        {"method": "midpoint", "flow_spacing": "trailing"},
        {"prediction_type": "v_prediction"},
        {"prediction_type": "flow_prediction", "shift": 0.5},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_images_equal_those_of_a_hand_written_loop(
    pipe: StableDiffusionPipeline, options: dict[str, Any], guidance_scale: float
) -> None:
    negative_prompt = "a" if guidance_scale > 1 else ""
    expected = by_hand(pipe, 24, 4, guidance_scale, negative_prompt, **options)
    got = generate(
        pipe,
        PROMPTS,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        height=24,
        width=24,
        generator=seeded(),
        **options,
    )
    assert_alike(got, expected)


def test_single_prompt_may_be_a_string(pipe: StableDiffusionPipeline) -> None:
    (one,), (listed,) = (generate(pipe, prompts, generator=seeded()) for prompts in ("ab", ["ab"]))
    assert one.tobytes() == listed.tobytes()


@pytest.mark.parametrize(("guidance_scale", "batch"), [(0, 2), (1.0, 2), (3.0, 4)])
def test_guidance_scale_of_0_or_1_evaluates_the_prompts_alone(
    pipe: StableDiffusionPipeline, guidance_scale: float, batch: int
) -> None:
    batches: list[int] = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, arguments: batches.append(len(arguments[0])))
    generate(pipe, PROMPTS, num_inference_steps=3, guidance_scale=guidance_scale)
    hook.remove()
    assert batches == [batch] * 3


@pytest.mark.parametrize(
    ("given", "size"),
    [({}, (16, 16)), ({"height": 32}, (16, 32)), ({"width": 24}, (24, 16)), ({"height": 8, "width": 24}, (24, 8))],
    ids=str,
)
def test_missing_height_or_width_is_that_of_the_pipeline(
    pipe: StableDiffusionPipeline, given: dict[str, int], size: tuple[int, int]
) -> None:
    (image,) = generate(pipe, "ab", num_inference_steps=1, **given)
    assert image.size == size


def test_network_that_is_not_square_completes_a_size_by_its_own(pipe: StableDiffusionPipeline) -> None:
    own = pipe.unet.config.sample_size
    pipe.unet.register_to_config(sample_size=(8, 16))
    try:
        wide = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
        sizes = [generate(wide, "ab", num_inference_steps=1, **given)[0].size for given in ({}, {"height": 24})]
    finally:
        pipe.unet.register_to_config(sample_size=own)
    assert sizes == [(32, 16), (32, 24)]


def test_missing_shift_is_that_of_the_scheduler(pipe: StableDiffusionPipeline) -> None:
    def image(shift: float | None) -> bytes:
        return generate(pipe, "ab", generator=seeded(), shift=shift)[0].tobytes()

    assert image(None) == image(1.0) != image(3.0)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert image(None) == image(3.0) != image(1.0)


def test_pipeline_has_its_own_scheduler_after_success_and_after_an_error(
    pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = pipe.scheduler
    generate(pipe, "ab", num_inference_steps=1)
    assert pipe.scheduler is own
    with pytest.raises(RefusedInputError):
        generate(pipe, "ab", num_inference_steps=0)
    assert pipe.scheduler is own

    def fail(*_: object, **__: object) -> None:
        assert isinstance(pipe.scheduler, Diff2FlowScheduler)
        raise RuntimeError("inside the network")

    monkeypatch.setattr(pipe.unet, "forward", fail)
    with pytest.raises(RuntimeError, match="inside the network"):
        generate(pipe, "ab")
    assert pipe.scheduler is own


@pytest.mark.parametrize("negative_prompt", ["", "a"])
def test_sdxl_images_equal_its_own_call_with_the_flow_scheduler(tiny_xl: Any, negative_prompt: str) -> None:
    tiny_xl.set_progress_bar_config(disable=True)
    own = tiny_xl.scheduler
    got = generate(tiny_xl, PROMPTS, negative_prompt=negative_prompt, width=24, generator=seeded(), method="heun")
    assert tiny_xl.scheduler is own
    tiny_xl.scheduler = Diff2FlowScheduler.from_config(own.config, method="heun")
    expected = tiny_xl(
        PROMPTS,
        num_inference_steps=4,
        guidance_scale=3.0,
        negative_prompt=[negative_prompt] * 2 if negative_prompt else None,  # None is zeros, and "" is not
        height=16,
        width=24,
        generator=seeded(),
    ).images
    assert [image.tobytes() for image in got] == [image.tobytes() for image in expected]
    assert {image.size for image in got} == {(24, 16)}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"height": 17}, "height must be a positive multiple of 8, got 17"),
        ({"width": 12}, "width must be a positive multiple of 8, got 12"),
        ({"height": 0}, "height must be a positive multiple of 8, got 0"),
        ({"guidance_scale": 0.5}, "guidance_scale must be 1 or 0, which use the prompt alone .* or above 1, got 0.5"),
        ({"guidance_scale": -1}, "guidance_scale must be 1 or 0, .* got -1"),
        ({"num_inference_steps": 1, "method": "heun"}, "method heun needs at least 2 num_inference_steps"),
        ({"negative_prompt": "c", "guidance_scale": 1}, "negative_prompt has no effect with guidance_scale 1: leave"),
        ({"negative_prompt": "c", "guidance_scale": 0}, "negative_prompt has no effect with guidance_scale 0: leave"),
        ({"num_inference_steps": 0}, "steps must be at least 1, got 0"),
        ({"shift": -1.0}, "shift must be positive, got -1.0"),
        ({"method": "rk4"}, r"method must be one of \('euler', 'midpoint', 'heun'\), got 'rk4'"),
        ({"flow_spacing": "trailing", "num_inference_steps": 1500}, "steps must be 1 to 1000 with trailing spacing"),
        ({"flow_spacing": "trailing", "prediction_type": "flow_prediction"}, 'spacing must be "uniform" for flow_pred'),
        ({"prediction_type": "velocity"}, "prediction_type must be one of"),
    ],
    ids=lambda options: str(options) if isinstance(options, dict) else "",
)
def test_unusable_options_are_refused(pipe: StableDiffusionPipeline, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RefusedInputError, match=sentence):
        generate(pipe, "ab", **options)


def test_scheduler_without_a_noise_table_is_refused(pipe: StableDiffusionPipeline) -> None:
    pipe.scheduler = EDMEulerScheduler()
    with pytest.raises(RefusedInputError, match="the configuration has no beta_schedule"):
        generate(pipe, "ab")
