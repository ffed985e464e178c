"""`d2f convert`: each way of converting, and what is refused."""

import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from d2f_fast.commands.checks import check_readers
from d2f_fast.commands.convert import Convert
from d2f_fast.commands.main import main
from d2f_fast.errors import ModelError
from d2f_fast.files.lock import locked_place
from d2f_fast.lora.merge import fuse_adapter
from d2f_fast.lora.read import read_lora
from d2f_fast.lora.tags import lora_tags
from d2f_fast.models import single_file_header
from d2f_fast.models.convert import read_model, tags_of_model
from d2f_fast.models.options import ModelOptions
from d2f_fast.models.tags import lowest_guidance, options_of_training, saved_tags

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def convert(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Function that runs the command, which must succeed, and returns its result."""

    def run(*arguments: object) -> dict[str, Any]:
        assert main(["convert", *map(str, arguments), "--json"]) == 0
        return dict(json.loads(capsys.readouterr().out))

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Function that runs the command, which must be refused in one line, and returns the line."""

    def run(*arguments: object) -> str:
        assert main(["convert", *map(str, arguments)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return str(line)

    return run


@pytest.fixture(scope="session")
def loras(shared_folder: Any) -> tuple[Path, Path]:
    """Two LoRA files of the narrow SD1.5 model, with other layers and ranks."""

    def make(folder: Path) -> None:
        torch.manual_seed(3)
        query, text = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q", "attn2.to_k"
        shapes = {f"unet.{query}": (8, 8), f"unet.{query.removesuffix('attn2.to_q')}{text}": (8, 768)}
        for name, rank, more in (("a", 2, {"unet.conv_in": (8, 4, 3, 3)}), ("b", 3, {})):
            tensors = {}
            for layer, (out, *inner) in (shapes | more).items():
                tensors[f"{layer}.lora_A.weight"] = torch.randn(rank, *inner)
                tensors[f"{layer}.lora_B.weight"] = torch.randn(out, rank, *(1 for _ in inner[1:]))
            save_file(tensors, folder / f"{name}.safetensors", metadata={"d2f.shift": "1.0", "d2f.own": name})

    folder = shared_folder("two-loras", make)
    return folder / "a.safetensors", folder / "b.safetensors"


def deltas(path: Path) -> dict[str, torch.Tensor]:
    """Return the update of each layer of a LoRA file in float64, by its name in diffusers with underscores."""
    found = {}
    for name, layer in read_lora(path).layers.items():
        product = layer.up.flatten(1).double() @ layer.down.flatten(1).double() * (layer.alpha / layer.rank)
        found[name.removeprefix("lora_unet_").removeprefix("unet.").replace(".", "_")] = product
    return found


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_folder_becomes_a_single_file(narrow_pipeline: Any, convert: Any, tmp_path: Path) -> None:
    out = tmp_path / "models" / "out.safetensors"
    result = convert(narrow_pipeline("sd2"), out, "--dtype", "bf16")
    assert result == {
        "to": "single_file",
        "family": "sd2",
        "prediction_type": "v_prediction",
        "bytes": out.stat().st_size,
        "output": str(out),
    }
    convert(narrow_pipeline("sd2"), tmp_path / "again.safetensors", "--dtype", "bf16")
    assert sha256(tmp_path / "again.safetensors") == sha256(out)
    tensors = load_file(out)
    assert tensors["v_pred"].shape == (0,)
    assert tensors["model.diffusion_model.out.2.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_folder_to_file_to_folder_keeps_every_weight(
    family: Any, narrow_pipeline: Any, tiny_folder: Path, convert: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    folder = narrow_pipeline(family)
    parts = [path.parent.name for path in folder.glob("*/config.json")]
    table = single_file_header.family_table(family)
    table |= {name: json.loads((folder / name / "config.json").read_text()) for name in parts}
    monkeypatch.setattr(single_file_header, "family_table", lambda _: copy.deepcopy(table))
    convert(folder, tmp_path / "file.safetensors")
    result = convert(
        *(tmp_path / "file.safetensors", tmp_path / "back"),
        *("--tokenizer_name_or_path", tiny_folder / "tokenizer"),
    )
    assert (result["to"], result["prediction_type"]) == ("diffusers", "v_prediction" if family == "sd2" else "epsilon")
    scheduler = json.loads((tmp_path / "back" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == result["prediction_type"]
    base, back = read_model(str(folder)), read_model(str(tmp_path / "back"))
    assert base.components.keys() == back.components.keys()
    for name, tensors in base.components.items():
        assert tensors.keys() == back.components[name].keys()
        assert [key for key in tensors if not torch.equal(tensors[key].load(), back.components[name][key].load())] == []


def test_options_state_what_the_folder_does_not(narrow_pipeline: Any, convert: Any, tmp_path: Path) -> None:
    options = ("--prediction_type", "v_prediction", "--rescale_betas_zero_snr")
    assert convert(narrow_pipeline("sd1"), tmp_path / "v.safetensors", *options)["prediction_type"] == "v_prediction"
    with safe_open(tmp_path / "v.safetensors", framework="pt") as file:
        assert {"v_pred", "ztsnr"} <= set(file.keys())
        assert file.metadata()["modelspec.prediction_type"] == "v"


@pytest.mark.parametrize("output", ["stated.safetensors", "stated"])
def test_tags_that_the_options_contradict_are_left_out(
    output: str, narrow_pipeline: Any, convert: Any, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(narrow_pipeline("sd1"), tmp_path / "model"))
    tags = {"d2f.prediction_type": "v_prediction", "d2f.zero_snr": "true", "d2f.shift": "2.0"}
    (model / "d2f.json").write_text(json.dumps(tags))
    convert(model, tmp_path / output, "--prediction_type", "epsilon", "--no_rescale_betas_zero_snr")
    assert tags_of_model(str(tmp_path / output)) == {"d2f.shift": "2.0"}


def test_tokenizer_is_taken_for_a_base_that_is_a_file(
    finetuned: Path, narrow_pipeline: Any, tiny_folder: Path, convert: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    folder = narrow_pipeline("sd1")
    table = single_file_header.family_table("sd1")
    table |= {name: json.loads((folder / name / "config.json").read_text()) for name in ("unet", "vae", "text_encoder")}
    monkeypatch.setattr(single_file_header, "family_table", lambda _: copy.deepcopy(table))
    convert(folder, tmp_path / "base.safetensors")
    result = convert(
        *(finetuned, tmp_path / "lora.safetensors", "--extract_lora_from", tmp_path / "base.safetensors"),
        *("--rank", 4, "--tokenizer_name_or_path", tiny_folder / "tokenizer"),
    )
    assert result["layers"] == 2


def test_lora_are_merged_into_the_model(narrow_pipeline: Any, loras: Any, convert: Any, tmp_path: Path) -> None:
    folder = narrow_pipeline("sd1")
    merge = ("--lora", f"{loras[0]}:0.8", f"{loras[1]}:-0.5")
    convert(folder, tmp_path / "merged", *merge)
    convert(folder, tmp_path / "merged.safetensors", *merge)
    expected = StableDiffusionPipeline.from_pretrained(folder)
    for path, scale in zip(loras, (0.8, -0.5), strict=True):
        fuse_adapter(expected, path, scale)
    got, want = load_file(tmp_path / "merged" / UNET_FILE), expected.unet.state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)
    single = load_file(tmp_path / "merged.safetensors")
    query = "transformer_blocks.0.attn2.to_q.weight"
    for original, name in (("0.0.weight", "conv_in.weight"), (f"1.1.{query}", f"down_blocks.0.attentions.0.{query}")):
        assert torch.equal(single[f"model.diffusion_model.input_blocks.{original}"], want[name])


@pytest.fixture
def tagged(loras: Any, tmp_path: Path) -> Callable[..., Path]:
    """Function `tagged(name, tags)` that copies a LoRA file and gives the copy these tags."""

    def write(name: str, tags: dict[str, str]) -> Path:
        save_file(load_file(loras[0]), tmp_path / name, metadata={f"d2f.{key}": text for key, text in tags.items()})
        return tmp_path / name

    return write


@pytest.mark.parametrize("output", ["merged", "merged.safetensors"])
def test_merged_model_says_how_its_lora_is_sampled(
    narrow_pipeline: Any, tagged: Any, convert: Any, tmp_path: Path, output: str
) -> None:
    tags = {"shift": "3.0", "recommended_guidance": "1.0", "recommended_steps": "2", "pairs_guidance": "4.0"}
    convert(narrow_pipeline("sd1"), tmp_path / output, "--lora", f"{tagged('reflow.safetensors', tags)}:0.5")
    merged = str(tmp_path / output)
    assert saved_tags(merged) == {f"d2f.{name}": value for name, value in tags.items()}
    assert lowest_guidance(merged, []) == 1
    assert options_of_training(merged, [], ModelOptions(), None)["shift"] == 3


@pytest.mark.parametrize("output", ["merged", "merged.safetensors"])
def test_lora_of_naive_flow_matching_makes_the_model_predict_the_flow(
    narrow_pipeline: Any, tagged: Any, convert: Any, tmp_path: Path, output: str
) -> None:
    lora = tagged("flow.safetensors", {"prediction_type": "flow_prediction", "fm_form": "diffusers", "shift": "2.5"})
    result = convert(narrow_pipeline("sd1"), tmp_path / output, "--lora", lora)
    assert result["prediction_type"] == "flow_prediction"
    if output == "merged":
        scheduler = json.loads((tmp_path / output / "scheduler/scheduler_config.json").read_text())
        assert scheduler["prediction_type"] == "flow_prediction" and scheduler["flow_shift"] == 2.5
    else:
        with safe_open(tmp_path / output, framework="pt") as file:
            assert file.metadata()["modelspec.prediction_type"] == "flow_prediction"


def test_lora_of_the_published_form_is_not_merged(
    narrow_pipeline: Any, tagged: Any, refused: Any, tmp_path: Path
) -> None:
    lora = tagged("flow.safetensors", {"prediction_type": "flow_prediction", "fm_form": "published"})
    line = refused(narrow_pipeline("sd1"), tmp_path / "merged", "--lora", lora)
    assert "--lora was trained with --fm_form published" in line and not (tmp_path / "merged").exists()


def test_what_merged_lora_do_not_agree_on_is_said(
    narrow_pipeline: Any, tagged: Any, capsys: Any, tmp_path: Path
) -> None:
    loras = [
        str(tagged(f"{shift}.safetensors", {"shift": shift, "recommended_guidance": guidance}))
        for shift, guidance in (("1.0", "3.0"), ("2.0", "1.0"))
    ]
    assert main(["convert", str(narrow_pipeline("sd1")), str(tmp_path / "merged"), "--lora", *loras]) == 0
    assert "the LoRA files differ in d2f.shift, and the result does not state it" in capsys.readouterr().err
    assert saved_tags(str(tmp_path / "merged")) == {"d2f.recommended_guidance": "1.0"}


def test_peft_and_kohya_files_are_converted_into_each_other(loras: Any, convert: Any, tmp_path: Path) -> None:
    result = convert(loras[0], tmp_path / "style.safetensors")
    assert (result["to"], result["layers"], result["largest_rank"]) == ("kohya", 3, 2)
    with safe_open(tmp_path / "style.safetensors", framework="pt") as file:
        assert file.metadata()["ss_base_model_version"] == "sd_v1" and file.metadata()["d2f.own"] == "a"
    back = convert(tmp_path / "style.safetensors", tmp_path / "folder")
    assert back["to"] == "peft" and back["output"].endswith("folder/pytorch_lora_weights.safetensors")
    first, second = load_file(loras[0]), load_file(back["output"])
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    again = convert(tmp_path / "folder", tmp_path / "again", "--to", "kohya")
    assert again["output"].endswith("again/again_kohya.safetensors")
    assert load_file(again["output"]).keys() == load_file(tmp_path / "style.safetensors").keys()


def test_entries_of_the_author_go_from_form_to_form(loras: Any, convert: Any, tmp_path: Path) -> None:
    entries = {"modelspec.usage_hint": "say a", "modelspec.title": "Style", "ss_tag_frequency": "{}", "other": "b"}
    stale = {"ss_network_dim": "128", "modelspec.hash_sha256": "0x1"}
    save_file(load_file(loras[0]), tmp_path / "own.safetensors", entries | stale)
    source = tmp_path / "own.safetensors"
    for number, form in enumerate(("kohya", "peft", "kohya")):
        source = Path(convert(source, tmp_path / f"{number}.safetensors", "--to", form)["output"])
        with safe_open(source, framework="pt") as file:
            found = file.metadata()
        assert {name: found.get(name) for name in entries} == entries | {"other": None}
        assert (
            found.get("ss_network_dim") == {"kohya": "2", "peft": None}[form] and "modelspec.hash_sha256" not in found
        )


def test_kohya_file_of_an_unknown_model_is_refused_before_anything_is_read(
    refused: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    key = "unet.conv_in"
    tensors = {f"{key}.lora_A.weight": torch.ones(1, 4, 3, 3), f"{key}.lora_B.weight": torch.ones(8, 1, 1, 1)}
    save_file(tensors, tmp_path / "tiny.safetensors")
    monkeypatch.setattr(Convert, "_convert", lambda *arguments: pytest.fail("the input was read"))
    sentence = "the names in a kohya file depend on the model, which the LoRA does not show: give its folder as"
    assert sentence in refused(tmp_path / "tiny.safetensors", tmp_path / "out", "--to", "kohya")


def test_several_lora_become_one(loras: Any, convert: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        convert(f"{loras[0]}:0.8", tmp_path / f"{name}.safetensors", "--lora", f"{loras[1]}:0.5")
    assert sha256(tmp_path / "one.safetensors") == sha256(tmp_path / "two.safetensors")
    got, first, second = deltas(tmp_path / "one.safetensors"), deltas(loras[0]), deltas(loras[1])
    assert got.keys() == first.keys()
    for name, delta in got.items():
        want = 0.8 * first[name] + (0.5 * second[name] if name in second else 0)
        assert float((delta - want).norm() / want.norm()) <= 1e-6
    with safe_open(tmp_path / "one.safetensors", framework="pt") as file:
        assert file.metadata()["d2f.shift"] == "1.0" and "d2f.own" not in file.metadata()


def test_joined_lora_says_what_any_of_them_says_of_its_sampling(
    loras: Any, tagged: Any, convert: Any, refused: Any, tmp_path: Path
) -> None:
    source = tagged("source.safetensors", {"task": "image_to_image", "source_noise": "0.25"})
    plain = tmp_path / "plain.safetensors"
    save_file(load_file(loras[1]), plain)
    for first, second, name in ((source, plain, "one"), (plain, source, "two")):
        joined = convert(first, tmp_path / name, "--lora", second)["output"]
        assert lora_tags(joined) == {"d2f.task": "image_to_image", "d2f.source_noise": "0.25"}
    other = tagged("other.safetensors", {"task": "depth"})
    sentence = r"(image_to_image) and .*other.safetensors (depth) were trained on different tasks"
    assert all(part in refused(source, tmp_path / "three", "--lora", other) for part in sentence.split(".*"))


def test_what_starts_from_an_image_is_not_written_for_programs_that_start_from_noise(
    narrow_pipeline: Any, tagged: Any, refused: Any, convert: Any, tmp_path: Path
) -> None:
    lora = tagged("source.safetensors", {"task": "image_to_image", "source_noise": "0.25"})
    sentence = "was trained to start from an image, and the programs that read the form"
    assert f"{sentence} kohya start from noise: give --to peft" in refused(lora, tmp_path / "kohya.safetensors")
    model, merged = narrow_pipeline("sd1"), tmp_path / "merged"
    line = refused(model, tmp_path / "file.safetensors", "--lora", lora)
    assert f"{sentence} single_file start from noise: give --to diffusers, and a folder as OUTPUT" in line
    convert(model, merged, "--lora", lora)
    assert saved_tags(str(merged)) == {"d2f.task": "image_to_image", "d2f.source_noise": "0.25"}
    assert sentence in refused(merged, tmp_path / "file.safetensors")


def test_what_starts_from_zeros_is_not_written_for_programs_that_start_from_noise(
    depth_run: Path, jump_run: Path, tagged: Any, refused: Any, convert: Any, tmp_path: Path
) -> None:
    lora = tagged("zeros.safetensors", {"task": "depth", "start": "zeros"})
    line = refused(lora, tmp_path / "kohya.safetensors")
    assert "was trained to start from zeros, and the programs that read the form kohya start from noise" in line
    assert "start from zeros" in refused(jump_run / "pipeline", tmp_path / "file.safetensors")
    convert(depth_run / "pipeline", tmp_path / "merged", "--lora", jump_run)
    assert saved_tags(str(tmp_path / "merged")).items() >= {"d2f.start": "zeros", "d2f.recommended_steps": "1"}.items()
    assert json.loads((tmp_path / "merged/model_index.json").read_text())["default_denoising_steps"] == 1
    convert(jump_run / "pipeline", tmp_path / "noise", "--lora", depth_run)  # The LoRA decides.
    for merged, start in (("merged", "zeros"), ("noise", "noise")):
        assert json.loads((tmp_path / merged / "unet/config.json").read_text())["_d2f_start"] == start
    check_readers(str(jump_run / "pipeline"), [depth_run], "single_file", is_lora=False)
    with pytest.raises(ModelError, match=f"{jump_run} was trained to start from zeros, and the programs that read"):
        check_readers(str(depth_run / "pipeline"), [jump_run], "single_file", is_lora=False)


def test_rank_is_cut(loras: Any, convert: Any, tmp_path: Path) -> None:
    result = convert(loras[1], tmp_path / "small.safetensors", "--rank", "1", "--dtype", "fp16")
    assert (result["smallest_rank"], result["largest_rank"]) == (1, 1)
    for name, delta in deltas(tmp_path / "small.safetensors").items():
        left, values, right = torch.linalg.svd(deltas(loras[1])[name], full_matrices=False)
        best = left[:, :1] * values[:1] @ right[:1]
        assert float((delta - best).norm() / best.norm()) <= 2e-3


@pytest.fixture
def finetuned(narrow_pipeline: Any, tmp_path: Path) -> Path:
    """The narrow SD1.5 model, whose first convolution, one attention layer and one bias were changed."""
    folder = Path(shutil.copytree(narrow_pipeline("sd1"), tmp_path / "finetuned"))
    tensors = load_file(folder / UNET_FILE)
    for key in ("conv_in.weight", "mid_block.attentions.0.proj_in.weight", "conv_out.bias"):
        tensors[key] += 0.1 * torch.randn_like(tensors[key])
    save_file(tensors, folder / UNET_FILE, metadata={"format": "pt"})
    return folder


def test_full_finetune_becomes_a_lora_of_full_rank(
    finetuned: Path, narrow_pipeline: Any, tmp_path: Path, capsys: Any
) -> None:
    base = narrow_pipeline("sd1")
    arguments = [finetuned, tmp_path / "lora.safetensors", "--extract_lora_from", base, "--rank", 1000]
    assert main(["convert", *map(str, arguments), "--json"]) == 0
    printed = capsys.readouterr()
    assert "1 tensors changed that no LoRA holds and are left out, such as unet.conv_out.bias" in printed.err
    result = json.loads(printed.out)
    assert (result["layers"], result["left_out"]) == (2, 1) and result["relative_error"] <= 1e-6
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    fuse_adapter(pipeline, tmp_path / "lora.safetensors", 1.0)
    tuned = UNet2DConditionModel.from_pretrained(finetuned / "unet").state_dict()
    for key, value in pipeline.unet.state_dict().items():
        if key != "conv_out.bias":
            assert torch.allclose(value, tuned[key], rtol=0, atol=1e-6)


def test_unknown_model_is_named_by_its_folder(tiny_folder: Path, refused: Any, convert: Any, tmp_path: Path) -> None:
    key = "lora_unet_conv_in"
    tensors = {f"{key}.lora_down.weight": torch.ones(1, 4, 3, 3), f"{key}.lora_up.weight": torch.ones(8, 1, 1, 1)}
    save_file(tensors | {f"{key}.alpha": torch.tensor(1.0)}, tmp_path / "tiny.safetensors")
    assert "give its folder as --base_model" in refused(tmp_path / "tiny.safetensors", tmp_path / "out")
    assert "is not a diffusers folder" in refused(tmp_path / "tiny.safetensors", tmp_path / "out", "--base_model", "no")
    convert(tmp_path / "tiny.safetensors", tmp_path / "out", "--base_model", tiny_folder)
    assert "unet.conv_in.lora_A.weight" in load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{model}", "out.ckpt"), "output: out.ckpt would be a pickle"),
        (("{model}", "out", "--to", "kohya"), "to: the result is a model, so give diffusers or single_file, got kohya"),
        (("{lora}", "out", "--to", "diffusers"), "to: the result is a LoRA, so give peft or kohya, got diffusers"),
        (("{model}", "out", "--to", "single_file"), "output: a single file must end in .safetensors"),
        (("{model}", "out.safetensors", "--to", "diffusers"), "output: a diffusers folder has no ending"),
        (("{model}", "out", "--rank", "4"), "rank: the input is a model"),
        (("{lora}", "out", "--vae_custom_scale", "2"), "vae_custom_scale: the input is a LoRA"),
        (("{model}", "out", "--base_model", "{model}"), "base_model: the input is a model"),
        (("{model}", "out", "--extract_lora_from", "{model}"), "extract_lora_from: give a finetuned model as input"),
        (("{model}", "out", "--extract_lora_from", "{model}", "--rank", "2"), "the two models are equal"),
        (("{lora}", "out", "--rank", "0"), "rank must be at least 1"),
        (("none.safetensors", "out"), "none.safetensors: no such file"),
        (("{ckpt}", "out"), "is a pickle, which can run code: convert it to safetensors first"),
        (("{disguised}", "out"), "a pickle, which can run code"),
        (("{cut}", "out"), "not an intact safetensors file"),
        (("{empty}", "out"), "holds neither a model, a LoRA"),
        (("{other}", "out"), "is neither a model nor a LoRA (unknown file)"),
        (("{lora}", "out", "--lora", "{xl}"), "the LoRA files are of different families"),
        (("{model}", "out", "--lora", "{xl}"), "give the model that the LoRA was trained on"),
        (("./no/such", "out"), "no/such does not exist"),
        (("{lora}", ""), "output is empty: give a file or a folder"),
        (("", "out"), "input is empty: give a file or a folder"),
        (("{lora}", "/proc/none/out.safetensors"), "/proc/none/out.safetensors cannot be written (No such file or"),
        (("{model}", "/proc/none/out"), "d2f: /proc/none/out cannot be written (No such file or directory): name"),
        (("{model}", "{lora}/out.safetensors"), "out.safetensors cannot be written (Not a directory): name another"),
        (("x.safetensors:abc", "out"), "LoRA x.safetensors:abc: 'abc' is not a number: give FILE or FILE:STRENGTH"),
        (("{lora}", "out", "--lora", "{lora}:high"), "'high' is not a number: give FILE or FILE:STRENGTH"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(
    arguments: Any, message: str, narrow_pipeline: Any, loras: Any, refused: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(1)}, "a.ckpt")
    torch.save({"a": torch.ones(1)}, "disguised.safetensors")
    Path("cut.safetensors").write_bytes(loras[0].read_bytes()[:-9])
    Path("empty").mkdir()
    save_file({"a.weight": torch.ones(1)}, "other.safetensors")
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    save_file({f"{key}.lora_A.weight": torch.ones(1, 2048), f"{key}.lora_B.weight": torch.ones(4, 1)}, "xl.safetensors")
    before = sorted(tmp_path.rglob("*"))
    paths = {"model": narrow_pipeline("sd1"), "lora": loras[0], "ckpt": "a.ckpt", "empty": "empty"}
    paths |= {name: f"{name}.safetensors" for name in ("disguised", "cut", "other", "xl")}
    assert message in refused(*(argument.format(**paths) for argument in arguments))
    assert sorted(tmp_path.rglob("*")) == before


def test_existing_output_is_refused_unless_it_may_be_overwritten(
    loras: Any, refused: Any, convert: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    out.write_text("old")
    assert refused(loras[0], out) == f"d2f: {out} exists: add --overwrite, or choose another output"
    assert out.read_text() == "old"
    convert(loras[0], out, "--overwrite")
    assert read_lora(out).layers
    (tmp_path / "folder.safetensors").mkdir()
    assert "is of another kind than the output" in refused(loras[0], tmp_path / "folder.safetensors", "--overwrite")


def test_output_that_another_process_writes_is_refused(loras: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    command = [sys.executable, "-m", "d2f_fast", "convert", str(loras[0]), str(tmp_path / "." / "out.safetensors")]
    with locked_place(out):
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert (done.returncode, done.stderr) == (
        2,
        f"d2f: {out} is in use by process {os.getpid()}: wait until it ends, or name another output folder\n",
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["photos", "photos/..", "unknown"])
def test_folder_that_holds_anything_but_a_model_is_never_replaced(
    name: str, narrow_pipeline: Any, refused: Any, tmp_path: Path
) -> None:
    model = Path(narrow_pipeline("sd1"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").write_text("mine")
    shutil.copytree(model, tmp_path / "unknown")
    (tmp_path / "unknown/notes.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    line = refused(model, tmp_path / name, "--overwrite")
    assert "would be lost: choose another output" in line
    assert sorted(tmp_path.rglob("*")) == before


def test_model_folder_is_overwritten(narrow_pipeline: Any, convert: Any, tmp_path: Path) -> None:
    shutil.copytree(narrow_pipeline("sd1"), tmp_path / "model")
    (tmp_path / "model/unet/old").touch()
    convert(narrow_pipeline("sd1"), tmp_path / "model", "--overwrite")
    assert (tmp_path / "model/model_index.json").is_file() and not (tmp_path / "model/unet/old").exists()


def test_help_fits_100_columns(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stopped:
        main(["convert", "--help"])
    assert stopped.value.code == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100
