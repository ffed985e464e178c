"""The names of the original single-file layout, against the constructors of the original code restated here.

Sources: CompVis' ldm (openaimodel.py, model.py), Stability's sgm, OpenCLIP (transformer.py). The published checkpoints
of the three families hold 686, 686 and 1680 tensors of the UNet, 248 of the autoencoder, and 197, 294 and 197 + 390 of
the text encoders.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from d2f_fast.errors import ModelError
from d2f_fast.files.tensor_stream import LazyTensor
from d2f_fast.models.original_layout import original_tensors

Shapes = dict[str, tuple[int, ...]]

_CROSS, _PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
_FOUR: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (_CROSS, _CROSS, _CROSS, _PLAIN),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
}
UNETS: dict[str, dict[str, Any]] = {
    "sd1": {**_FOUR, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {
        **_FOUR,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": (_PLAIN, _CROSS, _CROSS),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2, 10),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32}
COUNTS = {"sd1": 686 + 248 + 197, "sd2": 686 + 248 + 294, "sdxl": 1680 + 248 + 197 + 390}


def _pair(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _resnet(name: str, given: int, out: int) -> Shapes:
    keys = _pair(f"{name}.in_layers.0", given) | _pair(f"{name}.in_layers.2", out, given, 3, 3)
    keys |= _pair(f"{name}.emb_layers.1", out, 1280) | _pair(f"{name}.out_layers.0", out)
    keys |= _pair(f"{name}.out_layers.3", out, out, 3, 3)
    return keys if given == out else keys | _pair(f"{name}.skip_connection", out, given, 1, 1)


def _transformer(name: str, width: int, depth: int, context: int, linear: bool) -> Shapes:
    kernel = () if linear else (1, 1)
    keys = _pair(f"{name}.norm", width)
    for end in ("proj_in", "proj_out"):
        keys |= _pair(f"{name}.{end}", width, width, *kernel)
    for i in range(depth):
        block = f"{name}.transformer_blocks.{i}"
        for attention, features in (("attn1", width), ("attn2", context)):
            keys[f"{block}.{attention}.to_q.weight"] = (width, width)
            keys |= {f"{block}.{attention}.to_{part}.weight": (width, features) for part in "kv"}
            keys |= _pair(f"{block}.{attention}.to_out.0", width, width)
        keys |= _pair(f"{block}.ff.net.0.proj", 8 * width, width) | _pair(f"{block}.ff.net.2", width, 4 * width)
        for norm in ("norm1", "norm2", "norm3"):
            keys |= _pair(f"{block}.{norm}", width)
    return keys


def original_unet(mult: tuple[int, ...], depths: tuple[int, ...], context: int, linear: bool, adm: int) -> Shapes:
    """Return names and shapes that the constructor of openaimodel.UNetModel makes, for 320 channels."""
    width, channels, count = 320, [320], 1
    keys = _pair("time_embed.0", 1280, 320) | _pair("time_embed.2", 1280, 1280)
    if adm:
        keys |= _pair("label_emb.0.0", 1280, adm) | _pair("label_emb.0.2", 1280, 1280)
    keys |= _pair("input_blocks.0.0", 320, 4, 3, 3)
    for level, factor in enumerate(mult):
        for _ in range(2):
            keys |= _resnet(f"input_blocks.{count}.0", width, 320 * factor)
            width = 320 * factor
            if depths[level]:
                keys |= _transformer(f"input_blocks.{count}.1", width, depths[level], context, linear)
            channels.append(width)
            count += 1
        if level < len(mult) - 1:
            keys |= _pair(f"input_blocks.{count}.0.op", width, width, 3, 3)
            channels.append(width)
            count += 1
    keys |= _resnet("middle_block.0", width, width) | _resnet("middle_block.2", width, width)
    keys |= _transformer("middle_block.1", width, depths[-1] or 1, context, linear)
    count = 0
    for level, factor in reversed(list(enumerate(mult))):
        for i in range(3):
            keys |= _resnet(f"output_blocks.{count}.0", width + channels.pop(), 320 * factor)
            width, place = 320 * factor, 1
            if depths[level]:
                keys |= _transformer(f"output_blocks.{count}.1", width, depths[level], context, linear)
                place = 2
            if level and i == 2:
                keys |= _pair(f"output_blocks.{count}.{place}.conv", width, width, 3, 3)
            count += 1
    return keys | _pair("out.0", 320) | _pair("out.2", 4, 320, 3, 3)


def original_vae() -> Shapes:
    """Return names and shapes that the constructors of ldm's Encoder and Decoder make."""

    def resnet(name: str, given: int, out: int) -> Shapes:
        keys = _pair(f"{name}.norm1", given) | _pair(f"{name}.conv1", out, given, 3, 3)
        keys |= _pair(f"{name}.norm2", out) | _pair(f"{name}.conv2", out, out, 3, 3)
        return keys if given == out else keys | _pair(f"{name}.nin_shortcut", out, given, 1, 1)

    def middle(half: str) -> Shapes:
        keys = resnet(f"{half}.mid.block_1", 512, 512) | resnet(f"{half}.mid.block_2", 512, 512)
        keys |= _pair(f"{half}.mid.attn_1.norm", 512)
        for part in ("q", "k", "v", "proj_out"):
            keys |= _pair(f"{half}.mid.attn_1.{part}", 512, 512, 1, 1)
        return keys

    channels = (128, 256, 512, 512)
    keys = _pair("encoder.conv_in", 128, 3, 3, 3)
    width = 128
    for level, out in enumerate(channels):
        for block in range(2):
            keys |= resnet(f"encoder.down.{level}.block.{block}", width, out)
            width = out
        if level < 3:
            keys |= _pair(f"encoder.down.{level}.downsample.conv", out, out, 3, 3)
    keys |= middle("encoder") | _pair("encoder.norm_out", 512) | _pair("encoder.conv_out", 8, 512, 3, 3)
    keys |= _pair("decoder.conv_in", 512, 4, 3, 3) | middle("decoder")
    for level, out in reversed(list(enumerate(channels))):
        for block in range(3):
            keys |= resnet(f"decoder.up.{level}.block.{block}", width, out)
            width = out
        if level:
            keys |= _pair(f"decoder.up.{level}.upsample.conv", out, out, 3, 3)
    keys |= _pair("decoder.norm_out", 128) | _pair("decoder.conv_out", 3, 128, 3, 3)
    return keys | _pair("quant_conv", 8, 8, 1, 1) | _pair("post_quant_conv", 4, 4, 1, 1)


