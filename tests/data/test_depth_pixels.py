"""Training pixels of depth: the same geometry as the image, masks, and invalid pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from d2f_fast.data.depth_pixels import depth_pixels
from d2f_fast.data.depth_source import DepthSample
from d2f_fast.data.order import Augmentation
from d2f_fast.image_sizes import Size


def sample(height: int = 16, width: int = 24) -> DepthSample:
    """Return an image whose red channel is its depth in decimetres."""
    depth = np.random.default_rng(0).integers(10, 250, (height, width))
    pixels = np.stack([depth] * 3, axis=2).astype(np.uint8)
    valid = np.random.default_rng(1).random((height, width)) < 0.7
    return DepthSample(Image.fromarray(pixels), (depth / 10).astype(np.float32), valid, "a.png")


@pytest.mark.parametrize("flip", [0.1, 0.9])
@pytest.mark.parametrize("center_crop", [True, False])
def test_depth_is_cropped_and_mirrored_as_its_image(flip: float, center_crop: bool) -> None:
    item = sample()._replace(valid=np.ones((16, 24), bool))
    augmentation = Augmentation(flip, (0.3, 0.8), 0.0)
    options = {"random_flip": True, "center_crop": center_crop}
    pixels = depth_pixels(item, augmentation, 16, 2, "log", **options)  # type: ignore[arg-type]
    assert pixels.depth.shape == pixels.image.shape == (3, 16, 16) and pixels.mask.shape == (1, 8, 8)
    assert torch.equal(pixels.depth[0], pixels.depth[1]) and torch.equal(pixels.depth[0], pixels.depth[2])
    # The logarithm is not clipped, so that the order of the pixels is that of the image.
    expected = (pixels.image[0] + 1).log()
    scale, shift = np.polyfit(expected.flatten().double(), pixels.depth[0].flatten().double(), 1)
    assert (pixels.depth[0] - (scale * expected + shift)).abs().max() <= 1e-4 and scale > 0


def test_mask_is_the_share_of_valid_pixels_and_follows_the_mirroring() -> None:
    item = sample(16, 16)
    plain, mirrored = (
        depth_pixels(item, Augmentation(flip, (0, 0), 0), 16, 4, "affine", random_flip=True, center_crop=True)
        for flip in (0.9, 0.1)
    )
    expected = torch.nn.functional.avg_pool2d(torch.from_numpy(item.valid).float()[None], 4)
    assert torch.allclose(plain.mask, expected) and torch.equal(mirrored.mask, plain.mask.flip(-1))
    assert plain.mask.min() > 0 and plain.mask.max() < 1


def test_larger_depth_is_resized_without_new_values() -> None:
    item = sample(32, 48)
    pixels = depth_pixels(item, Augmentation(0.9, (0, 0), 0), 16, 2, "affine", random_flip=False, center_crop=True)
    assert pixels.depth.shape == (3, 16, 16) and pixels.depth.abs().max() <= 1


@pytest.mark.parametrize("wrong", [np.nan, 0.0, 1e9])
def test_depth_of_invalid_pixels_changes_nothing(wrong: float) -> None:
    item = sample()
    changed = item._replace(depth=np.where(item.valid, item.depth, np.float32(wrong)))
    first, second = (
        depth_pixels(each, Augmentation(0.1, (0, 0), 0), 8, 2, "disparity", random_flip=True, center_crop=True)
        for each in (item, changed)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_crop_without_valid_pixel_has_an_empty_mask() -> None:
    item = sample()
    item.valid[:, 4:] = False
    pixels = depth_pixels(item, Augmentation(0.9, (0, 0.99), 0), 16, 2, "affine", random_flip=False, center_crop=False)
    assert not pixels.mask.any() and not pixels.depth.any()


def test_depth_of_oblong_size_is_cropped_as_its_image() -> None:
    item = sample(32, 48)._replace(valid=np.ones((32, 48), bool))
    pixels = depth_pixels(
        item, Augmentation(0.9, (0, 0), 0), Size(32, 24), 2, "log", random_flip=False, center_crop=True
    )
    assert pixels.depth.shape == pixels.image.shape == (3, 32, 24) and pixels.mask.shape == (1, 16, 12)
    middle = torch.from_numpy(np.asarray(item.image)[:, 12:36].copy()).permute(2, 0, 1) / 127.5 - 1
    assert torch.allclose(pixels.image, middle, atol=1e-6)
