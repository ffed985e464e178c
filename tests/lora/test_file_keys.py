"""Keys of LoRA files, taken apart, and the formats that are named where they cannot be read."""

import re

import pytest

from d2f_fast.lora.file_keys import component_of, describe_format, describe_network, split_key

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
TEXT = "text_model.encoder.layers.0.self_attn"


@pytest.mark.parametrize(
    ("key", "layer", "part"),
    [
        (f"unet.{BLOCK}.attn1.to_q.lora_A.weight", f"unet.{BLOCK}.attn1.to_q", "down"),
        (f"unet.{BLOCK}.attn1.to_q.lora_B.my_name.weight", f"unet.{BLOCK}.attn1.to_q", "up"),
        (f"{BLOCK}.attn1.to_q.lora_A.weight", f"unet.{BLOCK}.attn1.to_q", "down"),
        (f"base_model.model.{BLOCK}.ff.net.2.lora_B.weight", f"unet.{BLOCK}.ff.net.2", "up"),
        (f"base_model.model.unet.{BLOCK}.ff.net.2.lora_B.weight", f"unet.{BLOCK}.ff.net.2", "up"),
        (f"base_model.model.{TEXT}.q_proj.lora_A.weight", f"text_encoder.{TEXT}.q_proj", "down"),
        (f"unet.{BLOCK}.attn1.to_out.0.lora.down.weight", f"unet.{BLOCK}.attn1.to_out.0", "down"),
        (f"unet.{BLOCK}.attn1.processor.to_out_lora.up.weight", f"unet.{BLOCK}.attn1.to_out.0", "up"),
        (f"{BLOCK}.attn2.processor.to_v_lora.down.weight", f"unet.{BLOCK}.attn2.to_v", "down"),
        (f"text_encoder.{TEXT}.to_out_lora.up.weight", f"text_encoder.{TEXT}.out_proj", "up"),
        (f"text_encoder.{TEXT}.q_proj.lora_linear_layer.up.weight", f"text_encoder.{TEXT}.q_proj", "up"),
        ("text_encoder_2.text_projection.lora.up.weight", "text_encoder_2.text_projection", "up"),
        ("lora_unet_mid_block_resnets_0_conv1.lora_down.weight", "lora_unet_mid_block_resnets_0_conv1", "down"),
        ("lora_te2_text_projection.alpha", "lora_te2_text_projection", "alpha"),
        ("lycoris_mid_block_resnets_0_conv1.lora_mid.weight", "lora_unet_mid_block_resnets_0_conv1", "mid"),
        ("lycoris_conv_in.hada_w1_a", "lora_unet_conv_in", "hada_w1_a"),
        ("lora_unet_conv_in.lokr_t2", "lora_unet_conv_in", "lokr_t2"),
        ("diffusion_model.input_blocks.1.1.proj_in.lora_A.weight", "lora_unet_input_blocks_1_1_proj_in", "down"),
        ("model.diffusion_model.out.2.lora_B.weight", "lora_unet_out_2", "up"),
        ("output_blocks.1.1.proj_in.lora_up.weight", "lora_unet_output_blocks_1_1_proj_in", "up"),
        ("unet.conv_in.lora_magnitude_vector", "unet.conv_in", "magnitude"),
        ("unet.conv_in.lora_magnitude_vector.weight", "unet.conv_in", "magnitude"),
        ("unet.conv_in.lora_magnitude_vector.default.weight", "unet.conv_in", "magnitude"),
        ("lora_unet_conv_in.dora_scale", "lora_unet_conv_in", "magnitude"),
    ],
    ids=str,
)
def test_key_names_a_layer_and_a_part(key: str, layer: str, part: str) -> None:
    found = split_key(key)
    assert found is not None and (found.layer, found.part) == (layer, part)
    assert key.startswith(found.stem)


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("lora_unet_conv_in.oft_blocks", "OFT, which is not read: merge it into a model with LyCORIS first"),
        ("unet.conv_in.oft_R.weight", "OFT"),
        ("lora_unet_conv_in.a1.weight", "GLoRA, which is not read"),
        ("lora_unet_conv_in.on_input", r"\(IA\)3, which is not read"),
        ("unet.conv_in.ia3_l", r"\(IA\)3"),
        ("base_model.model.conv_in.vera_lambda_b", "VeRA"),
        ("unet.conv_in.lora_B.bias", "LoRA with biases"),
        ("lora_unet_conv_in.diff_b", "full differences of weights"),
        ("lora_unet_conv_in.hada_w3_a", "LoHa or LoKr with unknown parts"),
        ("bundle_emb.thing.string_to_param.*", "a textual inversion, not a LoRA"),
        ("model.diffusion_model.out.2.weight", "a whole model, not a LoRA: give it as the model"),
        ("down_blocks.0.resnets.0.conv1.weight", "a whole model, not a LoRA"),
        ("whatever.x", "whatever.x is not a LoRA weight: only LoRA files of peft, diffusers, kohya and LyCORIS"),
    ],
)
def test_other_formats_are_named(key: str, sentence: str) -> None:
    assert split_key(key) is None
    assert re.search(sentence, describe_format(["z.unknown", key] if "whatever" not in key else [key]))


def test_networks_other_than_a_unet_are_named() -> None:
    assert describe_network(["transformer.single_transformer_blocks.0.attn.to_q"]) == (
        "a transformer network (such as Flux or SD3)"
    )
    assert describe_network(["lora_unet_double_blocks_0_img_attn_qkv"]) == "a transformer network (such as Flux or SD3)"
    assert describe_network(["down_blocks.0.motion_modules.0.proj_in"]) is not None
    assert describe_network(["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"]) is None
    assert describe_network(["lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"]) is None


def test_component_is_read_from_the_name() -> None:
    names = ("unet.a", "lora_unet_a", "text_encoder.a", "lora_te_a", "lora_te1_a", "text_encoder_2.a", "lora_te2_a")
    assert [component_of(name) for name in names] == ["unet"] * 2 + ["text_encoder"] * 3 + ["text_encoder_2"] * 2
