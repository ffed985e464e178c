"""Pad the convolutions of an autoencoder by reflection, as fine-tunes with EQ-VAE's equivariance are trained.

The rule is that of the forks of kohya's scripts and of the nodes for ComfyUI and reForge: every two-dimensional
convolution that pads its input does so by reflection in place of zeros. diffusers has no such setting: the entry that
this module leaves in the autoencoder's configuration is read by this package, and ignored by stock pipelines.
"""

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny

CONFIG_ENTRY = "reflection_padding"


def pads_by_reflection(vae: "AutoencoderKL | AutoencoderTiny") -> bool:
    """Return whether the configuration of an autoencoder says that its convolutions pad by reflection."""
    return bool(vae.config.get(CONFIG_ENTRY, False))


def set_reflection_padding(vae: "AutoencoderKL | AutoencoderTiny", is_stated: bool | None = None) -> bool:
    """Pad the convolutions of an autoencoder as an option says, or else as its configuration does.

    The configuration keeps the setting, so that it is saved, and is part of the fingerprint and of cache keys.

    Args:
        vae: Autoencoder, which is changed in place.
        is_stated: Whether the option asks for reflection; None leaves the decision to the configuration.

    Returns:
        Whether the convolutions pad by reflection.
    """
    was = pads_by_reflection(vae)
    reflects = was if is_stated is None else is_stated
    if not reflects and not was:
        return False
    for module in vae.modules():
        if isinstance(module, nn.Conv2d) and module.padding != (0, 0):
            module.padding_mode = "reflect" if reflects else "zeros"
    vae.register_to_config(**{CONFIG_ENTRY: reflects})
    return reflects
