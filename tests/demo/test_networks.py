"""Test the finetuned networks, their data set and their training."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from d2f_fast.config import TrainingConfig
from d2f_fast.demo import networks
from d2f_fast.demo.generation import ImageGenerator, start_noise
from d2f_fast.demo.networks import (
    EmojiDataset,
    make_trainer,
    train_in_parts,
    training_items,
    with_merged_unet,
)
from d2f_fast.demo.settings import DemoSettings
from d2f_fast.miniature import emoji
from d2f_fast.models.base_model import BaseModel
from d2f_fast.training.objective import Objective
from d2f_fast.training.trainer import AlignedTrainer


def test_naive_network_is_fed_the_flow_time_and_learns_latents_minus_noise(
    load: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of one step equals that of the base network, fed t itself, against latents - noise."""
    monkeypatch.setattr(networks, "TrainingConfig", functools.partial(TrainingConfig, caption_dropout=0.0))
    settings = DemoSettings(curve_points=(0, 1), batch_size=2, rank=2)
    batch = {"latents": torch.randn(2, 4, 16, 16), "encoder_hidden_states": torch.randn(2, 7, 16)}
    trainer = make_trainer(load, settings, "fm", 1e-3, 0, tmp_path)
    with mock.patch.object(Objective, "inputs", autospec=True, side_effect=Objective.inputs) as inputs:
        loss = trainer.step(batch).item()
    latents, noise, t = inputs.call_args.args[1:]
    x_t = t[:, None, None, None] * latents + (1 - t[:, None, None, None]) * noise
    with torch.no_grad():
        output = load().unet(x_t, t, encoder_hidden_states=batch["encoder_hidden_states"]).sample
    assert loss == pytest.approx((output - (latents - noise)).square().mean().item(), rel=1e-4)


def test_training_in_parts_equals_training_in_one_run(load: Callable[[], Any], tmp_path: Path) -> None:
    dataset = EmojiDataset([emoji.Emoji(name, colour) for name in range(3) for colour in range(8)], "fluent")
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
        train_in_parts(trainer, dataset, points, seen.append)
        assert seen == points
        weights.append({key: value.detach().clone() for key, value in trainer.trainable.items()})
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    assert any(value.abs().max() > 0 for key, value in weights[0].items() if "lora_B" in key)


def test_merged_network_generates_the_images_of_the_adapted_one(load: Callable[[], Any], tmp_path: Path) -> None:
    trainer = make_trainer(
        load, DemoSettings(curve_points=(0, 1), batch_size=2, rank=2), "diff2flow", 1e-2, 0, tmp_path
    )
    for name, parameter in trainer.trainable.items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    trainer.ema = None
    noise, images = start_noise(2, trainer.model, 0), []
    with trainer.averaged():
        for model in (trainer.model, with_merged_unet(trainer.model), BaseModel(load())):
            generator = ImageGenerator(model, model.alignment)
            images.append(generator.generate(["a cat on a red background", "a boot"], noise, 2, 2.0))
    torch.testing.assert_close(images[1], images[0], rtol=0, atol=1e-4)
    assert (images[2] - images[0]).abs().max() > 1e-2


def test_training_images_are_of_combinations_that_the_base_was_trained_on() -> None:
    names = range(len(emoji.names()))
    items = training_items(names, 0)
    combinations = {(item.name, item.colour) for item in items}
    assert len(combinations) == len(items) == 2 * len(names)
    assert not combinations & emoji.held_out_pairs()
    assert 0.4 < sum(item.mirrored for item in items) / len(items) < 0.6
    assert items == training_items(names, 0) != training_items(names, 1)


def test_dataset_holds_each_item_with_its_caption() -> None:
    dataset = EmojiDataset([emoji.Emoji(0, 0), emoji.Emoji(1, 1)], "fluent")
    assert len(dataset) == 2
    assert dataset[1]["text"] == emoji.caption(1, 1)
    assert np.asarray(dataset[1]["image"])[0, 0].tolist() == list(emoji.BACKGROUNDS["white"])
