"""The demo's samplers against diffusers, its curves against a whole run, and a small demo from end to end."""

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from d2f_fast.alignment import Alignment, NaiveFlow
from d2f_fast.base_model import BaseModel
from d2f_fast.config import TrainingConfig
from d2f_fast.demo import CHOICES, Choices, DemoSettings, StylePictures, forward_passes, run_demo, train
from d2f_fast.demo_exam import Exam, flow_loss, noise_of
from d2f_fast.demo_plots import Bar, Line, bar_plot, line_plot
from d2f_fast.demo_reading import comparisons, reading, steps_to_reach, verdict
from d2f_fast.demo_sampling import DDIM, DPM, FLOW, ROUTES, Painter, Route, draw_latents
from d2f_fast.lora import LORA_FILE, load_lora
from d2f_fast.miniature import pictures
from d2f_fast.miniature.classifier import Classifier
from d2f_fast.sampler import unet_velocity
from d2f_fast.trainer import AlignedTrainer

PROMPTS = ["a cat on a red background", "a boot on a black background"]


@pytest.fixture(scope="module")
def load(tiny_folder: Path) -> Callable[[], Any]:
    return lambda: StableDiffusionPipeline.from_pretrained(tiny_folder, torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def model(load: Callable[[], Any]) -> BaseModel:
    return BaseModel(load())


def stock_sample(model: BaseModel, scheduler: Any, noise: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """What the stock pipeline's own loop gives, before decoding."""
    return model.pipeline.__class__(
        **model.pipeline.components | {"scheduler": scheduler}, requires_safety_checker=False
    )(
        PROMPTS,
        num_inference_steps=scheduler.wanted_steps,
        guidance_scale=guidance_scale,
        latents=noise,
        output_type="latent",
    ).images


@pytest.mark.parametrize("steps", [2, 4, 25])
@pytest.mark.parametrize("route", [DDIM, DPM])
def test_routes_of_stock_samplers_draw_what_the_stock_pipeline_draws(
    model: BaseModel, route: Route, steps: int
) -> None:
    options = {"timestep_spacing": "trailing"}
    if route == DDIM:
        scheduler: Any = DDIMScheduler.from_config(model.pipeline.scheduler.config, set_alpha_to_one=True, **options)
    else:
        scheduler = DPMSolverMultistepScheduler.from_config(model.pipeline.scheduler.config, **options)
    scheduler.wanted_steps = steps
    noise = torch.randn(2, 4, 16, 16)
    expected = stock_sample(model, scheduler, noise, 3.0)
    condition, negative = (model.encode_prompts(p)["encoder_hidden_states"] for p in (PROMPTS, ["", ""]))
    velocity = unet_velocity(model.unet, model.alignment, condition, negative, 3.0)
    with torch.no_grad():
        got = draw_latents(velocity, noise, route, steps, model.alignment, model.pipeline.scheduler)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("naive", [False, True])
def test_every_route_takes_one_network_to_its_data_whatever_it_was_trained_on(route: Route, naive: bool) -> None:
    """The ideal velocity towards one picture is constant along the path: each sampler must end in it."""
    base = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    reader = NaiveFlow() if naive else Alignment.from_scheduler(base)
    target, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    seen = []

    def velocity(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(float(t))
        return (target - x_t) / (1 - t)

    latents = draw_latents(velocity, noise, route, 4, reader, base)
    torch.testing.assert_close(latents, target, rtol=1e-3, atol=1e-3)
    assert len(seen) == 4
    assert all(later > earlier for earlier, later in itertools.pairwise(seen))
    starts_at_zero = route.sampler == "flow"
    expected = 0.001 if route == DPM and naive else 0.0 if starts_at_zero else Alignment.from_scheduler(base).t_min
    assert seen[0] == pytest.approx(expected, abs=1e-4)


def test_two_steps_of_dpm_solver_are_ddim(model: BaseModel) -> None:
    painter = Painter(model, model.alignment, guidance_scale=2.0)
    drawn = [painter.draw(PROMPTS, noise_of(2, model, 0), route, 2) for route in (DDIM, DPM)]
    torch.testing.assert_close(drawn[1], drawn[0], rtol=0, atol=1e-4)
    longer = [painter.draw(PROMPTS, noise_of(2, model, 0), route, 4) for route in (DDIM, DPM)]
    assert (longer[1] - longer[0]).abs().max() > 1e-3


def test_painter_draws_the_same_in_batches(model: BaseModel) -> None:
    counted: list[int] = []
    noise = noise_of(2, model, 0)
    whole = Painter(model, model.alignment, 2.0).draw(PROMPTS, noise, FLOW, 2)
    parts = Painter(model, model.alignment, 2.0, batch=1, on_batch=counted.append).draw(PROMPTS, noise, FLOW, 2)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    assert counted == [2, 2]
    assert whole.abs().max() <= 1


def test_flow_loss_is_the_objectives_own_at_the_same_times(model: BaseModel) -> None:
    pixels = torch.rand(4, 3, 32, 32) * 2 - 1
    noise, prompts = noise_of(4, model, 0), PROMPTS * 2
    latents = model.scale_latents(model.encode_images(pixels)["mean"])
    t = (torch.arange(4) + 0.5) / 4
    condition = model.encode_prompts(prompts)["encoder_hidden_states"]
    x_t = t[:, None, None, None] * latents + (1 - t[:, None, None, None]) * noise
    with torch.no_grad():
        output = model.unet(x_t, 1000 * (1 - t), encoder_hidden_states=condition).sample
    expected = (-output - (latents - noise)).square().mean().item()
    assert flow_loss(model, NaiveFlow(), pixels, prompts, noise) == pytest.approx(expected, rel=1e-5)
    assert flow_loss(model, model.alignment, pixels, prompts, noise) != pytest.approx(expected, rel=1e-2)


def test_training_in_parts_is_training_at_once(load: Callable[[], Any], tmp_path: Path) -> None:
    dataset = StylePictures(pictures.names_in_both_styles()[:3])
    weights = []
    for name, points in (("whole", [5]), ("parts", [0, 1, 3, 5])):
        config = TrainingConfig(
            output_dir=str(tmp_path / name),
            cache_dir=str(tmp_path / "cache"),
            rank=2,
            resolution=32,
            max_train_steps=5,
            checkpointing_steps=0,
            learning_rate=1e-3,
        )
        trainer = AlignedTrainer.from_pretrained(load(), config)
        seen: list[int] = []
        train(trainer, dataset, points, seen.append)
        assert seen == points
        weights.append({key: value.detach().clone() for key, value in trainer.trainable.items()})
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    assert any(value.abs().max() > 0 for key, value in weights[0].items() if "lora_B" in key)


def test_exam_keeps_the_reference_apart_from_what_is_drawn() -> None:
    names = sorted(pictures.held_out_names())[:10]
    exam = Exam(names, 30, Classifier().eval(), seed=0)
    measured = exam.measure(exam.real, repeats=10)
    assert measured["samples"] == 30
    assert len(set(exam.drawn)) == 30
    assert measured["background_accuracy"] == 1.0
    assert 0 < measured["background_samples"] <= 30
    assert measured["frechet_low"] <= measured["frechet_distance"] <= measured["frechet_high"]
    assert exam.measure(exam.real.flip(1), repeats=10)["background_accuracy"] < 1.0
    with pytest.raises(ValueError, match="count must be 2 to 78 for 10 names"):
        Exam(names, 79, Classifier().eval())


def test_the_task_shows_no_held_out_name_and_captions_every_background() -> None:
    dataset = StylePictures([0, 1])
    assert len(dataset) == 16
    item = dataset[9]
    assert item["text"] == pictures.caption(1, 1)
    assert np.asarray(item["image"])[0, 0].tolist() == list(pictures.BACKGROUNDS["white"])


def row(objective: str, distance: float, half: float = 0.05, steps: int = 4, **entries: Any) -> dict[str, Any]:
    return {
        "measure": "quality",
        "objective": objective,
        "sampler": "flow",
        "spacing": "uniform",
        "steps": steps,
        "samples": 10,
        "frechet_distance": distance,
        "frechet_low": distance - half,
        "frechet_high": distance + half,
        "frechet_floor": 0.1,
        **entries,
    }


def rows_of(diff2flow: float, fm: float, diffusion: float, base: float) -> list[dict[str, Any]]:
    distances = {"base": base, "diff2flow": diff2flow, "fm": fm, "diffusion": diffusion}
    quality = [
        row(name, distance + extra, spacing=spacing)
        for name, distance in distances.items()
        for spacing, extra in (("uniform", 0.0), ("trailing", 0.01))
    ]
    training = [
        row(name, distances[name] + late, measure="training", training_steps=step, flow_loss=1.0 + late)
        for name in ("diff2flow", "fm", "diffusion")
        for step, late in ((0, 9.0), (10, 1.0), (40, 0.0))
    ]
    grey = row(
        "base", 0.0, measure="grey_bias", captions="no colour", grey_bias=0.9, grey_bias_low=0.8, grey_bias_high=1
    )
    return [*quality, *training, grey]


def test_reading_follows_the_numbers_both_ways() -> None:
    won = rows_of(diff2flow=0.3, fm=1.5, diffusion=0.31, base=0.9)
    lost = rows_of(diff2flow=1.5, fm=0.3, diffusion=0.31, base=0.9)
    said = [reading([*rows, *comparisons(rows)], 4) for rows in (won, lost)]
    assert "beats the naive-flow LoRA" in said[0]
    assert "cannot be told from the diffusion LoRA" in said[0]
    assert "7 times the excess over real pictures" in said[0]
    assert "first measured point of 10 steps" in said[0]
    assert "loses to the naive-flow LoRA" in said[1]
    assert "loses to the base, drawn along the flow without training," in said[1]
    assert "did not reach the final distance" in said[1]


def test_comparison_takes_the_best_sampler_of_each_network() -> None:
    rows = rows_of(diff2flow=0.3, fm=1.5, diffusion=0.31, base=0.9)
    rows.append(row("fm", 0.18, sampler="ddim", spacing="trailing"))
    against_fm = next(r for r in comparisons(rows) if r["measure"] == "comparison" and r["against"] == "fm")
    assert against_fm["against_sampler"] == "ddim"
    assert against_fm["verdict"] == "worse"
    assert against_fm["excess_ratio"] == pytest.approx(0.4)
    assert verdict(row("fm", 0.2), row("fm", 0.29)) == "level"
    assert steps_to_reach(rows, "diffusion", 1.31) == 10


def test_plots_put_values_where_they_belong() -> None:
    plot = line_plot([Line("a", "#000", [(2, 1.0, 0.9, 1.1), (8, 4.0, 3.5, 4.5)])], "t", "x", "y", (2, 4, 8))
    (x1, y1), (x2, y2) = re.findall(r"([\d.]+),([\d.]+)", re.search(r'points="([^"]+)"', plot)[1])  # type: ignore[index]
    labels = {text: float(x) for x, text in re.findall(r'<text x="([\d.]+)"[^>]*>(\d)</text>', plot)}
    assert float(x1) < float(x2)
    assert float(y1) > float(y2)
    assert labels["2"] == pytest.approx(float(x1))
    assert labels["4"] == pytest.approx((float(x1) + float(x2)) / 2, abs=0.2)
    bars = bar_plot([Bar("half", "#000", 0.5, 0.4, 0.6), Bar("one <b>", "#000", 1.0, 0.9, 1.1)], "t")
    half, one = (float(width) for width in re.findall(r'width="([\d.]+)"', bars))
    assert one == pytest.approx(2 * half, abs=0.2)
    assert "one &lt;b&gt;" in bars


def test_choices_hold_a_rate_and_a_sampler_for_each_objective() -> None:
    choices = Choices.read(CHOICES)
    assert set(choices.learning_rate) == set(choices.route) == {"diff2flow", "fm", "diffusion"}
    assert all(1e-5 < rate < 1e-1 for rate in choices.learning_rate.values())
    assert all(route in ROUTES for route in choices.route.values())


def test_demo_writes_its_folder(load: Callable[[], Any], tmp_path: Path) -> None:
    settings = DemoSettings(
        steps=2, batch=2, rank=2, pictures={2: 10, 4: 10}, curve_pictures=4, brightness_pictures=6, repeats=5
    )
    report = run_demo(tmp_path / "demo", 3, settings, load, Classifier().eval())
    folder = tmp_path / "demo"
    assert report == folder / "report.html"
    page = report.read_text()
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "nan" not in re.sub(r"base64,[^\"]+", "", page)  # nan% of a measure, or a coordinate
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["command"] == "d2f demo"
    assert metrics["seed"] == 3
    rows = metrics["results"]
    quality = {(r["objective"], r["sampler"], r["spacing"], r["steps"]): r for r in rows if r["measure"] == "quality"}
    assert len(quality) == 4 * len(ROUTES) * 2
    assert all(r["samples"] == 10 and r["frechet_distance"] > 0 for r in quality.values())
    for objective in ("base", "diff2flow", "diffusion"):
        ddim, dpm = (quality[objective, route.sampler, route.spacing, 2] for route in (DDIM, DPM))
        assert dpm["frechet_distance"] == ddim["frechet_distance"]
        assert dpm["equal_to"] == "ddim"
    assert "equal_to" not in quality["fm", "dpm++2m", "trailing", 2]
    untrained = {r["objective"]: r for r in rows if r["measure"] == "training" and r["training_steps"] == 0}
    assert untrained["diff2flow"]["flow_loss"] == pytest.approx(untrained["diffusion"]["flow_loss"], rel=1e-6)
    assert untrained["fm"]["flow_loss"] != pytest.approx(untrained["diffusion"]["flow_loss"], rel=1e-3)
    assert len([r for r in rows if r["measure"] == "grey_bias"]) == 7 * 2
    with Image.open(folder / "grid-4.png") as grid:
        assert grid.size[1] == 40 + 9 * 96
    for objective in ("diff2flow", "fm", "diffusion"):
        assert load_file(folder / objective / LORA_FILE)
    pipe = load()
    load_lora(pipe, folder / "diff2flow")
    assert forward_passes(settings) == 4 * 4 * 10 * 6 - 3 * 2 * 10 + 3 * 3 * 4 * 4 + 7 * 2 * 6 * 4
