"""LoRA files merged into the weights of a pipeline, against peft's own adapters."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from d2f_fast.errors import ModelError, RefusedInputError
from d2f_fast.lora.inject import inject_lora, lora_layers
from d2f_fast.lora.merge import fuse_adapter, merged_state_dict

SCALE = 0.7  # of the active adapter


def _inputs():
    return torch.randn(2, 4, 8, 8), torch.tensor(673.16), torch.randn(2, 8, 16)


def test_merged_state_gives_the_adapted_output(
    tiny_folder: Path, unet: Any, forward: Any, randomize: Any, relative: Any
) -> None:
    inject_lora(unet, 2, alpha=3.0, conv_rank=3, first_last_layers=True)
    randomize(unet)
    merged = UNet2DConditionModel.from_pretrained(tiny_folder / "unet").eval()
    merged.load_state_dict(merged_state_dict(unet))
    assert relative(forward(merged) - forward(unet), forward(unet)) <= 1e-5


@pytest.mark.parametrize("kind", ["peft", "kohya"])
def test_fused_weights_equal_the_active_adapter(kind, adapted, tiny_folder, relative):
    unet, files = adapted
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder)
    given = _inputs()
    with torch.no_grad():
        base = pipeline.unet(*given).sample
        done = fuse_adapter(pipeline, files[kind], SCALE)
        got, want = pipeline.unet(*given).sample, unet(*given).sample
    assert relative(got - want, want) <= 5e-6
    assert relative(base - want, want) > 0.05
    assert done["layers"] == len(lora_layers(unet)) and done["scale"] == SCALE
    assert done["change"] > 0 and done["relative_change"] > 0


@pytest.mark.parametrize("spelling", ["text_encoder.text_model.", "text_encoder.", "lora_te_text_model_", "lora_te1_"])
def test_text_encoder_layers_are_merged_under_every_name(spelling, tiny_folder, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder)
    weights = {name: module.weight for name, module in pipeline.text_encoder.named_modules() if "q_proj" in name}
    ((name, weight),) = weights.items()
    before = weight.clone()
    a, b = torch.randn(2, 16), torch.randn(16, 2)
    bare = name.removeprefix("text_model.")
    if spelling.startswith("lora_"):
        key = spelling + bare.replace(".", "_")
        tensors = {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": torch.tensor(1.0)}
    else:
        tensors = {f"{spelling}{bare}.lora_A.weight": a, f"{spelling}{bare}.lora_B.weight": b / 2}
    save_file(tensors, tmp_path / "te.safetensors")
    fuse_adapter(pipeline, tmp_path / "te.safetensors", 2.0)
    torch.testing.assert_close(weight, before + b @ a)


@pytest.mark.parametrize(("header", "factor"), [
    ({"unet.lora_alpha": 4, "unet.alpha_pattern": {"attentions.0.proj_in": 8}}, 4),
    ({"unet.lora_alpha": 6}, 3),
    ({"unet.lora_alpha": 6, "unet.use_rslora": True}, 6 / 2**0.5),
    ({}, 1),
], ids=["pattern", "alpha", "rslora", "none"])  # fmt: skip
def test_header_of_a_peft_file_gives_the_scale_that_diffusers_applies(header, factor, tiny_folder, tmp_path):
    name = "mid_block.attentions.0.proj_in"
    a, b = torch.randn(2, 16, 1, 1), torch.randn(16, 2, 1, 1)
    metadata = {"unet.r": 2, "unet.target_modules": [name], **header}
    save_file(
        {f"unet.{name}.lora_A.weight": a, f"unet.{name}.lora_B.weight": b},
        tmp_path / "peft.safetensors",
        {"lora_adapter_metadata": json.dumps(metadata)} if header else {},
    )
    ours, theirs = (StableDiffusionPipeline.from_pretrained(tiny_folder) for _ in range(2))
    before = ours.unet.get_submodule(name).weight.clone()
    fuse_adapter(ours, tmp_path / "peft.safetensors", 1.0)
    merged = ours.unet.get_submodule(name).weight
    torch.testing.assert_close(merged, before + (factor * b.flatten(1) @ a.flatten(1)).reshape(merged.shape))
    theirs.load_lora_weights(tmp_path, weight_name="peft.safetensors")
    theirs.fuse_lora()
    torch.testing.assert_close(merged, theirs.unet.get_submodule(name).base_layer.weight)


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True, "alpha_pattern": {"attn2.to_q": 3}},
        {"alpha_pattern": {r"attn1\.to_k": 5}},
        {"alpha_pattern": {r"down_blocks.*to_k": 5}},
        {"alpha_pattern": {"^down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k": 32}},
        {"alpha_pattern": {"attn1.to_q": 3, "to_q": 30}, "rank_pattern": {"attn2.*": 2}},
    ],
    ids=["rslora", "escaped", "wildcard", "anchored", "first match"],
)
def test_alpha_patterns_scale_as_in_peft(config, tiny_folder, tmp_path, relative):
    adapted, pipeline = (StableDiffusionPipeline.from_pretrained(tiny_folder) for _ in range(2))
    given = _inputs()
    with torch.no_grad():
        base = adapted.unet(*given).sample
    modules = ["to_q", "to_k"]
    adapted.unet.add_adapter(LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=modules, **config))
    adapted.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(adapted.unet),
        unet_lora_adapter_metadata=adapted.unet.peft_config["default"].to_dict() | {"target_modules": modules},
    )
    fuse_adapter(pipeline, tmp_path, 1.0)
    with torch.no_grad():
        got, want = pipeline.unet(*given).sample, adapted.unet(*given).sample
    assert relative(got - want, want) <= 5e-6
    assert relative(base - want, want) > 1e-3


def _file(tmp_path, tensors):
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def test_unusable_file_is_refused_by_name_and_changes_nothing(adapted, tiny_folder, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder)
    before = {key: value.clone() for key, value in pipeline.unet.state_dict().items()}
    good = load_file(adapted[1]["kohya"])
    up = next(key for key in good if key.endswith("lora_up.weight"))
    down = up.replace("lora_up", "lora_down")
    cases = {
        "is not a LoRA weight: only LoRA files of peft and kohya can be read": good
        | {"lora_unet_conv_in.hada_w1_a": torch.ones(2)},
        "layers match this model, not lora_unet_nowhere": good
        | {f"lora_unet_nowhere.lora_{part}.weight": torch.ones(2, 2) for part in ("up", "down")},
        "lacks one of its two matrices": {key: value for key, value in good.items() if key != up},
        "which does not fit this model's": good | {up: torch.ones(7, good[down].shape[0])},
        "changes nothing": {key: value * 0 for key, value in good.items()},
        "holds NaN or infinity": good | {up: good[up] * float("nan")},
    }
    for sentence, tensors in cases.items():
        with pytest.raises(ModelError, match=f"x.safetensors.*{sentence}"):
            fuse_adapter(pipeline, _file(tmp_path, tensors), 1.0)
    (tmp_path / "x.safetensors").write_bytes(b"\x80\x02 pickled")
    with pytest.raises(RefusedInputError, match="a pickle, which can run code"):
        fuse_adapter(pipeline, tmp_path / "x.safetensors", 1.0)
    assert all(torch.equal(value, before[key]) for key, value in pipeline.unet.state_dict().items())
