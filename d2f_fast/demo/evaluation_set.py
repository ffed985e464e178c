"""What the demo measures: pictures of held-out names against real ones, the flow loss, and the spread of brightness."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2f_fast.demo.sampling import Painter, Route
from d2f_fast.evaluation import features as imagenet
from d2f_fast.evaluation.accuracy import background_accuracy, name_accuracy
from d2f_fast.evaluation.brightness import grey_bias
from d2f_fast.evaluation.distances import bootstrap_interval, frechet_distance, real_floor
from d2f_fast.flow.formulas import Flow, interpolate
from d2f_fast.miniature import pictures
from d2f_fast.miniature.build_classifier import names_with_free_corners
from d2f_fast.miniature.classifier import Classifier
from d2f_fast.miniature.pictures import Picture
from d2f_fast.models.base_model import BaseModel
from d2f_fast.sampling.integrate import unet_velocity

MOST_FEATURES = 64
BLACK_AND_WHITE = tuple(tuple(pictures.BACKGROUNDS).index(name) for name in ("black", "white"))


def palette() -> Tensor:
    """The background colours, [colours, 3] in [-1, 1]."""
    return torch.tensor(tuple(pictures.BACKGROUNDS.values())) / 127.5 - 1


def noise_of(count: int, model: BaseModel, seed: int) -> Tensor:
    """Start noise [count, C, h, w] on the CPU: the same for every network and sampler."""
    side = pictures.SIZE // model.downsampling
    shape = (count, model.unet.config.in_channels, side, side)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class FeatureSpace:
    """Features in which drawn pictures are compared with real ones of the style.

    Args:
        network: maps pictures [B, 3, H, W] in [-1, 1] to features [B, F]; of more than 64, the 64 principal directions
            of the real pictures are kept: a covariance is estimated from some hundred pictures.
        real: the real pictures of what is drawn.
        reference: the real pictures that drawn ones are compared with.
        seed: of the bootstrap and of the floors' divisions.
    """

    def __init__(self, network: Callable[[Tensor], Tensor], real: Tensor, reference: Tensor, seed: int) -> None:
        self._network, self._seed = network, seed
        every = np.concatenate([self._raw(real), self._raw(reference)])
        self._directions: np.ndarray | None = None
        if every.shape[1] > MOST_FEATURES:
            self._directions = np.linalg.svd(every - every.mean(0), full_matrices=False)[2][:MOST_FEATURES].T
        self._every = self._project(every)
        self._reference = self._every[len(real) :]
        self._floors: dict[int, float] = {}

    @torch.no_grad()
    def _raw(self, pixels: Tensor) -> np.ndarray:
        return torch.cat([self._network(part) for part in pixels.split(64)]).double().numpy()

    def _project(self, features: np.ndarray) -> np.ndarray:
        return features if self._directions is None else features @ self._directions

    def measure(self, pixels: Tensor, repeats: int) -> dict[str, float]:
        """Fréchet distance of drawn pictures to the reference with its interval, and the real pictures' own."""
        features = self._project(self._raw(pixels))
        distance = bootstrap_interval(frechet_distance, features, self._reference, repeats=repeats, seed=self._seed)
        return {
            "frechet_distance": distance.value,
            "frechet_low": distance.low,
            "frechet_high": distance.high,
            "frechet_floor": self._floor(len(pixels)),
        }

    def _floor(self, count: int) -> float:
        """Fréchet distance of `count` real pictures to as many other real ones as the reference has."""
        if count not in self._floors:
            self._floors[count] = real_floor(self._every, count, len(self._reference), seed=self._seed)
        return self._floors[count]