def transformers_clip() -> Shapes:
    """Return the names and shapes of OpenAI's CLIP in the checkpoints of SD1.5 and SDXL."""
    keys: Shapes = {"embeddings.position_ids": (1, 77), "embeddings.token_embedding.weight": (49408, 768)}
    keys["embeddings.position_embedding.weight"] = (77, 768)
    for i in range(12):
        for part in ("q", "k", "v", "out"):
            keys |= _pair(f"encoder.layers.{i}.self_attn.{part}_proj", 768, 768)
        keys |= _pair(f"encoder.layers.{i}.mlp.fc1", 3072, 768) | _pair(f"encoder.layers.{i}.mlp.fc2", 768, 3072)
        keys |= _pair(f"encoder.layers.{i}.layer_norm1", 768) | _pair(f"encoder.layers.{i}.layer_norm2", 768)
    return {f"text_model.{key}": shape for key, shape in (keys | _pair("final_layer_norm", 768)).items()}


def open_clip(width: int, layers: int) -> Shapes:
    """Return the names and shapes of OpenCLIP's text transformer."""
    keys: Shapes = {"positional_embedding": (77, width), "text_projection": (width, width), "logit_scale": ()}
    keys |= {"token_embedding.weight": (49408, width)} | _pair("ln_final", width)
    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        keys |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        keys |= _pair(f"{block}.attn.out_proj", width, width)
        keys |= _pair(f"{block}.ln_1", width) | _pair(f"{block}.ln_2", width)
        keys |= _pair(f"{block}.mlp.c_fc", 4 * width, width) | _pair(f"{block}.mlp.c_proj", width, 4 * width)
    return keys


