"""Folders of pipelines: variants, shards, and models in the hub's cache without a network."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from d2f_fast.errors import ModelError
from d2f_fast.models.convert import read_model
from d2f_fast.models.folder import check_folder
from d2f_fast.models.load import load_model, load_pipeline
from d2f_fast.models.options import ModelOptions
from d2f_fast.training.network import check_trainable

WEIGHTS = "diffusion_pytorch_model"


def load(path: Path) -> list[tuple[str, torch.Tensor]]:
    return list(load_file(path).items())


def as_half_variant(folder: Path) -> None:
    """Rename the weights of a folder to those of the variant fp16, and round them to float16."""
    for path in list(folder.glob("*/*.safetensors")):
        tensors = {key: value.half() for key, value in load_file(path).items()}
        save_file(tensors, path.with_name(f"{path.stem}.fp16.safetensors"), metadata={"format": "pt"})
        path.unlink()


def test_half_precision_variant_loads_in_float32_and_can_be_trained(folder: Path, pipeline: Any) -> None:
    from d2f_fast.config import TrainingConfig
    from d2f_fast.models.base_model import BaseModel

    as_half_variant(folder)
    with pytest.raises(ModelError, match=r"unet holds weights of the variant fp16 alone: add --variant fp16"):
        load_pipeline(folder)
    model = BaseModel.load(folder, options=ModelOptions(variant="fp16"))
    for name in ("unet", "vae", "text_encoder"):
        for key, value in getattr(pipeline, name).state_dict().items():
            assert torch.equal(getattr(model.pipeline, name).state_dict()[key], value.half().float())
    check_trainable(model, TrainingConfig(resolution=16))
    with pytest.raises(ModelError, match="unet holds weights of the variant fp16 alone"):
        load_pipeline(folder, options=ModelOptions(variant="ema"))


@pytest.mark.parametrize(("types", "expected"), [
    (("float16",), torch.float16), (("bfloat16",), torch.bfloat16), (("float32",), torch.float32),
    (("float16", "bfloat16"), torch.float32), (("float16", "float32"), torch.float32),
])  # fmt: skip
def test_unet_keeps_the_half_precision_type_of_its_file_where_wanted(
    folder: Path, pipeline: Any, types: tuple[str, ...], expected: torch.dtype
) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    stored = {key: value.to(getattr(torch, types[i % len(types)])) for i, (key, value) in enumerate(load(path))}
    save_file(stored, path, metadata={"format": "pt"})
    loaded: Any = load_model(folder, unet_as_stored=True).pipeline
    assert {value.dtype for value in loaded.unet.parameters()} == {expected}
    assert all(torch.equal(loaded.unet.state_dict()[key].float(), value.float()) for key, value in stored.items())
    assert {value.dtype for value in loaded.vae.parameters()} == {torch.float32}
    assert {value.dtype for value in load_pipeline(folder).unet.parameters()} == {torch.float32}


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_weights_that_are_whole_numbers_are_refused_by_loading_and_conversion(folder: Path, component: str) -> None:
    (path,) = (folder / component).glob("*.safetensors")
    tensors = load_file(path)
    first = min(tensors)
    save_file(tensors | {first: tensors[first].to(torch.int8)}, path, metadata={"format": "pt"})
    sentence = rf"{path}: {first} is of type I8, which holds no weights: give a model in float32, float16 or bfloat16"
    for read in (load_pipeline, read_model):
        with pytest.raises(ModelError, match=sentence):
            read(str(folder))


def test_folder_of_a_run_or_a_lora_is_refused_with_what_to_give(folder: Path, tmp_path: Path) -> None:
    for name in ("full", "lora"):
        (tmp_path / name).mkdir()
    folder.rename(tmp_path / "full" / "pipeline")
    with pytest.raises(ModelError, match=r"full is the folder of a run: give .*full/pipeline, the model that it train"):
        load_pipeline(tmp_path / "full")
    (tmp_path / "lora" / "lora_kohya.safetensors").touch()
    with pytest.raises(ModelError, match=r"lora holds a LoRA, not a model: give the model that it belongs to, and"):
        load_pipeline(tmp_path / "lora")


def test_variant_that_a_folder_lacks_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="unet holds no weights of the variant fp16: leave --variant out"):
        load_pipeline(folder, options=ModelOptions(variant="fp16"))


def divide(folder: Path) -> Path:
    """Divide the UNet's weights into two shards, and return their index."""
    path = folder / "unet" / f"{WEIGHTS}.safetensors"
    tensors = load_file(path)
    shards: dict[str, dict[str, torch.Tensor]] = {f"{WEIGHTS}-0000{i}-of-00002.safetensors": {} for i in (1, 2)}
    for i, (key, value) in enumerate(tensors.items()):
        list(shards.values())[i % 2][key] = value
    for name, part in shards.items():
        save_file(part, folder / "unet" / name, metadata={"format": "pt"})
    path.unlink()
    index = folder / "unet" / f"{WEIGHTS}.safetensors.index.json"
    names = {key: name for name, part in shards.items() for key in part}
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    return index


