"""Take a key of a LoRA file apart into a layer and a part of its update, and name the formats that are not read.

    peft              unet.<module>.lora_A.weight; with base_model.model. in front, or without unet.
    diffusers         unet.<module>.lora.down.weight; unet.<block>.processor.to_q_lora.down.weight in its oldest form
    kohya             lora_unet_<module>.lora_down.weight, lora_te_, lora_te1_, lora_te2_; also lycoris_<module>
    ComfyUI           diffusion_model.<module in Stability's code>.lora_A.weight

Layers are named in two forms, which `key_names` maps to the modules of a pipeline: "unet.<module>", or
"text_encoder.<module>" and "text_encoder_2.<module>", with the dots of diffusers; and "lora_unet_<module>",
"lora_te_<module>", "lora_te1_<module>" and "lora_te2_<module>" with underscores, where the module may have its name in
diffusers or in Stability's code.
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_END = re.compile(
    r"\.lora_(?P<peft>[AB])(?:\.\w+)?\.weight"
    r"|(?P<old>[._])lora\.(?P<diffusers>down|up)\.weight"
    r"|\.lora_linear_layer\.(?P<text>down|up)\.weight"
    r"|\.lora_(?P<kohya>down|up|mid)\.weight"
    r"|\.(?P<alpha>alpha)"
    r"|\.(?:dora_scale|lora_magnitude_vector(?:\.(?!weight)\w+)?(?:\.weight)?)(?P<dora>)"
    r"|\.(?P<lycoris>hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))(?:\.default)?"
)
_MOST_SEPARATORS = 16
_PEFT_PARTS = {"A": "down", "B": "up"}
# Text encoders of diffusers' oldest form have the names of the UNet's attention.
_OLD_TEXT_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_SGM_BLOCKS = ("input_blocks.", "middle_block.", "output_blocks.", "out.", "time_embed.", "label_emb.")
_UNET_BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.", "conv_in", "conv_out", "time_embedding.", "add_embedding.")
_TEXT_BLOCKS = ("text_model.", "encoder.layers.", "text_projection")

# What an unknown key is a sign of, and what to do; the first that is found in a key counts.
_OTHER_FORMATS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), reason)
    for pattern, reason in (
        (r"\.(oft_|boft_|oft_blocks)|\.oft", "OFT, which is not read: merge it into a model with LyCORIS first"),
        (r"\.(a1|a2|b1|b2|bm1|bm2)\.weight$", "GLoRA, which is not read: merge it into a model with LyCORIS first"),
        (r"\.(ia3_l|on_input)", "(IA)3, which is not read: merge it into a model with the program that made it first"),
        (r"vera_lambda", "VeRA, which is not read: merge it with peft first"),
        (r"\.lora_B(\.\w+)?\.bias$|\.lora_bias", "LoRA with biases (lora_bias), which is not read: merge it with peft"),
        (r"lora_embedding_[AB]", "LoRA on embeddings, which is not read: merge it with peft first"),
        (r"\.(diff|diff_b|w_norm|b_norm)$", "full differences of weights, which are not read: merge them first"),
        (r"\.(hada|lokr)_", "LoHa or LoKr with unknown parts: save it again with LyCORIS or peft"),
        (r"^bundle_emb\.|emb_params|string_to_param|^clip_[lg]$", "a textual inversion, not a LoRA: leave it out"),
        (
            r"\.modules_to_save\.",
            "whole layers beside a LoRA (modules_to_save), which are not read: merge it with peft",
        ),
        (
            r"^(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\.|^control_model\.|"
            r"^(down_blocks|up_blocks|mid_block)\..*\.(weight|bias)$",
            "a whole model, not a LoRA: give it as the model",
        ),
    )
)
# Layers of networks other than a UNet of Stable Diffusion.
_TRANSFORMER = re.compile(
    r"^(lora_)?transformer[._]|(^|[._])(double_blocks|single_blocks|single_transformer_blocks|joint_blocks)[._]"
)
_OTHER_UNET = re.compile(r"^(lora_prior|prior|lora_stage_c|stage_c)[._]|motion_modules")


class FileKey(NamedTuple):
    """Key of a LoRA file, taken apart.

    Attributes:
        layer: Name of the layer in one of the two forms of this module.
        part: "down", "up", "mid", "alpha", "magnitude", or a part of LoHa or LoKr by its own name.
        stem: Name of the layer as the file has it.
    """

    layer: str
    part: str
    stem: str


def split_key(key: str) -> FileKey | None:
    """Return the layer and the part of its update that a key of a LoRA file holds, or None for an unknown key."""
    # Every end begins with one of the last dots or underscores, of which the name of an adapter may hold some.
    for at in reversed([i for i, letter in enumerate(key) if letter in "._"][-_MOST_SEPARATORS:]):
        if found := _END.fullmatch(key, at):
            break
    else:
        return None
    stem = key[: found.start()]
    if found["dora"] is not None:
        part = "magnitude"
    elif found["peft"]:
        part = _PEFT_PARTS[found["peft"]]
    else:
        part = found["diffusers"] or found["text"] or found["kohya"] or found["alpha"] or found["lycoris"]
    return FileKey(_layer_name(stem), part, stem)


def component_of(name: str) -> str:
    """Return the component of a pipeline that a layer belongs to: "unet", "text_encoder" or "text_encoder_2".

    Args:
        name: Name of a layer, as `split_key` returns it.
    """
    for prefix, component in (
        *(("text_encoder_2.", "text_encoder_2"), ("lora_te2_", "text_encoder_2")),
        *(("text_encoder.", "text_encoder"), ("lora_te_", "text_encoder"), ("lora_te1_", "text_encoder")),
    ):
        if name.startswith(prefix):
            return component
    return "unet"


def describe_format(keys: Sequence[str]) -> str:
    """Return what the unknown keys of a file are a sign of, and what to do, as the end of a sentence.

    Args:
        keys: Keys that `split_key` does not know, at least one.
    """
    for key in keys:
        for pattern, reason in _OTHER_FORMATS:
            if pattern.search(key):
                return f"{key} is a key of {reason}"
    return f"{keys[0]} is not a LoRA weight: only LoRA files of peft, diffusers, kohya and LyCORIS can be read"


def describe_network(names: Iterable[str]) -> str | None:
    """Return the kind of network that layers belong to if it is not a UNet of Stable Diffusion, else None.

    Args:
        names: Names of layers, as `split_key` returns them.
    """
    for name in names:
        if _TRANSFORMER.search(name):
            return "a transformer network (such as Flux or SD3)"
        if _OTHER_UNET.search(name):
            return "a network other than Stable Diffusion's UNet"
    return None


def _layer_name(stem: str) -> str:
    """Return the name of a layer in one of the two forms of this module."""
    name = stem.removeprefix("base_model.model.")
    name = re.sub(r"^lycoris_", "lora_unet_", name)
    if name.startswith("lora_"):
        return name
    name = re.sub(r"^(model\.)?diffusion_model\.", "", name)
    component, dot, module = name.partition(".")
    if component not in ("unet", "text_encoder", "text_encoder_2") or not dot:
        if name.startswith(_SGM_BLOCKS):
            return f"lora_unet_{name.replace('.', '_')}"
        component = "text_encoder" if name.startswith(_TEXT_BLOCKS) else "unet"
        if component == "unet" and not name.startswith(_UNET_BLOCKS):
            return name
        module = name
    if component == "unet":
        module = re.sub(r"\.to_out$", ".to_out.0", module.replace(".processor.", "."))
    else:
        block, _, leaf = module.rpartition(".")
        module = f"{block}.{_OLD_TEXT_NAMES[leaf]}" if leaf in _OLD_TEXT_NAMES else module
    return f"{component}.{module}"
