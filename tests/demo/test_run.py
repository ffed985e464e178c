"""The demo's curves against a whole run, its task and choices, and a small demo from end to end."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from d2f_fast.config import TrainingConfig
from d2f_fast.demo.exam import noise_of
from d2f_fast.demo.run import (
    CHOICES,
    NETWORKS,
    Choices,
    DemoSettings,
    StylePictures,
    forward_passes,
    make_trainer,
    run_demo,
    train,
    with_merged_unet,
)
from d2f_fast.demo.sampling import DDIM, DPM, FLOW, ROUTES, Painter
from d2f_fast.evaluation import features as imagenet
from d2f_fast.lora.read import LORA_FILE
from d2f_fast.miniature import pictures
from d2f_fast.miniature.classifier import Classifier
from d2f_fast.models.base_model import BaseModel
from d2f_fast.training.objective import Objective
from d2f_fast.training.trainer import AlignedTrainer


def test_the_papers_naive_flow_is_taught_latents_minus_noise(load: Callable[[], Any], tmp_path: Path) -> None:
    """One step's loss on the base's own network, by hand: the output against latents - noise, and its negative."""
    settings = DemoSettings(steps=1, batch=2, rank=2)
    batch = {"latents": torch.randn(2, 4, 16, 16), "encoder_hidden_states": torch.randn(2, 7, 16)}
    losses, expected = {}, {}
    for network in ("fm", "fm_paper"):
        trainer = make_trainer(load, settings, network, 1e-3, 0, tmp_path)
        trainer.config = dataclasses.replace(trainer.config, caption_dropout=0.0)
        with mock.patch.object(Objective, "inputs", autospec=True, side_effect=Objective.inputs) as inputs:
            losses[network] = trainer.step(batch).item()
        latents, noise, t = inputs.call_args.args[1:]
        x_t = t[:, None, None, None] * latents + (1 - t[:, None, None, None]) * noise
        with torch.no_grad():
            output = load().unet(x_t, 1000 * (1 - t), encoder_hidden_states=batch["encoder_hidden_states"]).sample
        sign = 1 if network == "fm_paper" else -1
        expected[network] = (sign * output - (latents - noise)).square().mean().item()
    assert losses == pytest.approx(expected, rel=1e-4)


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


def test_pictures_of_the_merged_network_are_the_adapted_ones(load: Callable[[], Any], tmp_path: Path) -> None:
    trainer = make_trainer(load, DemoSettings(steps=1, batch=2, rank=2), "diff2flow", 1e-2, 0, tmp_path)
    for name, parameter in trainer.trainable.items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    trainer.ema = None
    noise, drawn = noise_of(2, trainer.model, 0), []
    with trainer.averaged():
        for model in (trainer.model, with_merged_unet(trainer.model), BaseModel(load())):
            painter = Painter(model, model.alignment, 2.0)
            drawn.append(painter.draw(["a cat on a red background", "a boot"], noise, FLOW, 2))
    torch.testing.assert_close(drawn[1], drawn[0], rtol=0, atol=1e-4)
    assert (drawn[2] - drawn[0]).abs().max() > 1e-2


def test_the_task_shows_no_held_out_name_and_captions_every_background() -> None:
    dataset = StylePictures([0, 1])
    assert len(dataset) == 16
    item = dataset[9]
    assert item["text"] == pictures.caption(1, 1)
    assert np.asarray(item["image"])[0, 0].tolist() == list(pictures.BACKGROUNDS["white"])


def test_choices_hold_a_rate_and_a_sampler_for_each_objective() -> None:
    choices = Choices.read(CHOICES)
    assert set(choices.learning_rate) == set(choices.route) == {"diff2flow", "fm", "fm_paper", "diffusion"}
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
    assert len(quality) == (4 * 2 + 1) * len(ROUTES)
    assert {steps for network, _, _, steps in quality if network == "fm_paper"} == {4}
    assert all(r["samples"] == 10 and r["frechet_distance"] > 0 for r in quality.values())
    for objective in ("base", "diff2flow", "diffusion"):
        ddim, dpm = (quality[objective, route.sampler, route.spacing, 2] for route in (DDIM, DPM))
        assert dpm["frechet_distance"] == ddim["frechet_distance"]
        assert dpm["equal_to"] == "ddim"
    assert "equal_to" not in quality["fm", "dpm++2m", "trailing", 2]
    untrained = {r["objective"]: r for r in rows if r["measure"] == "training" and r["training_steps"] == 0}
    assert untrained["diff2flow"]["flow_loss"] == pytest.approx(untrained["diffusion"]["flow_loss"], rel=1e-6)
    assert untrained["fm"]["flow_loss"] != pytest.approx(untrained["diffusion"]["flow_loss"], rel=1e-3)
    # To the sign, both naive networks are the base that they begin as.
    assert untrained["fm_paper"]["flow_loss"] != pytest.approx(untrained["fm"]["flow_loss"], rel=1e-3)
    assert len([r for r in rows if r["measure"] == "grey_bias"]) == 7 * 2
    for steps, drawn in ((2, 9), (4, 11)):
        with Image.open(folder / f"grid-{steps}.png") as grid:
            assert grid.size[1] == 40 + drawn * 96
    judged = {r["objective"] for r in rows if "imagenet_frechet_distance" in r}
    assert judged == ({"real", "base", *NETWORKS} if imagenet.is_installed() else set())
    for objective in ("diff2flow", "fm", "diffusion"):
        assert load_file(folder / objective / LORA_FILE)
    pipe = load()
    pipe.load_lora_weights(folder / "diff2flow")
    assert not (folder / "fm_paper").exists()
    assert forward_passes(settings) == 4 * 4 * 10 * 6 + 4 * 4 * 10 - 3 * 2 * 10 + 4 * 3 * 4 * 4 + 7 * 2 * 6 * 4
