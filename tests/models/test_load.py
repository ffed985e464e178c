"""Loading of pipelines: the weights that diffusers loads, and a refusal in one line for unusable models."""

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from d2f_fast import load_miniature
from d2f_fast.errors import ModelError
from d2f_fast.models.base_model import BaseModel
from d2f_fast.models.load import load_pipeline
from d2f_fast.models.names import MINIATURE

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
        "{folder}: prediction_type must be one of ('epsilon', 'v_prediction', 'sample'), got 'score'",
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
        "{folder}/unet/diffusion_pytorch_model.safetensors is not an intact safetensors file",
    ),
    "truncated vae": (
        truncate(f"vae/{WEIGHTS}"),
        "{folder}/vae/diffusion_pytorch_model.safetensors is not an intact safetensors file",
    ),
    "truncated text encoder": (
        truncate("text_encoder/model.safetensors"),
        "{folder}/text_encoder/model.safetensors is not an intact safetensors file",
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
        with pytest.raises(ModelError, match=rf"^{re.escape(str(path))} cannot be loaded: ") as caught:
            BaseModel.load(path)
        assert "\n" not in str(caught.value)


def original_keys(pipeline: Any) -> dict[str, Tensor]:
    """The tiny model's weights under the names of the original Stable Diffusion, as single files have them."""
    resnet = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"}
    resnet |= {"conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    blocks = {
        "conv_in": "input_blocks.0.0",
        "down_blocks.0.resnets.0": "input_blocks.1.0",
        "down_blocks.0.attentions.0": "input_blocks.1.1",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
        "down_blocks.1.resnets.0": "input_blocks.3.0",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "up_blocks.0.resnets.0": "output_blocks.0.0",
        "up_blocks.0.resnets.1": "output_blocks.1.0",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv",
        "up_blocks.1.resnets.0": "output_blocks.2.0",
        "up_blocks.1.attentions.0": "output_blocks.2.1",
        "up_blocks.1.resnets.1": "output_blocks.3.0",
        "up_blocks.1.attentions.1": "output_blocks.3.1",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    unet = {}
    for name, tensor in pipeline.unet.state_dict().items():
        ours, theirs = next(pair for pair in blocks.items() if name.startswith(f"{pair[0]}."))
        rest = name.removeprefix(f"{ours}.")
        part = rest.partition(".")[0]
        unet[f"{theirs}.{rest.replace(part, resnet[part], 1) if 'resnets' in ours else rest}"] = tensor
    vae = {}
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    for name, tensor in pipeline.vae.state_dict().items():
        name = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", name)
        name = re.sub(r"up_blocks\.(\d)\.resnets\.", lambda found: f"up.{1 - int(found[1])}.block.", name)
        name = name.replace("down_blocks.0.downsamplers.0", "down.0.downsample")
        name = name.replace("up_blocks.0.upsamplers.0", "up.1.upsample")
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
        name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_norm_out", "norm_out")
        for ours, theirs in attention.items():
            if f"attn_1.{ours}." in name:
                name = name.replace(ours, theirs)
                tensor = tensor[..., None, None] if tensor.ndim == 2 else tensor  # convolutions there
        vae[name.replace("conv_shortcut", "nin_shortcut")] = tensor
    text = pipeline.text_encoder.state_dict()
    named = {f"model.diffusion_model.{name}": tensor for name, tensor in unet.items()}
    named |= {f"first_stage_model.{name}": tensor for name, tensor in vae.items()}
    # transformers 5.6 dropped "text_model" from the names.
    named |= {f"cond_stage_model.transformer.text_model.{n.removeprefix('text_model.')}": x for n, x in text.items()}
    return {name: tensor.contiguous() for name, tensor in named.items()}


@pytest.fixture
def hub(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of the hub, which diffusers takes a single file's configuration from: the tiny model's, as SD1.5's."""
    cached = tmp_path / "hub/models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text("0" * 40)
    shutil.copytree(tiny_folder, cached / "snapshots" / ("0" * 40), ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return cached


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_single_file_gives_the_model_that_it_was_made_from(
    hub: Path, tmp_path: Path, pipeline: Any, dtype: torch.dtype
) -> None:
    save_file(original_keys(pipeline), tmp_path / "x.safetensors")
    got = BaseModel.load(tmp_path / "x.safetensors", dtype)
    for name in ("unet", "vae", "text_encoder"):
        want = getattr(pipeline, name).state_dict()
        state = getattr(got.pipeline, name).state_dict()
        assert state.keys() == want.keys()
        assert all(torch.equal(state[key], want[key].to(dtype)) for key in want)
    assert got.alignment.t_min == BaseModel(pipeline).alignment.t_min


@pytest.mark.parametrize("part", ["cond_stage_model", "first_stage_model"])
def test_single_file_without_a_part_is_refused(hub: Path, tmp_path: Path, pipeline: Any, part: str) -> None:
    weights = {name: tensor for name, tensor in original_keys(pipeline).items() if not name.startswith(part)}
    save_file(weights, tmp_path / "x.safetensors")
    said = r"x\.safetensors: Failed to load \w+\. .* missing in the checkpoint\. Give a file with every part, or a pipe"
    with pytest.raises(ModelError, match=said) as caught:
        BaseModel.load(tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value)


def test_single_file_without_a_reachable_configuration_is_refused(hub: Path, tmp_path: Path, pipeline: Any) -> None:
    shutil.rmtree(hub)
    save_file(original_keys(pipeline), tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=r"x\.safetensors cannot be loaded: ") as caught:
        BaseModel.load(tmp_path / "x.safetensors")
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
