"""Names of the layers of a UNet that get a LoRA. Imports no torch."""

from collections.abc import Collection, Mapping, Sequence
from typing import TypedDict, Unpack

from d2f_fast.errors import ModelError, printable

LINEAR_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"),
    *("ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
)
CONVOLUTION_TARGETS = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
FIRST_LAYER, LAST_LAYER = "conv_in", "conv_out"


def has_ending(name: str, endings: Sequence[str]) -> bool:
    """Return whether a module's name ends with one of the endings, at a dot.

    Args:
        name: Name of a module in diffusers.
        endings: Endings of such names.
    """
    return any(f".{name}".endswith(f".{ending}") for ending in endings)


def check_targets(targets: Sequence[str], layers: Collection[str]) -> None:
    """Refuse an ending that no layer's name has; peft ignores it where another one has layers.

    Args:
        targets: Endings of the names of the layers that get a LoRA.
        layers: Names of the linear layers and convolutions of the UNet.

    Raises:
        ModelError: No layer has such a name.
    """
    for target in targets:
        if not any(has_ending(name, (target,)) for name in layers):
            raise ModelError(
                f"target_modules: {printable(repr(target))} is not a linear or convolution layer of the UNet: choose"
                " from its module names"
            )


class StatedLayers(TypedDict, total=False):
    """Layers and ranks that options state; what is None or missing states nothing.

    Attributes:
        rank: Rank of attention and feed-forward layers.
        conv_rank: Rank of convolutions but the first and the last; 0 states that none is adapted.
        first_last_layers: Whether the first and the last layer are adapted.
        target_modules: Endings of the names of the other layers.
    """

    rank: int | None
    conv_rank: int | None
    first_last_layers: bool | None
    target_modules: Sequence[str] | None


def check_stated_layers(
    path: object, ranks: Mapping[str, int], layers: Collection[str], **stated: Unpack[StatedLayers]
) -> None:
    """Refuse options that state other layers or ranks than those of the file that is started from.

    Args:
        path: File of the LoRA, for the message.
        ranks: Rank of each layer of the UNet that the file adapts.
        layers: Names of the linear layers and convolutions of the UNet.
        stated: Layers and ranks that the options state.

    Raises:
        ModelError: An option contradicts the file.
    """
    ends = {name for name in ranks if name in (FIRST_LAYER, LAST_LAYER)}
    kernels = {name: r for name, r in ranks.items() if name not in ends and has_ending(name, CONVOLUTION_TARGETS)}
    others = {name: r for name, r in ranks.items() if name not in ends and name not in kernels}
    for option, wanted_rank, found in (
        ("rank", stated.get("rank"), others),
        ("conv_rank", stated.get("conv_rank"), kernels),
    ):
        if wanted_rank is not None and set(found.values()) != ({wanted_rank} if wanted_rank else set()):
            listed = ", ".join(map(str, sorted(set(found.values()))[:5])) or "no such layers"
            raise _contradiction(path, option, str(wanted_rank), f"rank {listed}" if found else listed)
    first_last_layers, target_modules = stated.get("first_last_layers"), stated.get("target_modules")
    if first_last_layers is not None and len(ends) != 2 * first_last_layers:
        stated_word = "set" if first_last_layers else "off"
        raise _contradiction(path, "first_last_layers", stated_word, f"{len(ends)} of the two layers")
    if target_modules is not None:
        wanted = {name for name in layers if has_ending(name, target_modules)}
        if wanted != set(others):
            count = f"{len(wanted & set(others))} of its {len(wanted)} layers, and {len(set(others) - wanted)} others"
            raise _contradiction(path, "target_modules", " ".join(target_modules), count)


def _contradiction(path: object, option: str, stated: str, found: str) -> ModelError:
    """Return the error of an option that contradicts the file."""
    return ModelError(
        f"{option} is {printable(stated)}, and {printable(path)} has {found}: leave {option} out, so that the file"
        " decides"
    )
