"""Hold captions and real images that networks are measured on."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from d2f_fast.demo.rows import Measured
from d2f_fast.evaluation.accuracy import name_accuracy
from d2f_fast.evaluation.feature_space import FeatureSpace
from d2f_fast.miniature import emoji
from d2f_fast.miniature.classifier import Classifier
from d2f_fast.miniature.emoji import Emoji


@dataclass
class EvaluationSet:
    """Captions of some names, and real images of one style to compare with.

    The (name, colour) pairs are divided at random: the captions of `count` of them are generated, and the real images
    of the others are the reference. Each real image is mirrored with probability 1/2.

    Args:
        names: indices of the names.
        count: number of captions.
        classifier: classifier on the CPU that gives the features and the guesses at the names.
        style: style of the real images.
        reference_images: largest number of images in the reference.
        seed: seed of the division, the bootstrap and the floors.
        repeats: resamplings behind the interval of the distance.

    Attributes:
        items: content of the images that the captions describe.
        real: real images of it, [count, 3, 32, 32] in [-1, 1].
        space: features in which images are compared with the reference.

    Raises:
        ValueError: `count` leaves fewer than two pairs on one side.
    """

    names: Sequence[int]
    count: int
    classifier: Classifier
    style: str
    reference_images: int = 2000
    seed: int = 0
    repeats: int = 100

    def __post_init__(self) -> None:
        """Divide the pairs, and compute the features of the real images."""
        rng = np.random.default_rng(self.seed)
        pairs = [(name, colour) for name in sorted(self.names) for colour in range(len(emoji.BACKGROUNDS))]
        if not 2 <= self.count <= len(pairs) - 2:
            raise ValueError(f"count must be 2 to {len(pairs) - 2} for {len(self.names)} names, got {self.count}")
        chosen = rng.permutation(len(pairs))[: self.count + self.reference_images]
        shuffled = [Emoji(pairs[i][0], pairs[i][1], bool(rng.random() < 0.5)) for i in chosen]
        self.items, reference = shuffled[: self.count], emoji.render(shuffled[self.count :], self.style)
        self.real = emoji.render(self.items, self.style)
        self.space = FeatureSpace(self.classifier.features, self.real, reference, self.seed)

    @property
    def prompts(self) -> list[str]:
        """Return the captions."""
        return [emoji.caption(item.name, item.colour) for item in self.items]

    @torch.no_grad()
    def measure(self, images: Tensor) -> Measured:
        """Measure one image of each caption, [count, 3, 32, 32] in [-1, 1]."""
        logits = torch.cat([self.classifier(part) for part in torch.split(images, 256)])
        names = torch.tensor([item.name for item in self.items])
        distance = self.space.measure(images, self.repeats)
        return {
            "samples": len(images),
            "frechet_distance": distance["frechet_distance"],
            "frechet_low": distance["frechet_low"],
            "frechet_high": distance["frechet_high"],
            "frechet_floor": distance["frechet_floor"],
            "name_top1": name_accuracy(logits, names),
            "name_top5": name_accuracy(logits, names, top=5),
        }

    def one_of_each_colour(self) -> list[int]:
        """Return the positions of the first caption of each colour."""
        first: dict[int, int] = {}
        for position, item in enumerate(self.items):
            first.setdefault(item.colour, position)
        return list(first.values())
