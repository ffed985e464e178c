"""Define the networks that the demo trains, and train them; load the reflow LoRA that is part of the package."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from d2f_fast.config import FlowForm, ObjectiveName, TrainingConfig
from d2f_fast.demo.generation import single_threaded_operations
from d2f_fast.demo.settings import DemoSettings
from d2f_fast.lora.merge import merged_unet
from d2f_fast.miniature import emoji
from d2f_fast.models.base_model import BaseModel, to_pil
from d2f_fast.training.trainer import AlignedTrainer

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

PipelineLoader = Callable[[], "StableDiffusionPipeline"]
COLOURS_OF_A_NAME = 2  # in the training images; the others would only be encoded once and hardly seen


@dataclass(frozen=True)
class Network:
    """One way to train the base model.

    Args:
        objective: the trainer's name of the training objective.
        fm_form: form of naive flow matching; None for the other objectives.
    """

    objective: ObjectiveName
    fm_form: FlowForm | None = None


# Networks that are trained further on the style that the base knows. The published form is the paper's baseline.
CONTINUED: Mapping[str, Network] = {
    "fm": Network("fm", "published"),
    "diffusion": Network("diffusion"),
    "diff2flow": Network("diff2flow"),
}
# The network that learns the second style.
STYLE = "style"
NETWORKS: Mapping[str, Network] = {**CONTINUED, STYLE: Network("diff2flow")}


class CaptionedImage(TypedDict):
    """One item of a data set: an RGB image and its caption."""

    image: Image.Image
    text: str


class EmojiDataset:
    """Captioned images of one style, held in memory.

    Args:
        items: content of the images.
        style: style of the images, one of `emoji.STYLES`.
    """

    def __init__(self, items: Sequence[emoji.Emoji], style: str) -> None:
        self._images = to_pil(emoji.render(items, style))
        self._texts = [emoji.caption(item.name, item.colour) for item in items]

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> CaptionedImage:
        return {"image": self._images[index], "text": self._texts[index]}


def training_items(names: Sequence[int], seed: int) -> list[emoji.Emoji]:
    """Return each name on two random colours that the base was trained on, each mirrored with probability 1/2."""
    rng = np.random.default_rng(seed)
    items = []
    for name in names:
        colours = [c for c in range(len(emoji.BACKGROUNDS)) if (name, c) not in emoji.held_out_pairs()]
        chosen = rng.permutation(colours)[:COLOURS_OF_A_NAME]
        items += [emoji.Emoji(name, int(colour), bool(rng.random() < 0.5)) for colour in chosen]
    return items


def make_trainer(
    load_pipeline: PipelineLoader,
    settings: DemoSettings,
    network: str,
    learning_rate: float,
    seed: int,
    folder: Path,
    *,
    full: bool = False,
) -> AlignedTrainer:
    """Make the trainer of one network. The trainers of continued training differ in the objective alone.

    Args:
        load_pipeline: loads a new copy of the base model at each call.
        settings: sizes of the run.
        network: name of the network, a key of `NETWORKS`.
        learning_rate: constant learning rate.
        seed: seed of initial weights, data order, noise and times.
        folder: folder for the run's files, and for the cache of encoded images that all runs share.
        full: whether all weights of the UNet are trained, in place of a LoRA.
    """
    config = TrainingConfig(
        output_dir=str(folder / network),
        cache_dir=str(folder / "cache"),
        objective=NETWORKS[network].objective,
        fm_form=NETWORKS[network].fm_form,
        adapter="full" if full else "lora",
        rank=None if full else settings.rank,
        resolution=emoji.SIZE,
        train_batch_size=settings.batch_size,
        max_train_steps=settings.curve_points[-1],
        learning_rate=learning_rate,
        ema_decay=settings.ema_decay,
        checkpointing_steps=0,
        seed=seed,
    )
    return AlignedTrainer.from_pretrained(load_pipeline(), config)


def train_in_parts(
    trainer: AlignedTrainer, dataset: EmojiDataset, points: Sequence[int], measure: Callable[[int], None]
) -> None:
    """Train up to each of some steps in turn, and measure there.

    Args:
        trainer: the trainer; its `max_train_steps` is changed.
        dataset: what to train on.
        points: training steps to stop at, rising; 0 stands for the untrained network.
        measure: called with each point while the averaged weights are in the network.
    """
    for point in points:
        if point > trainer.global_step:
            # The learning rate is constant, so that a run in parts takes the same steps as a run in one piece.
            trainer.config = dataclasses.replace(trainer.config, max_train_steps=point)
            with single_threaded_operations():
                trainer.fit(dataset)
        with trainer.averaged():
            measure(point)


def averaged_weights(trainer: AlignedTrainer) -> dict[str, Tensor]:
    """Return copies of a trainer's averaged weights by name."""
    with trainer.averaged():
        return {name: weight.detach().clone() for name, weight in trainer.trainable.items()}


@torch.no_grad()
def set_weights(trainer: AlignedTrainer, weights: Mapping[str, Tensor], steps: int) -> None:
    """Make a trainer that of a finished run.

    Args:
        trainer: trainer of the same network.
        weights: averaged weights of the run, of `averaged_weights`.
        steps: training steps of the run.

    Raises:
        KeyError: a weight is missing.
    """
    for name, weight in trainer.trainable.items():
        weight.copy_(weights[name])
        if trainer.ema is not None:
            trainer.ema.shadow[name].copy_(weights[name])
    trainer.global_step = steps
    trainer.config = dataclasses.replace(trainer.config, max_train_steps=steps)


def with_merged_unet(model: BaseModel) -> BaseModel:
    """Return the same model with its adapter merged into a new UNet, which generates images in a fifth less time."""
    merged = copy.copy(model)
    merged.unet = merged_unet(model.unet).to(model.device)
    return merged
