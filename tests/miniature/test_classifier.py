"""Test the shipped classifier on real images."""

import pytest
import torch

from d2f_fast.miniature import emoji
from d2f_fast.miniature.classifier import load_classifier


@pytest.mark.parametrize(("style", "least"), [("noto", 0.95), ("fluent", 0.95)])
def test_classifier_names_real_images(style: str, least: float) -> None:
    classifier = load_classifier()
    chosen = [emoji.Emoji(name, name % 8) for name in emoji.names_in_both_styles()[::4]]
    images = emoji.render(chosen, style)
    with torch.inference_mode():
        guesses = classifier(images).topk(5).indices
        assert classifier.features(images).shape == (len(chosen), 64)
    right = (guesses == torch.tensor([item.name for item in chosen])[:, None]).any(dim=1)
    assert right.float().mean() >= least
