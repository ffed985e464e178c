"""Models between a diffusers folder and a single file, against diffusers' own reader of single files."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from d2f_fast.errors import CheckpointError, ModelError, RefusedInputError
from d2f_fast.lora.merge import fuse_adapter
from d2f_fast.models.convert import (
    read_model,
    stored_dtype,
    tags_of_model,
    weights_of_pipeline,
    with_lora,
    write_folder,
    write_single_file,
)
from d2f_fast.models.load import load_pipeline
from d2f_fast.models.options import ModelOptions

FAMILIES = ("sd1", "sd2", "sdxl")
ARCHITECTURES = {
    "sd1": ("stable-diffusion-v1", "epsilon"),
    "sd2": ("stable-diffusion-v2-768-v", "v"),
    "sdxl": ("stable-diffusion-xl-v1-base", "epsilon"),
}


@pytest.fixture(scope="session")
def single_file(shared_folder: Any, narrow_pipeline: Callable[[str], Path]) -> Callable[[str], Path]:
    """Return the function `single_file(family)`: a single file of the narrow pipeline."""

    def make(family: str) -> Callable[[Path], object]:
        model = narrow_pipeline(family)
        return lambda folder: write_single_file(read_model(str(model)), folder / "model.safetensors")

    return lambda family: shared_folder(f"single-{family}", make(family)) / "model.safetensors"


def load_with_diffusers(file: Path, config: Path) -> Any:
    """Return the pipeline that diffusers reads from a single file, with the configuration of a folder."""
    kind = StableDiffusionXLPipeline if (config / "text_encoder_2").exists() else StableDiffusionPipeline
    options = {} if kind is StableDiffusionXLPipeline else {"safety_checker": None}
    return kind.from_single_file(str(file), config=str(config), local_files_only=True, **options)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_reads_the_single_file_to_the_same_weights(
    family: str, narrow_pipeline: Any, single_file: Any
) -> None:
    folder = narrow_pipeline(family)
    read = load_with_diffusers(single_file(family), folder)
    base = type(read).from_pretrained(folder)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if getattr(base, name, None) is not None:
            want, got = getattr(base, name).state_dict(), getattr(read, name).state_dict()
            assert want.keys() == got.keys()
            assert [key for key in want if not torch.equal(want[key], got[key])] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_header_names_the_family_and_the_prediction_type(family: str, single_file: Any) -> None:
    with safe_open(single_file(family), framework="pt") as file:
        header, keys = file.metadata(), set(file.keys())
    assert (header["modelspec.architecture"], header["modelspec.prediction_type"]) == ARCHITECTURES[family]
    assert header["modelspec.title"] == f"narrow-{family}"
    assert ("v_pred" in keys) == (family == "sd2") and "ztsnr" not in keys


def test_zero_snr_of_a_v_prediction_model_is_marked(narrow_pipeline: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(narrow_pipeline("sd1"), tmp_path / "model"))
    path = folder / "scheduler" / "scheduler_config.json"
    changed = json.loads(path.read_text()) | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    path.write_text(json.dumps(changed))
    assert write_single_file(read_model(str(folder)), tmp_path / "v.safetensors") == []
    tensors = load_file(tmp_path / "v.safetensors")
    assert tensors["v_pred"].shape == tensors["ztsnr"].shape == (0,)


def test_folder_with_a_flow_matching_scheduler_says_that_the_network_predicts_the_flow(
    narrow_pipeline: Any, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(narrow_pipeline("sd1"), tmp_path / "model"))
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    assert read_model(str(folder)).prediction_type == "flow_prediction"


def test_two_conversions_are_equal_byte_for_byte(narrow_pipeline: Any, single_file: Any, tmp_path: Path) -> None:
    folder = narrow_pipeline("sdxl")
    write_single_file(read_model(str(folder)), tmp_path / "again.safetensors")
    assert sha256(tmp_path / "again.safetensors") == sha256(single_file("sdxl"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_are_rounded_once_to_the_type(dtype: torch.dtype, narrow_pipeline: Any, tmp_path: Path) -> None:
    folder = narrow_pipeline("sd1")
    write_single_file(read_model(str(folder)), tmp_path / "half.safetensors", dtype)
    tensors = load_file(tmp_path / "half.safetensors")
    full = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(tensors["model.diffusion_model.out.2.weight"], full["conv_out.weight"].to(dtype))
    assert {tensor.dtype for tensor in tensors.values()} == {dtype, torch.int64}
    assert stored_dtype(str(tmp_path / "half.safetensors")) == dtype


def test_pipeline_in_memory_gives_the_same_file_as_its_folder(
    narrow_pipeline: Any, single_file: Any, tmp_path: Path
) -> None:
    folder = narrow_pipeline("sd2")
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    write_single_file(weights_of_pipeline(pipeline, str(folder), {}), tmp_path / "memory.safetensors")
    assert sha256(tmp_path / "memory.safetensors") == sha256(single_file("sd2"))


def test_shards_and_variants_are_read(narrow_pipeline: Any, single_file: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(narrow_pipeline("sd1"), tmp_path / "narrow-sd1"))
    whole = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    keys = sorted(tensors)
    for i, part in enumerate((keys[::2], keys[1::2]), 1):
        save_file({key: tensors[key] for key in part}, whole.with_stem(f"{whole.stem}-0000{i}-of-00002"))
    whole.unlink()
    encoder = folder / "text_encoder" / "model.safetensors"
    encoder.rename(encoder.with_name("model.fp16.safetensors"))
    write_single_file(read_model(str(folder)), tmp_path / "out.safetensors")
    assert sha256(tmp_path / "out.safetensors") == sha256(single_file("sd1"))

    whole.with_stem(f"{whole.stem}-00001-of-00002").unlink()
    with pytest.raises(ModelError, match="holds 1 of 2 files of its weights"):
        read_model(str(folder))


def test_tags_of_the_folder_are_kept(narrow_pipeline: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(narrow_pipeline("sd1"), tmp_path / "model"))
    tags = {"d2f.objective": "diff2flow", "d2f.shift": "1.0"}
    (folder / "d2f.json").write_text(json.dumps(tags | {"other": "x"}))
    write_single_file(read_model(str(folder)), tmp_path / "out.safetensors")
    assert tags_of_model(str(tmp_path / "out.safetensors")) == tags
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    write_folder(pipeline, tmp_path / "again", torch.float16, tags)
    assert tags_of_model(str(tmp_path / "again")) == tags
    assert stored_dtype(str(tmp_path / "again")) == torch.float16


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_lora_are_merged_into_each_component_and_rounded_once(
    family: str, narrow_pipeline: Any, tmp_path: Path
) -> None:
    folder = narrow_pipeline(family)
    kind = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    pipeline: Any = kind.from_pretrained(folder)
    names = {"lora_te1" if family == "sdxl" else "lora_te": 12} | ({"lora_te2": 16} if family == "sdxl" else {})
    tensors = {"lora_unet_conv_in.lora_down.weight": torch.randn(2, 4, 3, 3)}
    tensors |= {"lora_unet_conv_in.lora_up.weight": torch.randn(8, 2, 1, 1)}
    for prefix, width in names.items():
        name = f"{prefix}_text_model_encoder_layers_1_self_attn_q_proj"
        tensors |= {f"{name}.lora_down.weight": torch.randn(2, width)}
        tensors |= {f"{name}.lora_up.weight": torch.randn(width, 2)}
    save_file(tensors, tmp_path / "lora.safetensors")
    loras = [(tmp_path / "lora.safetensors", 0.7), (tmp_path / "lora.safetensors", -0.2)]
    merged = with_lora(read_model(str(folder)), loras, torch.float16)
    for path, scale in loras:
        fuse_adapter(pipeline, path, scale)
    for component in merged.components:
        want = weights_of_pipeline(pipeline, "", {}).components[component]
        for key, tensor in merged.components[component].items():
            assert torch.equal(tensor.to(torch.float16).load(), want[key].to(torch.float16).load()), key


def test_what_a_single_file_cannot_hold_is_said(narrow_pipeline: Any, tmp_path: Path) -> None:
    model = read_model(str(narrow_pipeline("sd1")))
    model.configs["vae"] = {**model.configs["vae"], "scaling_factor": 0.5}
    model.configs["scheduler"] = {**model.configs["scheduler"], "beta_end": 0.02}
    first, second = write_single_file(model, tmp_path / "a.safetensors")
    assert first.startswith("a single file cannot hold the autoencoder's scaling factor 0.5")
    assert second.startswith("a single file cannot hold the noise schedule")
    model.configs["scheduler"] = {**model.configs["scheduler"], "prediction_type": "flow_prediction"}
    assert "prediction type flow_prediction" in write_single_file(model, tmp_path / "a.safetensors")[1]
    padding = "a single file cannot hold the autoencoder's padding by reflection; other programs pad by zeros"
    tagged = replace(model, tags={"d2f.vae_reflection_padding": "true"})
    assert padding in write_single_file(tagged, tmp_path / "a.safetensors")
    model.configs["vae"] = {**model.configs["vae"], "reflection_padding": True}
    assert padding in write_single_file(model, tmp_path / "a.safetensors")


def test_title_of_the_result_of_a_run_is_the_name_of_the_run(narrow_pipeline: Any, tmp_path: Path) -> None:
    model = read_model(str(narrow_pipeline("sd1")))
    assert replace(model, source=str(tmp_path / "owls" / "pipeline")).title == "owls"
    assert replace(model, source=str(tmp_path / "owls.safetensors")).title == "owls"


def test_weight_that_is_not_finite_or_too_large_leaves_no_file(narrow_pipeline: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(narrow_pipeline("sd1"), tmp_path / "model"))
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_out.bias"][0] = 1e5
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"out\.2\.bias holds NaN, infinity or a number too large for F16"):
        write_single_file(read_model(str(folder)), tmp_path / "a.safetensors", torch.float16)
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"conv_out\.bias of the unet holds NaN, infinity or a number too large"):
        write_folder(pipeline, tmp_path / "out", torch.float16, {})
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_model_of_no_known_family_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"neither Stable Diffusion 1\.x, 2\.x nor SDXL"):
        write_single_file(read_model(str(tiny_folder)), tmp_path / "a.safetensors")


def test_pickled_weights_are_refused(narrow_pipeline: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(narrow_pipeline("sd1"), tmp_path / "model"))
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(ModelError, match="vae holds a pickle, which can run code: give the model as safetensors"):
        read_model(str(folder))


def test_unknown_prediction_type_is_refused_with_its_file(narrow_pipeline: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(narrow_pipeline("sd1"), tmp_path / "model"))
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "banana"}))
    sentence = r"scheduler_config\.json: prediction_type must be epsilon, .* or flow_prediction, got banana"
    for read in (read_model, load_pipeline):
        with pytest.raises(ModelError, match=sentence):
            read(str(folder))
    stated = ModelOptions(prediction_type="v_prediction")
    assert read_model(str(folder), stated).prediction_type == "v_prediction"


def test_existing_folder_is_kept_unless_it_may_be_replaced(narrow_pipeline: Any, tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(narrow_pipeline("sd1"))
    (tmp_path / "out").mkdir()
    with pytest.raises(RefusedInputError, match="exists"):
        write_folder(pipeline, tmp_path / "out", torch.float32, {})
    assert not list((tmp_path / "out").iterdir())
    write_folder(pipeline, tmp_path / "out", torch.float32, {}, overwrite=True)
    assert (tmp_path / "out" / "model_index.json").is_file()