def expected(family: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    unet = {
        "sd1": ((1, 2, 4, 4), (1, 1, 1, 0), 768, False, 0),
        "sd2": ((1, 2, 4, 4), (1, 1, 1, 0), 1024, True, 0),
        "sdxl": ((1, 2, 4), (0, 2, 10), 2048, True, 2816),
    }[family]
    parts = {"model.diffusion_model.": original_unet(*unet), "first_stage_model.": original_vae()}
    if family == "sd2":
        parts["cond_stage_model.model."] = open_clip(1024, 24)
    else:
        parts["cond_stage_model.transformer." if family == "sd1" else "conditioner.embedders.0.transformer."] = (
            transformers_clip()
        )
    if family == "sdxl":
        parts["conditioner.embedders.1.model."] = open_clip(1280, 32)
    for prefix, keys in parts.items():
        yield from ((prefix + key, shape) for key, shape in keys.items())


def real_components(family: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the components of the real configuration, without weights."""
    common = {"vocab_size": 49408, "max_position_embeddings": 77}
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[family])
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        )
        encoders = {"text_encoder": CLIPTextModel(CLIPTextConfig(**common, **(CLIP_H if family == "sd2" else CLIP_L)))}
        if family == "sdxl":
            config = CLIPTextConfig(**common, **CLIP_G, projection_dim=1280)
            encoders["text_encoder_2"] = CLIPTextModelWithProjection(config)
    components = {
        name: {key: LazyTensor.of(value) for key, value in part.state_dict().items()}
        for name, part in {"unet": unet, "vae": vae, **encoders}.items()
    }
    for name in encoders:
        components[name] = {
            key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}": value
            for key, value in components[name].items()
        }
    return components, {"unet": dict(unet.config), "vae": dict(vae.config)}


@pytest.mark.parametrize("family", COUNTS)
def test_names_and_shapes_are_those_of_the_original_code(family: Any) -> None:
    components, configs = real_components(family)
    tensors = original_tensors(family, components, configs, is_v_prediction=False, zero_snr=False)
    got = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    want = dict(expected(family))
    assert len(want) == COUNTS[family]
    assert got == want


@pytest.fixture(scope="module")
def narrow() -> tuple[dict[str, Any], dict[str, Any]]:
    """A model of one level, to which tests add what they need."""
    ones = {"encoder.mid_block.attentions.0.query.weight": LazyTensor.of(torch.ones(2, 3))}
    text = {"text_model.embeddings.token_embedding.weight": LazyTensor.of(torch.ones(4, 2))}
    configs = {"unet": {"layers_per_block": 2, "up_block_types": ["UpBlock2D"]}, "vae": {"up_block_types": ["a"]}}
    return {"unet": {}, "vae": ones, "text_encoder": text}, configs


def test_markers_are_empty_tensors(narrow: Any) -> None:
    components, configs = narrow
    plain = original_tensors("sd1", components, configs, is_v_prediction=False, zero_snr=False)
    both = original_tensors("sd1", components, configs, is_v_prediction=True, zero_snr=True)
    assert both.keys() - plain.keys() == {"v_pred", "ztsnr"}
    assert both["v_pred"].shape == (0,) and both["ztsnr"].load().shape == (0,)


def test_attention_of_older_diffusers_is_renamed(narrow: Any) -> None:
    components, configs = narrow
    tensors = original_tensors("sd1", components, configs, is_v_prediction=False, zero_snr=False)
    assert tensors["first_stage_model.encoder.mid.attn_1.q.weight"].load().shape == (2, 3, 1, 1)


@pytest.mark.parametrize(
    ("component", "key"),
    [("unet", "controlnet_cond_embedding.conv_in.weight"), ("vae", "decoder.layers.0.weight"), ("text_encoder", "a.b")],
)
def test_foreign_tensor_is_refused_by_name(component: str, key: str, narrow: Any) -> None:
    components, configs = narrow
    more = components | {component: components[component] | {key: LazyTensor.of(torch.ones(1))}}
    with pytest.raises(ModelError, match=f"{component}: {key} has no name in the original layout"):
        original_tensors("sd1", more, configs, is_v_prediction=False, zero_snr=False)


def test_missing_component_is_refused(narrow: Any) -> None:
    components, configs = narrow
    with pytest.raises(ModelError, match="the model has no text_encoder_2: a single file needs every part"):
        original_tensors("sdxl", components, configs, is_v_prediction=False, zero_snr=False)
