"""Define the networks that the demo finetunes, and train them.

Naive flow matching has two forms. `fm` teaches the network noise - latents, as diffusers' flow-matching models return
it; that has the sign of the noise that the network was pretrained to return. `fm_paper` teaches it latents - noise,
the paper's baseline.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch
from PIL import Image
from torch import Tensor

from d2f_fast.config import ObjectiveName, TrainingConfig
from d2f_fast.demo.generation import single_threaded_operations
from d2f_fast.demo.settings import DemoSettings
from d2f_fast.lora.merge import merged_unet
from d2f_fast.miniature import emoji
from d2f_fast.models.base_model import BaseModel, to_pil
from d2f_fast.training.trainer import AlignedTrainer

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

PipelineLoader = Callable[[], "StableDiffusionPipeline"]


@dataclass(frozen=True)
class Network:
    """One way to finetune the base model.

    Args:
        objective: the trainer's name of the training objective.
        negated: whether the network learns the negative of the objective's target. Its LoRA fits a base model with a
            negated output, which nobody has, so it is not saved, and its brightness is not measured.
        curve_evaluations_only: whether its quality is measured at the curves' number of evaluations only.
    """

    objective: ObjectiveName
    negated: bool = False
    curve_evaluations_only: bool = False


NETWORKS: Mapping[str, Network] = {
    "diff2flow": Network("diff2flow"),
    "fm": Network("fm"),
    "fm_paper": Network("fm", negated=True, curve_evaluations_only=True),
    "diffusion": Network("diffusion"),
}


class CaptionedImage(TypedDict):
    """One item of a data set: an RGB image and its caption."""

    image: Image.Image
    text: str


class StyleDataset:
    """Captioned images of some names in one style, each name on every background, held in memory.

    Args:
        names: indices of the names.
        style: style of the images, one of `emoji.STYLES`.
    """

    def __init__(self, names: Sequence[int], style: str = "fluent") -> None:
        chosen = [emoji.Emoji(name, colour) for name in names for colour in range(len(emoji.BACKGROUNDS))]
        self._images = to_pil(emoji.render(chosen, style))
        self._texts = [emoji.caption(item.name, item.colour) for item in chosen]

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> CaptionedImage:
        return {"image": self._images[index], "text": self._texts[index]}


def make_trainer(
    load_pipeline: PipelineLoader,
    settings: DemoSettings,
    network: str,
    learning_rate: float,
    seed: int,
    folder: Path,
) -> AlignedTrainer:
    """Make the trainer of one network.

    The trainers differ in objective and learning rate alone; `fm_paper` also starts from a negated output.

    Args:
        load_pipeline: loads a new copy of the base model at each call.
        settings: sizes of the run.
        network: name of the network, a key of `NETWORKS`.
        learning_rate: constant learning rate.
        seed: seed of initial weights, data order, noise and times.
        folder: folder for the run's files, and for the cache of encoded images that all runs share.
    """
    pipeline = load_pipeline()
    if NETWORKS[network].negated:
        # The objective's target is noise - latents. If a network returns the negative of its former output, learning
        # that target means for its former output learning latents - noise.
        with torch.no_grad():
            for parameter in pipeline.unet.conv_out.parameters():
                parameter.neg_()
    config = TrainingConfig(
        output_dir=str(folder / network),
        cache_dir=str(folder / "cache"),
        objective=NETWORKS[network].objective,
        rank=settings.rank,
        resolution=emoji.SIZE,
        random_flip=True,
        train_batch_size=settings.batch_size,
        max_train_steps=settings.training_steps,
        learning_rate=learning_rate,
        ema_decay=settings.ema_decay,
        checkpointing_steps=0,
        seed=seed,
    )
    return AlignedTrainer.from_pretrained(pipeline, config)


def train_in_parts(
    trainer: AlignedTrainer, dataset: StyleDataset, points: Sequence[int], measure: Callable[[int], None]
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
