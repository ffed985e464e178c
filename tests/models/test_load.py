"""Loading of pipelines: the weights that diffusers loads, and a refusal in one line for unusable models."""

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from huggingface_hub.errors import RemoteEntryNotFoundError
from safetensors.torch import load_file, save_file

from d2f_fast import load_miniature
from d2f_fast.errors import ModelError
from d2f_fast.models import load
from d2f_fast.models.base_model import BaseModel
from d2f_fast.models.load import load_pipeline, local_source
from d2f_fast.models.names import MINIATURE
from d2f_fast.models.options import ModelOptions

WEIGHTS = "diffusion_pytorch_model.safetensors"


class Exploit:
    """Unpickling this makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def set_scheduler(**options: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | options))

    return change


def truncate(name: str) -> Callable[[Path], int]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def only_pickles(folder: Path) -> None:
    for path in list(folder.rglob("*.safetensors")):
        path.with_suffix(".bin").write_bytes(pickle.dumps(Exploit(folder / "executed")))
        path.unlink()


def pickled_text_encoder(folder: Path) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    path.with_name("pytorch_model.bin").write_bytes(pickle.dumps(Exploit(folder / "executed")))
    path.unlink()


REFUSALS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no index": (
        lambda folder: (folder / "model_index.json").unlink(),
        "{folder} has no model_index.json: give the folder of a diffusers pipeline",
    ),
    "no scheduler": (
        lambda folder: shutil.rmtree(folder / "scheduler"),
        "{folder}/scheduler/scheduler_config.json is missing: it holds the prediction type",
    ),
    "index not JSON": (
        lambda folder: (folder / "model_index.json").write_text("{"),
        "{folder}/model_index.json is not a JSON object",
    ),
    "unknown prediction type": (
        set_scheduler(prediction_type="score"),
        "{folder}: scheduler_config.json: prediction_type must be epsilon, v_prediction, sample or flow_prediction, got"
        " score: state it with --prediction_type",
    ),
    "ε at zero terminal SNR": (
        set_scheduler(rescale_betas_zero_snr=True),
        "{folder}: prediction_type 'epsilon' with zero terminal SNR: ",
    ),
    "only pickles": (only_pickles, "{folder}/unet holds a pickle, which can run code: give the model as safetensors"),
    "pickled text encoder": (pickled_text_encoder, "text_encoder"),
    "no weights": (lambda folder: (folder / "vae" / WEIGHTS).unlink(), "{folder}/vae holds no weights: give the model"),
    "truncated unet": (
        truncate(f"unet/{WEIGHTS}"),
        "{folder}/unet/diffusion_pytorch_model.safetensors: not an intact safetensors file",
    ),
    "truncated vae": (
        truncate(f"vae/{WEIGHTS}"),
        "{folder}/vae/diffusion_pytorch_model.safetensors: not an intact safetensors file",
    ),
    "truncated text encoder": (
        truncate("text_encoder/model.safetensors"),
        "{folder}/text_encoder/model.safetensors: not an intact safetensors file",
    ),
    "no tokenizer": (lambda folder: shutil.rmtree(folder / "tokenizer"), "{folder}/tokenizer holds no tokenizer"),
    "config of another unet": (
        lambda folder: (folder / "unet" / "config.json").write_text(
            (folder / "unet" / "config.json")
            .read_text()
            .replace('"cross_attention_dim": 16', '"cross_attention_dim": 24')
        ),
        "{folder} cannot be loaded: ",
    ),
}


@pytest.mark.parametrize("damage", REFUSALS)
def test_damaged_folder_is_refused_in_one_line(folder: Path, damage: str) -> None:
    change, sentence = REFUSALS[damage]
    change(folder)
    with pytest.raises(ModelError, match=re.escape(sentence.format(folder=folder))) as caught:
        BaseModel.load(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert not (folder / "executed").exists()


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.bin", "model.pth", "model.pkl"])
def test_pickle_is_refused_and_not_executed(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Exploit(tmp_path / "executed")))
    sentence = f"{tmp_path / name} is a pickle, which can run code: convert it to safetensors first"
    with pytest.raises(ModelError, match=re.escape(sentence)):
        BaseModel.load(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_pickle_beside_safetensors_is_not_read(folder: Path, pipeline: Any) -> None:
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Exploit(folder / "executed")))
    loaded = BaseModel.load(folder)
    assert torch.equal(loaded.unet.conv_in.weight, pipeline.unet.conv_in.weight)
    assert not (folder / "executed").exists()


def test_missing_path_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", Path("./nowhere")):
        given = str(path) if path.is_absolute() else f"./{path}"
        with pytest.raises(ModelError, match=r"nowhere does not exist: give a hub id, a pipeline folder or"):
            BaseModel.load(given)


def test_single_file_that_is_not_a_model_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(400)}, tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-100])
    (tmp_path / "garbage.safetensors").write_bytes(b"\xff" * 100)
    for name in ("cut", "garbage", "missing"):
        path = tmp_path / f"{name}.safetensors"
        with pytest.raises(ModelError, match=rf"^{re.escape(str(path))}: (not an|no such)") as caught:
            BaseModel.load(path)
        assert "\n" not in str(caught.value)


def test_embedded_miniature_is_loaded_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / MINIATURE).mkdir()
    monkeypatch.chdir(tmp_path)
    expected = load_miniature().unet.state_dict()
    for pipeline, dtype in (
        (load_pipeline("miniature"), torch.float32),
        (BaseModel.load("miniature", torch.bfloat16).pipeline, torch.bfloat16),
    ):
        state = pipeline.unet.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key].to(dtype)) for key in expected)
    with pytest.raises(ModelError, match=r"^miniature has no model_index\.json"):
        load_pipeline("./miniature")


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_is_not_finite_is_refused(folder: Path, name: str, value: float) -> None:
    (path,) = (folder / name).glob("*.safetensors")
    tensors = load_file(path)
    key = sorted(tensors)[0]
    tensors[key].view(-1)[0] = value
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"{re.escape(str(folder))}: \S+ of the {name} holds NaN or infinity"):
        load_pipeline(folder)


def test_hub_id_is_downloaded_once_with_its_tags(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot, asked = folder.rename(folder.with_name("f" * 40)), []

    def download(hub_id: str, **options: Any) -> str:
        asked.append((hub_id, options["revision"]))
        return str(snapshot)

    def download_file(hub_id: str, name: str, revision: str) -> None:
        asked.append((name, revision))
        if hub_id == "owner/plain":
            raise RemoteEntryNotFoundError("404", response=MagicMock())

    monkeypatch.setattr(load, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(load.DiffusionPipeline, "download", download)
    monkeypatch.setattr(load, "hf_hub_download", download_file)
    for hub_id in ("owner/tagged", "owner/plain"):
        asked.clear()
        assert local_source(hub_id, ModelOptions(revision="v2")) == str(snapshot)
        load_pipeline(hub_id, options=ModelOptions(revision="v2"))
        assert asked == [(hub_id, "v2"), ("d2f.json", "f" * 40)]
    for name in (MINIATURE, str(snapshot)):
        assert local_source(name) == name
