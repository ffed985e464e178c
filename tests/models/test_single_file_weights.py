"""Weights of a single file: a missing, mis-shaped or foreign one is named, from the shapes alone."""

from collections.abc import Callable
from typing import Any

import pytest

from d2f_fast.errors import ModelError
from d2f_fast.models.single_file_weights import check_weights

UNET, VAE = "model.diffusion_model.", "first_stage_model."
PREFIXES: dict[str, tuple[str, ...]] = {
    "sd1": ("cond_stage_model.transformer.",),
    "sd2": ("cond_stage_model.model.",),
    "sdxl": ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."),
}
Shapes = dict[str, tuple[int, ...]]


def check(
    narrow_table: Any, original: Any, family: str, change: Callable[[Shapes], Any], with_vae: bool = True
) -> None:
    shapes = {key: tuple(tensor.shape) for key, tensor in original(family).items()}
    change(shapes)
    check_weights("x", "SD", shapes, narrow_table(family), PREFIXES[family], with_vae=with_vae)


def remove(prefix: str) -> Callable[[Shapes], None]:
    """Return the change that removes all tensors whose key begins with `prefix`."""

    def change(shapes: Shapes) -> None:
        for key in [key for key in shapes if key.startswith(prefix)]:
            del shapes[key]

    return change


@pytest.mark.parametrize("family", PREFIXES)
def test_whole_file_is_accepted(narrow_table: Any, original: Any, family: str) -> None:
    check(narrow_table, original, family, lambda shapes: None)


def test_file_without_its_own_autoencoder_is_accepted_where_another_is_used(narrow_table: Any, original: Any) -> None:
    check(narrow_table, original, "sd1", remove(VAE), with_vae=False)


FAULTS: dict[str, tuple[str, Callable[[Shapes], Any], str]] = {
    "UNet": (
        "sd1",
        remove(f"{UNET}input_blocks.1.1.norm."),
        r"x holds no weights for down_blocks\.0\.attentions\.0\.norm\.\w+ of the unet",
    ),
    "sizes of SDXL": ("sdxl", remove(f"{UNET}label_emb."), "x holds no label_emb"),
    "autoencoder": (
        "sdxl",
        remove(f"{VAE}encoder.down.1."),
        r"x holds no weights for encoder\.down_blocks\.1\.\S+ of the vae",
    ),
    "text encoder": (
        "sd1",
        remove("cond_stage_model.transformer.text_model.final_layer_norm."),
        "x holds no weights for final_layer_norm.weight of the text_encoder",
    ),
    "second text encoder": (
        "sdxl",
        remove("conditioner.embedders.1.model.transformer.resblocks.0.ln_1."),
        "x holds no weights for .*layers.0.layer_norm1.weight of the text_encoder_2",
    ),
    "layers that the family does not have": (
        "sd1",
        lambda shapes: shapes.update({f"{UNET}input_blocks.1.2.temporal.weight": (1,)}),
        r"x: model\.diffusion_model\.input_blocks\.1\.2\.temporal\.weight is not a weight of a UNet of SD",
    ),
    "shape": (
        "sd1",
        lambda shapes: shapes.update({f"{UNET}out.2.bias": (7,)}),
        r"x: conv_out\.bias of the unet has shape \[7\], and SD has \[4\]",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_refused_with_its_key(narrow_table: Any, original: Any, fault: str) -> None:
    family, change, sentence = FAULTS[fault]
    with pytest.raises(ModelError, match=sentence) as caught:
        check(narrow_table, original, family, change)
    assert "\n" not in str(caught.value)
