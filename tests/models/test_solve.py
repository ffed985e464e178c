"""Images by solvers that the stock pipelines lack, the states on the way, and the way back to the noise."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from d2f_fast.errors import RefusedInputError
from d2f_fast.miniature import load_miniature
from d2f_fast.models.base_model import BaseModel, to_pil
from d2f_fast.models.prompt_velocity import prompt_velocity
from d2f_fast.models.solve import Sampling, generate_images, invert_images
from d2f_fast.sampling.adaptive import sample_flow_adaptive
from d2f_fast.sampling.integrate import sample_flow
from d2f_fast.sampling.solver_options import SolverOptions

PROMPTS = ["ab", "c"]
SMALL = Sampling(height=16, width=24)


@pytest.fixture
def model(pipeline: Any) -> BaseModel:
    pipeline.set_progress_bar_config(disable=True)
    return BaseModel(pipeline)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def difference(first: list[Image.Image], second: list[Image.Image]) -> int:
    """Return the largest difference of two lists of images, of 255."""
    pairs = zip(first, second, strict=True)
    return max(int(np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max()) for a, b in pairs)


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun"])
@pytest.mark.parametrize("options", [{}, {"negative_prompt": "d"}, {"guidance_scale": 1.0}], ids=str)
def test_looking_on_the_way_leaves_the_images_as_they_are(
    model: BaseModel, method: Any, options: dict[str, Any]
) -> None:
    sampling = dataclasses.replace(SMALL, method=method, scheduler_options={"shift": 2.0}, **options)
    states: list[tuple[int, float, list[Image.Image]]] = []
    watched = generate_images(model, PROMPTS, sampling, seeded(), on_state=lambda *state: states.append(state))
    plain = generate_images(model, PROMPTS, sampling, seeded())
    assert difference(watched, plain) <= 1 and plain[0].size == (24, 16)
    assert [number for number, _, _ in states] == [0, 1, 2, 3, 4]
    assert [t for _, t, _ in states] == pytest.approx(model.flow.times(4, shift=2.0).tolist())
    assert difference(states[-1][2], watched) == 0 and difference(states[0][2], watched) > 1
    noise = torch.randn(2, 4, 8, 12, generator=seeded())
    assert difference(states[0][2], to_pil(model.decode(noise))) == 0


def test_solver_and_interval_reach_the_velocity(model: BaseModel) -> None:
    noise = torch.randn(2, 4, 8, 12, generator=seeded())
    solver = SolverOptions((0.3, 0.9))
    got = generate_images(model, PROMPTS, dataclasses.replace(SMALL, method="rk4", solver=solver), seeded())
    with torch.no_grad():
        velocity = prompt_velocity(model, model.flow, PROMPTS, 16, 24, 3.0, None, (0.3, 0.9))
        want = sample_flow(velocity, noise, times=model.flow.times(4), method="rk4")
    assert difference(got, to_pil(model.decode(want))) == 0
    everywhere = generate_images(model, PROMPTS, dataclasses.replace(SMALL, method="rk4"), seeded())
    assert difference(got, everywhere) > 0
    assert (
        difference(
            generate_images(model, PROMPTS, SMALL, noise=noise), generate_images(model, PROMPTS, SMALL, seeded())
        )
        <= 1
    )


def test_unusable_options_are_refused(model: BaseModel) -> None:
    image = Image.new("RGB", (16, 16))
    with pytest.raises(RefusedInputError, match=r"noise must have shape \[2, 4, 8, 12\] for 2 prompts of 24 x 16 pix"):
        generate_images(model, PROMPTS, SMALL, noise=torch.zeros(1, 4, 8, 8))
    with pytest.raises(RefusedInputError, match="method euler_maruyama adds noise and cannot be inverted: give"):
        invert_images(model, [image], ["a"], dataclasses.replace(SMALL, method="euler_maruyama"))
    with pytest.raises(RefusedInputError, match="give one prompt for each image, got 2 for 1"):
        invert_images(model, [image], PROMPTS, SMALL)
    with pytest.raises(RefusedInputError, match="height must be a positive multiple of 8, got 17"):
        generate_images(model, PROMPTS, dataclasses.replace(SMALL, method="rk4", height=17))


def test_noise_of_an_image_leads_to_it_again(model: BaseModel) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    # The flow of random weights that predict noise is stiff; those that predict the flow are as smooth as real ones.
    options = {"scheduler_options": {"prediction_type": "flow_prediction"}}
    sampling = Sampling("rk4", num_inference_steps=8, guidance_scale=1.0, height=16, width=16, **options)
    noise, error = invert_images(model, [Image.fromarray(pixels)], ["a"], sampling)
    assert noise.shape == (1, 4, 8, 8) and error < 1e-2
    again = generate_images(model, ["a"], sampling, noise=noise)
    fitted = Image.fromarray(pixels).resize((16, 16), Image.Resampling.LANCZOS)
    values = torch.from_numpy(np.asarray(fitted, np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    latents = model.scale_latents(model.encode_images(values)["mean"])
    assert difference(again, to_pil(model.decode(latents))) <= 3


@pytest.mark.slow
def test_miniature_is_inverted_to_a_thousandth_and_its_solvers_agree(tmp_path: Path) -> None:
    model = BaseModel(load_miniature())
    model.pipeline.set_progress_bar_config(disable=True)
    prompts = ["an owl on a blue background", "a red apple on a white background"]
    images = generate_images(model, prompts, Sampling(num_inference_steps=25), seeded())
    sampling = Sampling("rk4", num_inference_steps=50, guidance_scale=1.0)
    noise, error = invert_images(model, images, prompts, sampling)
    print("round trip", error)
    assert error <= 1e-3
    with torch.no_grad():
        velocity = prompt_velocity(model, model.flow, prompts, 32, 32, 1.0)
        fixed = sample_flow(velocity, noise, 250, method="rk4")
        adaptive = sample_flow_adaptive(velocity, noise, rtol=1e-5)
        print("adaptive", float((adaptive - fixed).norm() / fixed.norm()))
        assert (adaptive - fixed).norm() <= 1e-3 * fixed.norm()
