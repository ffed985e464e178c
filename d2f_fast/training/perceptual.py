"""Compare latents by the images that they decode to, in the features of a network: LPIPS.

    LPIPS = sum over layers of mean over positions of w · (f(image) / |f(image)| - f(other) / |f(other)|)²

Zhang et al., arXiv 1801.03924, equation 1, by the authors' package `lpips`. In its last stage InstaFlow, arXiv
2309.06380, replaces the squared error of the latents by it.
"""

import warnings
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

from d2f_fast.config import TrainingConfig
from d2f_fast.errors import RefusedInputError, printable
from d2f_fast.models.base_model import BaseModel
from d2f_fast.training.launch import check_lpips_package
from d2f_fast.training.network import enable_gradient_checkpointing

# torchvision's names of the weights that LPIPS was fitted with, by the name of the network.
_WEIGHTS = {
    "vgg": "VGG16_Weights.IMAGENET1K_V1",
    "alex": "AlexNet_Weights.IMAGENET1K_V1",
    "squeeze": "SqueezeNet1_1_Weights.IMAGENET1K_V1",
}


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
        RefusedInputError: lpips or torchvision is missing, or the weights of the network cannot be loaded.
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
            warnings.simplefilter("ignore")  # torchvision deprecates the way in which lpips asks for a network.
            from lpips import LPIPS
            from torchvision.models import get_weight

            network: nn.Module = LPIPS(net=config.lpips_net, pnet_rand=True, verbose=False)
        # The package itself would unpickle whatever its file holds. With `weights_only` loading it runs no code.
        file = get_weight(_WEIGHTS[config.lpips_net])
        weights = file.get_state_dict(check_hash=True, map_location="cpu", weights_only=True)
        # The package keeps torchvision's numbers of the layers, below the names slice1, slice2 and so on.
        layers = network.get_submodule("net")
        layers.load_state_dict({name: weights[f"features.{name.partition('.')[2]}"] for name in layers.state_dict()})
    except UnpicklingError as error:  # The text of torch advises to load the file all the same.
        raise RefusedInputError(
            f"lpips_net {config.lpips_net}: its file in {printable(torch.hub.get_dir())}/checkpoints is damaged, or"
            " holds more than weights: remove it, and torchvision downloads it again"
        ) from error
    except Exception as error:  # Its download, its file, or a torchvision that was built for another torch has failed.
        raise RefusedInputError(
            f"lpips_net {config.lpips_net} cannot be loaded ({type(error).__name__}: {printable(str(error))}):"
            " torchvision, which must be of the same build as torch, downloads its weights the first time, so go online"
            " once, or leave lpips_weight out"
        ) from error
    return network
