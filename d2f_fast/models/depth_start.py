"""State in the configuration of a network of depth that it starts from zeros, so that the folder alone says it.

diffusers does not write `d2f.json` when it saves a folder again. It takes the entries of a configuration that begin
with an underscore for its own: it loads them without a warning, and saves them. Imports no torch.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from d2f_fast.lora.tags import START, TASK

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

CONFIG_ENTRY = "_d2f_start"


def start_tags(unet: Mapping[str, object]) -> dict[str, str]:
    """Return the tags that the configuration of a network states: its task and start, or none for a start from noise.

    Args:
        unet: Content of the UNet's config.json, or the configuration of a loaded UNet.
    """
    start = unet.get(CONFIG_ENTRY, "noise")
    return {} if start == "noise" else {TASK: "depth", START: str(start)}


def set_start(unet: "UNet2DConditionModel", *, from_zeros: bool) -> None:
    """Write into the configuration of a network whether it starts from zeros.

    Args:
        unet: Network of a pipeline. One that starts from noise and states nothing else is left as it is.
        from_zeros: Whether it was trained to jump from zeros, in place of noise, to its result in one step.
    """
    if from_zeros or start_tags(unet.config):
        unet.register_to_config(**{CONFIG_ENTRY: "zeros" if from_zeros else "noise"})