@dataclass
class Exam:
    """Captions of names that finetuning does not see, and the real pictures to compare with.

    The (name, colour) pairs are divided at random: `count` of them are drawn, the others, as real pictures of that
    style, are the reference; each is mirrored or not at random.

    Args:
        names: whose pictures are drawn.
        count: of pictures; a measurement may use the first ones only.
        classifier: the judge, on the CPU.
        seed: of the division.
        style: that finetuning teaches.

    Raises:
        ValueError: there are not enough pairs to divide.
    """

    names: Sequence[int]
    count: int
    classifier: Classifier
    seed: int = 0
    style: str = "fluent"
    drawn: list[Picture] = field(init=False)

    def __post_init__(self) -> None:
        """Divide the pairs, and see what the judges say of the real pictures."""
        generator = np.random.default_rng(self.seed)
        pairs = itertools.product(sorted(self.names), range(len(pictures.BACKGROUNDS)))
        every = [Picture(name, colour, bool(generator.random() < 0.5)) for name, colour in pairs]
        chosen = [every[i] for i in generator.permutation(len(every))]
        if not 2 <= self.count <= len(chosen) - 2:
            raise ValueError(f"count must be 2 to {len(chosen) - 2} for {len(self.names)} names, got {self.count}")
        self.drawn, reference = chosen[: self.count], pictures.draw(chosen[self.count :], self.style)
        self.real = pictures.draw(self.drawn, self.style)
        self._space = FeatureSpace(self.classifier.features, self.real, reference, self.seed)
        self._imagenet: FeatureSpace | None = None
        if imagenet.is_installed():
            self._imagenet = FeatureSpace(imagenet.ImageNetFeatures(), self.real, reference, self.seed)
        free = names_with_free_corners()
        self._readable = torch.tensor([picture.name in free for picture in self.drawn])

    @property
    def prompts(self) -> list[str]:
        """A caption for each picture to draw."""
        return [pictures.caption(picture.name, picture.colour) for picture in self.drawn]

    @torch.no_grad()
    def measure(self, pixels: Tensor, repeats: int = 100) -> dict[str, Any]:
        """Entries of a row for pictures of the first captions, [B, 3, 32, 32] in [-1, 1]."""
        count = len(pixels)
        logits = torch.cat([self.classifier(part) for part in pixels.split(256)])
        names = torch.tensor([picture.name for picture in self.drawn[:count]])
        colours = torch.tensor([picture.colour for picture in self.drawn[:count]])
        accuracy, readable = background_accuracy(pixels, colours, palette(), self._readable[:count])
        return {
            "samples": count,
            **self._space.measure(pixels, repeats),
            "background_accuracy": accuracy,
            "background_samples": readable,
            "name_top1": name_accuracy(logits, names),
            "name_top5": name_accuracy(logits, names, top=5),
        }

    def measure_by_imagenet(self, pixels: Tensor, repeats: int = 100) -> dict[str, float]:
        """Entries of the same pictures in an ImageNet network's features; none where it is not installed."""
        if self._imagenet is None:
            return {}
        return {f"imagenet_{key}": value for key, value in self._imagenet.measure(pixels, repeats).items()}


@torch.no_grad()
def flow_loss(model: BaseModel, flow: Flow, pixels: Tensor, prompts: Sequence[str], noise: Tensor) -> float:
    """Mean ‖velocity - (latents - noise)‖² of real pictures at evenly spread flow times, for any network.

    Args:
        model: its UNet is asked, without guidance.
        flow: how the UNet is read.
        pixels: [B, 3, H, W] in [-1, 1].
        prompts: B captions.
        noise: [B, C, h, w].
    """
    latents = model.scale_latents(model.encode_images(pixels)["mean"].float())
    noise = noise.to(latents.device)
    t = (torch.arange(len(latents), device=latents.device) + 0.5) / len(latents)
    condition = model.encode_prompts(prompts)["encoder_hidden_states"]
    velocity = unet_velocity(model.unet, flow.to(model.device), condition)(interpolate(latents, noise, t), t)
    return (velocity - (latents - noise)).square().mean().item()


def measure_brightness(
    painter: Painter, route: Route, steps: int, names: Sequence[int], style: str, count: int, seed: int
) -> list[dict[str, Any]]:
    """Rows of the grey bias for captions without a colour, and on black and white; `count` pictures each."""
    rows = []
    generator = np.random.default_rng(seed)
    for captions, colours in (("no colour", range(len(pictures.BACKGROUNDS))), ("black and white", BLACK_AND_WHITE)):
        chosen = generator.choice(np.asarray(sorted(names)), count)
        colour_of = [None if captions == "no colour" else colours[i % len(colours)] for i in range(count)]
        prompts = [pictures.caption(int(name), colour) for name, colour in zip(chosen, colour_of, strict=True)]
        drawn = painter.draw(prompts, noise_of(count, painter.model, seed), route, steps)
        real = [Picture(name, colour) for name in sorted(names) for colour in colours]
        spread = grey_bias(drawn, pictures.draw(real, style), seed=seed)
        rows.append(
            {
                "captions": captions,
                "samples": count,
                "grey_bias": spread.value,
                "grey_bias_low": spread.low,
                "grey_bias_high": spread.high,
            }
        )
    return rows
