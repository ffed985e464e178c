"""Hold the captions and real images that every network is measured on."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from d2f_fast.demo.rows import Measured
from d2f_fast.evaluation import features as imagenet
from d2f_fast.evaluation.accuracy import background_accuracy, name_accuracy
from d2f_fast.evaluation.feature_space import FeatureSpace
from d2f_fast.miniature import emoji
from d2f_fast.miniature.classifier import Classifier
from d2f_fast.miniature.emoji import Emoji


@dataclass
class EvaluationSet:
    """Captions of names that finetuning does not see, and real images to compare with.

    The (name, colour) pairs are divided at random: the captions of `count` of them are generated, and the real images
    of the others are the reference. Each real image is mirrored with probability 1/2.

    Args:
        names: indices of the names.
        count: number of captions; a measurement may use the first ones alone.
        classifier: classifier on the CPU that gives the features and the guesses at the names.
        seed: seed of the division, the bootstrap and the floors.
        style: style of the real images, the one that finetuning teaches.

    Raises:
        ValueError: `count` leaves fewer than two pairs on one side.
    """

    names: Sequence[int]
    count: int
    classifier: Classifier
    seed: int = 0
    style: str = "fluent"
    items: list[Emoji] = field(init=False)

    def __post_init__(self) -> None:
        """Divide the pairs, and compute the features of the real images."""
        generator = np.random.default_rng(self.seed)
        pairs = itertools.product(sorted(self.names), range(len(emoji.BACKGROUNDS)))
        every = [Emoji(name, colour, bool(generator.random() < 0.5)) for name, colour in pairs]
        shuffled = [every[i] for i in generator.permutation(len(every))]
        if not 2 <= self.count <= len(shuffled) - 2:
            raise ValueError(f"count must be 2 to {len(shuffled) - 2} for {len(self.names)} names, got {self.count}")
        self.items, reference = shuffled[: self.count], emoji.render(shuffled[self.count :], self.style)
        self.real = emoji.render(self.items, self.style)
        self._space = FeatureSpace(self.classifier.features, self.real, reference, self.seed)
        self._imagenet_space: FeatureSpace | None = None
        if imagenet.is_installed():
            self._imagenet_space = FeatureSpace(imagenet.ImageNetFeatures(), self.real, reference, self.seed)
        free = emoji.names_with_free_corners()
        self._free_corners = torch.tensor([item.name in free for item in self.items])

    @property
    def prompts(self) -> list[str]:
        """Return the captions."""
        return [emoji.caption(item.name, item.colour) for item in self.items]

    @torch.no_grad()
    def measure(self, images: Tensor, repeats: int = 100) -> Measured:
        """Measure images of the first captions.

        Args:
            images: one image for each of the first B captions, [B, 3, 32, 32] in [-1, 1].
            repeats: resamplings behind the interval of the distance.
        """
        count = len(images)
        logits = torch.cat([self.classifier(part) for part in torch.split(images, 256)])
        names = torch.tensor([item.name for item in self.items[:count]])
        colours = torch.tensor([item.colour for item in self.items[:count]])
        accuracy, counted = background_accuracy(images, colours, emoji.background_palette(), self._free_corners[:count])
        distance = self._space.measure(images, repeats)
        return {
            "samples": count,
            "frechet_distance": distance["frechet_distance"],
            "frechet_low": distance["frechet_low"],
            "frechet_high": distance["frechet_high"],
            "frechet_floor": distance["frechet_floor"],
            "background_accuracy": accuracy,
            "background_samples": counted,
            "name_top1": name_accuracy(logits, names),
            "name_top5": name_accuracy(logits, names, top=5),
        }

    def measure_with_imagenet(self, images: Tensor, repeats: int = 100) -> Measured:
        """Measure the distance in the ImageNet features; return no entries if their packages are not installed."""
        if self._imagenet_space is None:
            return {}
        distance = self._imagenet_space.measure(images, repeats)
        return {
            "imagenet_frechet_distance": distance["frechet_distance"],
            "imagenet_frechet_low": distance["frechet_low"],
            "imagenet_frechet_high": distance["frechet_high"],
            "imagenet_frechet_floor": distance["frechet_floor"],
        }

    def one_of_each_colour(self, count: int) -> list[int]:
        """Return the positions of the first caption of each colour among the first `count` captions."""
        first: dict[int, int] = {}
        for position, item in enumerate(self.items[:count]):
            first.setdefault(item.colour, position)
        return list(first.values())
