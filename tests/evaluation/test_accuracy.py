"""Test background and name accuracy on hand-made images and logits."""

import torch

from d2f_fast.evaluation.accuracy import background_accuracy, name_accuracy


def test_background_accuracy_counts_free_corners_only() -> None:
    palette = torch.tensor([[-1.0, -1, -1], [1, 1, 1], [1, -1, -1]])
    colours = torch.tensor([0, 1, 2, 0])
    images = palette[colours][:, :, None, None].repeat(1, 1, 8, 8) + 0.1 * torch.randn(4, 3, 8, 8)
    images[..., 2:-2, 2:-2] = 0.9  # the subject
    images[3] = 1.0
    assert background_accuracy(images, colours, palette, torch.tensor([True, True, True, True])) == (0.75, 4)
    assert background_accuracy(images, colours, palette, torch.tensor([True, True, True, False])) == (1.0, 3)


def test_name_accuracy_counts_the_most_likely_names() -> None:
    logits = torch.tensor([[3.0, 2, 1, 0], [3, 2, 1, 0], [3, 2, 1, 0], [0, 1, 2, 3]])
    names = torch.tensor([0, 1, 3, 3])
    assert name_accuracy(logits, names) == 0.5
    assert name_accuracy(logits, names, top=2) == 0.75