def test_divided_weights_load(folder: Path, pipeline: Any) -> None:
    divide(folder)
    loaded: Any = load_pipeline(folder)
    state = loaded.unet.state_dict()
    assert all(torch.equal(state[key], value) for key, value in pipeline.unet.state_dict().items())


INDEXES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "pickle": (
        lambda map_: map_.update(x="pytorch_model.bin"),
        "names pytorch_model.bin, which is not a safetensors file",
    ),
    "elsewhere": (
        lambda map_: map_.update(x="../x.safetensors"),
        r"names \.\./x\.safetensors, which is not a safetensors",
    ),
    "no text": (lambda map_: map_.update(x=3), "is not the index of a divided safetensors file"),
    "missing": (lambda map_: map_.update(x="gone.safetensors"), "gone.safetensors is missing, which"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_index_that_names_other_files_is_refused(folder: Path, case: str) -> None:
    index = divide(folder)
    content = json.loads(index.read_text())
    change, sentence = INDEXES[case]
    change(content["weight_map"])
    index.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=sentence) as caught:
        check_folder(folder)
    assert str(index.parent) in str(caught.value) and "\n" not in str(caught.value)
    index.write_text("[]")
    with pytest.raises(ModelError, match="is not the index of a divided safetensors file"):
        check_folder(folder)


@pytest.fixture
def cache(tiny_folder: Path, cached_as: Callable[[str, Path], Path]) -> Path:
    """Snapshot of the tiny model in the cache of the hub, as "owner/tiny"."""
    return cached_as("owner/tiny", tiny_folder)


def test_cached_model_loads_without_a_network(cache: Path, pipeline: Any) -> None:
    for options in (None, ModelOptions(revision="main")):
        loaded: Any = load_pipeline("owner/tiny", options=options)
        assert torch.equal(loaded.unet.conv_in.weight, pipeline.unet.conv_in.weight)


def test_model_that_is_not_in_the_cache_is_refused_with_the_cure(cache: Path) -> None:
    (cache / "vae" / f"{WEIGHTS}.safetensors").unlink()
    for model, options, sentence in (
        ("owner/other", {}, "owner/other is neither a folder nor in the hub's cache .*: run `hf download owner/other`"),
        ("owner/tiny", {"revision": "v2"}, "run `hf download owner/tiny --revision v2` with a network first"),
        ("not a name", {}, "not a name is neither a folder nor in the hub's cache"),
        (
            "owner/tiny",
            {},
            "owner/tiny is not complete in the hub's cache: .*/vae holds no weights.*; run `hf",
        ),
    ):
        with pytest.raises(ModelError, match=sentence) as caught:
            load_pipeline(model, options=ModelOptions(**options))  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
