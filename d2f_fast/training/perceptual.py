"""Compare latents by the images that they decode to, in the features of a network: LPIPS.

    LPIPS = sum over layers of mean over positions of w · (f(image) / |f(image)| - f(other) / |f(other)|)²

Zhang et al., arXiv 1801.03924, equation 1, by the authors' package `lpips`. InstaFlow, arXiv 2309.06380, uses it in its
last stage.
"""

import warnings

import torch
from torch import Tensor, nn

from d2f_fast.config import TrainingConfig
from d2f_fast.errors import RefusedInputError, printable
from d2f_fast.models.base_model import BaseModel
from d2f_fast.training.launch import check_lpips_package
from d2f_fast.training.network import enable_gradient_checkpointing


class PerceptualLoss:
    """Measure the LPIPS between the images of predicted and of true latents.

    Images are decoded in the type of the autoencoder, and compared in float32, whatever the type of the training step
    is. bfloat16 has 8 bits for a value: differences of similar features, which are squared, would be rounded away.

    Args:
        network: LPIPS of two batches of images in [-1, 1], on the device of the model.
        model: base model, whose autoencoder decodes.
    """

    def __init__(self, network: nn.Module, model: BaseModel) -> None:
        self._network, self._model = network.requires_grad_(False).eval(), model

    def __call__(self, predicted: Tensor, latents: Tensor) -> Tensor:
        """Return the LPIPS of each sample, [b] float32, which has a gradient with respect to the prediction.

        Args:
            predicted: predicted latents at unit variance, [b, C, h, w] float32.
            latents: true latents, same shape.
        """
        with torch.autocast(predicted.device.type, enabled=False):
            images = self._model.decode(latents)
            distances: Tensor = self._network(self._model.decode_with_gradient(predicted), images)
        return distances.flatten()


def load_perceptual_loss(config: TrainingConfig, model: BaseModel) -> PerceptualLoss | None:
    """Return the perceptual loss of a run, or None where it has none.

    Args:
        config: options of the run. With `gradient_checkpointing` the decoder computes its activations again, too.
        model: base model on its device.

    Raises:
        RefusedInputError: the package lpips is missing, or the weights of its network cannot be loaded.
    """
    if not config.lpips_weight:
        return None
    network = _load_network(config)
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(model.vae)
    return PerceptualLoss(network.to(model.device), model)


def _load_network(config: TrainingConfig) -> nn.Module:
    """Return the LPIPS of the package with the network that the options name, whose weights torchvision downloads."""
    check_lpips_package(config)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision deprecates the way in which lpips asks for the weights.
            from lpips import LPIPS

            network: nn.Module = LPIPS(net=config.lpips_net, verbose=False)
    except Exception as error:  # Its download, its file, or a torchvision that was built for another torch has failed.
        raise RefusedInputError(
            f"lpips_net {config.lpips_net} cannot be loaded ({type(error).__name__}: {printable(str(error))}):"
            " torchvision, which must be of the same build as torch, downloads its weights the first time, so go online"
            " once, or leave lpips_weight out"
        ) from error
    return network
