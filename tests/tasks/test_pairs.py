"""Pairs of noise and latents, compared with what stock pipelines generate from the same noise."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from d2f_fast.models.base_model import BaseModel
from d2f_fast.sampling.integrate import sample_flow
from d2f_fast.sampling.multistep import sample_multistep
from d2f_fast.sampling.scheduler import Diff2FlowScheduler
from d2f_fast.tasks.pairs import PairGenerator, PairPlan, evaluations, solve

MakePlan = Callable[..., PairPlan]
MakeGenerator = Callable[..., PairGenerator]


def by_pipeline(pipeline: Any, noise: np.ndarray, prompt: str, guidance: float, **options: Any) -> Any:
    """Return the latents, in the scale of the pipeline, that a stock pipeline makes of a noise in two Euler steps."""
    pipeline.set_progress_bar_config(disable=True)
    stock = pipeline.scheduler
    pipeline.scheduler = Diff2FlowScheduler.from_config(stock.config)
    try:
        return pipeline(
            [prompt],
            num_inference_steps=2,
            guidance_scale=guidance,
            latents=torch.from_numpy(noise)[None],
            output_type="latent",
            **options,
        ).images[0]
    finally:
        pipeline.scheduler = stock


@pytest.mark.parametrize(
    ("options", "negative"),
    [
        ({"guidance_scale": 3.0}, None),
        ({"guidance_scale": 1.0}, None),
        ({"guidance_scale": 2.0, "guidance_scale_max": 8.0}, None),
        ({"negative_prompt": "xyz"}, ["xyz"]),
        ({"height": 24, "width": 32}, None),
    ],
    ids=str,
)
def test_latents_are_those_that_the_stock_pipeline_makes_of_the_noise(
    options: dict[str, Any], negative: Any, make_generator: MakeGenerator, tiny_model: BaseModel
) -> None:
    first, second = make_generator(**options, pairs_per_shard=2).shard(2)
    assert (first.key, second.key) == ("000000004", "000000005")
    for record in (first, second) if "guidance_scale_max" in options else (second,):
        guidance = float(str(record.meta["guidance_scale"]))
        size = {"height": record.latents.shape[1] * 2, "width": record.latents.shape[2] * 2}
        prompts = {"negative_prompt": negative, **size}
        expected = by_pipeline(tiny_model.pipeline, record.noise, record.prompt, guidance, **prompts)
        assert np.abs(record.latents - expected.numpy()).max() < 1e-4


def test_sdxl_pairs_have_its_sizes_and_its_own_empty_prompt(tiny_xl: Any, make_plan: MakePlan) -> None:
    model = BaseModel(tiny_xl)
    for options in ({"guidance_scale": 2.5}, {"guidance_scale": 1.0}):
        (record, *_) = PairGenerator(model, model.flow, make_plan(**options, num_pairs=1), {}).shard(0)
        size = {"height": 16, "width": 16}
        expected = by_pipeline(tiny_xl, record.noise, "ab", options["guidance_scale"], **size)
        assert np.abs(record.latents - expected.numpy()).max() < 1e-4


def test_multistep_solver_is_that_of_the_sampling() -> None:
    noise, times = torch.randn(2, 4, 8, 8), torch.linspace(0, 1, 4)

    def velocity(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.sin(3 * x_t + t)

    assert torch.equal(solve("dpmsolver++", velocity, noise, times), sample_multistep(velocity, noise, times))
    assert torch.equal(solve("heun", velocity, noise, times), sample_flow(velocity, noise, 3, method="heun"))


def test_noise_is_that_of_the_seed_in_the_meta_in_the_numbers_that_are_stored(make_generator: MakeGenerator) -> None:
    for dtype in ("float16", "float32"):
        for record in make_generator(dtype=dtype).shard(0):
            generator = torch.Generator().manual_seed(int(str(record.meta["seed"])))
            expected = torch.randn(4, 8, 8, generator=generator).to(getattr(torch, dtype))
            assert record.noise.dtype == record.latents.dtype == dtype
            assert np.array_equal(record.noise, expected.numpy())


def test_pairs_depend_on_their_number_alone(make_generator: MakeGenerator) -> None:
    generator = make_generator(guidance_scale_max=6.0)
    whole = {record.key: record for number in (0, 1, 2) for record in generator.shard(number)}
    again = {record.key: record for number in (2, 0) for record in make_generator(guidance_scale_max=6.0).shard(number)}
    assert sorted(whole) == [f"{i:09d}" for i in range(10)] and len(again) == 6
    for key, record in again.items():
        assert np.array_equal(record.latents, whole[key].latents) and np.array_equal(record.noise, whole[key].noise)
        assert record.meta == whole[key].meta
    seeds = {record.meta["seed"] for record in whole.values()}
    assert len(seeds) == 10 and len({record.noise.tobytes() for record in whole.values()}) == 10
    assert [record.prompt for record in whole.values()] == [("ab", "c", "de")[i % 3] for i in range(10)]


def test_meta_says_how_each_pair_was_made(make_generator: MakeGenerator) -> None:
    (*_, last) = make_generator(guidance_scale=2.0, guidance_scale_max=5.0).shard(2)
    assert 2 <= last.meta["guidance_scale"] <= 5  # type: ignore[operator]
    assert dict(last.meta) == {
        "index": 9,
        "seed": last.meta["seed"],
        "guidance_scale": last.meta["guidance_scale"],
        "guidance_scale_range": [2.0, 5.0],
        "steps": 2,
        "solver": "euler",
        "height": 16,
        "width": 16,
        "model": "m",
    }


def test_guidance_scales_fill_their_range(make_plan: MakePlan) -> None:
    plan = make_plan(guidance_scale=2.0, guidance_scale_max=6.0)
    scales = np.array([plan.guidance(i) for i in range(2000)])
    assert scales.min() >= 2 and scales.max() <= 6
    assert abs(scales.mean() - 4) < 0.1 and abs(scales.std() - 4 / 12**0.5) < 0.05
    assert [make_plan(seed=1, guidance_scale=2.0, guidance_scale_max=6.0).guidance(i) for i in range(3)] != [
        *scales[:3]
    ]
    assert make_plan(guidance_scale=3.5).guidance(7) == 3.5


def test_images_are_those_of_the_stored_latents(make_generator: MakeGenerator, tiny_model: BaseModel) -> None:
    (record, *_) = make_generator(save_images=True, dtype="float16").shard(0)
    assert record.image is not None
    image = np.asarray(Image.open(io.BytesIO(record.image)).convert("L"), np.float32)
    decoded = tiny_model.decode(torch.from_numpy(record.latents.astype("float32"))[None])[0]
    red, green, blue = (decoded.clamp(-1, 1).numpy() + 1) * 127.5
    assert image.shape == (16, 16) and np.abs(image - (0.299 * red + 0.587 * green + 0.114 * blue)).mean() < 3


def test_shards_hold_all_pairs_once(make_plan: MakePlan) -> None:
    plan = make_plan()
    assert plan.num_shards == 3 and [list(plan.shard(k)) for k in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert make_plan(num_pairs=8).num_shards == 2


def test_half_precision_network_stays_near_the_float32_one(make_generator: MakeGenerator) -> None:
    exact, half = (np.stack([r.latents for r in make_generator(precision=p).shard(0)]) for p in ("no", "bf16"))
    assert 0 < np.abs(exact - half).max() < 0.1 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("solver", "guided", "count"),
    [("euler", False, 25), ("dpmsolver++", True, 50), ("heun", False, 50), ("midpoint", True, 100)],
)
def test_evaluations_count_stages_and_guidance(solver: Any, guided: bool, count: int) -> None:
    assert evaluations(solver, 25, guided) == count


def test_shape_of_the_latents_follows_the_size(tiny_model: BaseModel) -> None:
    assert tiny_model.latents_shape(24, 32) == (4, 12, 16)
