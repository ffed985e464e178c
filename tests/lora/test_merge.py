"""LoRA files merged into the weights of a pipeline, against peft's own adapters."""

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

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


@pytest.fixture(scope="module")
def pipeline(tiny_folder: Path) -> Iterator[Any]:
    """Pipeline that each test finds as it was: see `fresh`."""
    yield StableDiffusionPipeline.from_pretrained(tiny_folder)


@pytest.fixture
def fresh(pipeline: Any) -> Iterator[Any]:
    """Pipeline whose weights are restored after the test."""
    models = (pipeline.unet, pipeline.text_encoder)
    states = [copy.deepcopy(model.state_dict()) for model in models]
    yield pipeline
    for model, state in zip(models, states, strict=True):
        model.load_state_dict(state)


def relative_effect(merged: Mapping[str, Tensor], before: Mapping[str, Tensor], deltas: Mapping[str, Tensor]) -> float:
    """Return the error of merged weights, relative to the reference effect; the other weights must be as before."""
    wrong = expected = 0.0
    for key, value in merged.items():
        delta = deltas.get(key, torch.zeros(value.shape)).double().reshape(value.shape)
        wrong += (value.double() - before[key].double() - delta).square().sum().item()
        expected += delta.square().sum().item()
    return float((wrong / expected) ** 0.5)


FORMS = (
    *(
        "peft",
        "unprefixed",
        "base_model",
        "diffusers",
        "processors",
        "kohya",
        "kohya sgm",
        "lycoris",
        "diffusion_model",
    ),
    *("lora", "rslora", "dora", "loha", "loha with cores", "lokr", "lokr in whole factors", "lokr in four"),
)


@pytest.mark.parametrize("form", FORMS)
def test_effect_of_each_form_is_the_reference_effect(form: str, fresh: Any, tmp_path: Path, write_form: Any) -> None:
    """Check against the definition, and against peft's own merge for the adapters that peft makes and saves."""
    before = copy.deepcopy(fresh.unet.state_dict())
    path, deltas = write_form(form, fresh.unet, tmp_path)
    scale = 1.0 if form == "dora" else 0.7
    done = fuse_adapter(fresh, path, scale)
    assert done["layers"] == len(deltas)
    error = relative_effect(fresh.unet.state_dict(), before, {key: scale * delta for key, delta in deltas.items()})
    print(f"\n{form}: effect error {error:.1e}")
    assert error <= 1e-6


def test_dora_that_diffusers_saved_gives_its_output(fresh: Any, tmp_path: Path, relative: Any) -> None:
    given = _inputs()
    adapted = copy.deepcopy(fresh.unet)
    adapted.add_adapter(LoraConfig(r=4, lora_alpha=6, use_dora=True, init_lora_weights=False, target_modules=["to_q"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "magnitude" in name:
                parameter *= 1.5
        base, want = fresh.unet(*given).sample, adapted(*given).sample
        fresh.save_lora_weights(
            tmp_path,
            unet_lora_layers=get_peft_model_state_dict(adapted),
            unet_lora_adapter_metadata=adapted.peft_config["default"].to_dict() | {"target_modules": ["to_q"]},
        )
        fuse_adapter(fresh, tmp_path, 1.0)
        got = fresh.unet(*given).sample
    assert relative(got - want, want) <= 5e-6 < 1e-2 < relative(base - want, want)


def test_half_of_dora_goes_half_of_the_way(fresh: Any, tmp_path: Path, write_form: Any) -> None:
    before = copy.deepcopy(fresh.unet.state_dict())
    _, deltas = write_form("dora", fresh.unet, tmp_path)
    fuse_adapter(fresh, tmp_path, 0.5)
    half = {key: delta / 2 for key, delta in deltas.items()}
    assert relative_effect(fresh.unet.state_dict(), before, half) <= 1e-6


@pytest.mark.parametrize("kind", ["loha", "lokr", "dora"])
def test_names_of_lycoris_give_the_same_effect_as_those_of_peft(
    kind: str, fresh: Any, tmp_path: Path, write_form: Any
) -> None:
    before = copy.deepcopy(fresh.unet.state_dict())
    _, deltas = write_form(kind, fresh.unet, tmp_path)
    first = {"loha": "hada_", "lokr": "lokr_", "dora": "lora_"}[kind]
    names = {
        "lora_A.weight": "lora_down.weight",
        "lora_B.weight": "lora_up.weight",
        "lora_magnitude_vector": "dora_scale",
    }
    renamed = {}
    for key, value in load_file(tmp_path / "adapter_model.safetensors").items():
        layer, _, part = key.removeprefix("base_model.model.").partition(f".{first}")
        part = names.get(first + part, first + part)
        name = f"lycoris_{layer.replace('.', '_')}"
        # LyCORIS has no scale where both factors are whole, as the first one always is here.
        renamed[f"{name}.{part}"] = value * 1.5 if part == "lokr_w2" else value
        renamed[f"{name}.alpha"] = torch.tensor(6.0 if kind == "dora" else 3.0)
    fuse_adapter(fresh, _file(tmp_path / "renamed", renamed), 1.0)
    assert relative_effect(fresh.unet.state_dict(), before, deltas) <= 1e-6


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


def _file(tmp_path: Path, tensors: Mapping[str, Tensor]) -> Path:
    tmp_path.mkdir(exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def test_unusable_file_is_refused_by_name_and_changes_nothing(adapted, tiny_folder, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder)
    before = {key: value.clone() for key, value in pipeline.unet.state_dict().items()}
    good = load_file(adapted[1]["kohya"])
    up = next(key for key in good if key.endswith("lora_up.weight"))
    down = up.replace("lora_up", "lora_down")
    cases = {
        "lora_unet_conv_in lacks one of its two matrices": good | {"lora_unet_conv_in.hada_w1_a": torch.ones(2)},
        "layers exist in this model, and lora_unet_nowhere is not one of them": good
        | {f"lora_unet_nowhere.{part}": torch.ones(2, 2) for part in ("lora_up.weight", "lora_down.weight")}
        | {"lora_unet_nowhere.alpha": torch.tensor(2.0)},
        "lacks one of its two matrices": {key: value for key, value in good.items() if key != up},
        "which does not fit this model's": good | {up: torch.ones(7, good[down].shape[0])},
        "changes nothing": {key: value if "alpha" in key else value * 0 for key, value in good.items()},
        "holds NaN or infinity": good | {up: good[up] * float("nan")},
        "holds numbers that are too large": good | {up: good[up] * 1e30},
    }
    for sentence, tensors in cases.items():
        with pytest.raises(ModelError, match=f"x.safetensors.*{sentence}"):
            fuse_adapter(pipeline, _file(tmp_path, tensors), 1.0)
    (tmp_path / "x.safetensors").write_bytes(b"\x80\x02 pickled")
    with pytest.raises(RefusedInputError, match="a pickle, which can run code"):
        fuse_adapter(pipeline, tmp_path / "x.safetensors", 1.0)
    assert all(torch.equal(value, before[key]) for key, value in pipeline.unet.state_dict().items())
