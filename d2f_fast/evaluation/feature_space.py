"""Compare sets of images with real ones in the features of a network."""

from collections.abc import Callable
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from d2f_fast.evaluation.distances import Array, bootstrap_interval, frechet_distance, real_floor

MOST_FEATURES = 64


class FrechetEntries(TypedDict):
    """Fréchet distance of a set of images to real ones, the bounds of its interval, and the real images' own."""

    frechet_distance: float
    frechet_low: float
    frechet_high: float
    frechet_floor: float


def principal_directions(features: Array) -> Array:
    """Return the directions in which features are compared: of more than 64, the 64 in which real images vary most.

    A covariance of more directions could not be estimated from some hundred images.

    Args:
        features: features [n, d] of real images.

    Returns:
        Orthonormal columns [d, min(d, 64)], by which features are multiplied; the identity for d up to 64.
    """
    if features.shape[1] <= MOST_FEATURES:
        return np.eye(features.shape[1])
    # The triangular factor has the same right singular vectors, and no more rows than there are features.
    triangle = np.linalg.qr(features - features.mean(0), mode="r")
    directions: Array = np.linalg.svd(triangle, full_matrices=False)[2][:MOST_FEATURES].T
    return directions


class FeatureSpace:
    """Features in which generated images are compared with real ones.

    Of more than 64 features the 64 principal directions of the real images are kept, because a covariance has to be
    estimated from some hundred images.

    Args:
        network: maps images [B, 3, H, W] in [-1, 1] to features [B, F].
        real: real images of what is generated, [N, 3, H, W].
        reference: other real images, with which generated ones are compared, [R, 3, H, W].
        seed: seed of the bootstrap and of the divisions behind the floor.

    Attributes:
        reference: features of the reference, [R, at most 64].
    """

    def __init__(self, network: Callable[[Tensor], Tensor], real: Tensor, reference: Tensor, seed: int) -> None:
        self._network, self._seed = network, seed
        both = np.concatenate([self._network_features(real), self._network_features(reference)])
        self._directions = principal_directions(both)
        self._all_real = both @ self._directions
        self.reference = self._all_real[len(real) :]
        self._floors: dict[int, float] = {}

    @torch.no_grad()
    def _network_features(self, images: Tensor) -> Array:
        features: Array = torch.cat([self._network(part) for part in torch.split(images, 64)]).double().numpy()
        return features

    def features(self, images: Tensor) -> Array:
        """Return the features of images [B, 3, H, W] in [-1, 1], [B, at most 64]."""
        return self._network_features(images) @ self._directions

    def measure(self, images: Tensor, repeats: int) -> FrechetEntries:
        """Measure the Fréchet distance of images to the reference, with its interval and floor.

        Args:
            images: generated images [B, 3, H, W] in [-1, 1].
            repeats: resamplings of the bootstrap.

        Returns:
            The distance, the bounds of its 95 % interval, and the distance of B real images to other real ones.
        """
        features = self.features(images)
        distance = bootstrap_interval(frechet_distance, features, self.reference, repeats=repeats, seed=self._seed)
        return {
            "frechet_distance": distance.value,
            "frechet_low": distance.low,
            "frechet_high": distance.high,
            "frechet_floor": self._floor(len(images)),
        }

    def _floor(self, count: int) -> float:
        """Return the distance of `count` real images to as many other real ones as the reference has."""
        if count not in self._floors:
            self._floors[count] = real_floor(self._all_real, count, len(self.reference), seed=self._seed)
        return self._floors[count]
