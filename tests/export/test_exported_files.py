"""Tests of reading the files beside the graphs, whole and damaged."""

import os
import re
import shutil
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline

from d2f_fast.commands.main import main
from d2f_fast.errors import RefusedInputError
from d2f_fast.export.inference import OnnxPipeline


def test_token_ids_are_those_of_transformers(exported, one_level_folder):
    tokenizer = StableDiffusionPipeline.from_pretrained(one_level_folder).tokenizer
    texts = ["", "ab", "abcdefgh ijklm nop qr"]
    want = tokenizer(texts, padding="max_length", max_length=8, truncation=True).input_ids
    assert [entry.ids for entry in OnnxPipeline(exported[0]).tokenizers["tokenizer"].encode_batch(texts)] == want


def test_folder_with_a_missing_file_is_refused(exported, tmp_path):
    with pytest.raises(RefusedInputError, match=r"is not an export folder \(export\.json is missing\): name one that"):
        OnnxPipeline(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(exported[0], copy)
    (copy / "unet/sampler.onnx").unlink()
    with pytest.raises(RefusedInputError, match=r"sampler\.onnx is missing: export that component too"):
        OnnxPipeline(copy)(["ab"])
    (copy / "vae_decoder/config.json").unlink()
    with pytest.raises(RefusedInputError, match=r"config\.json cannot be read: export that component too"):
        OnnxPipeline(copy)


def _cut(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("name", "damage", "sentence"),
    [
        ("unet/model.onnx.data", _cut, r"has \d+ bytes of the \d+ that were exported: copy the folder again"),
        ("unet/model.onnx.data", Path.unlink, "is missing: copy the folder again, or export again"),
        ("unet/sampler.onnx", _cut, r"has \d+ bytes of the \d+ that were exported"),
        ("vae_decoder/model.onnx", _cut, r"has \d+ bytes of the \d+ that were exported"),
        ("text_encoder/model.onnx", "no protobuf" + " " * 30, r"has 41 bytes of the \d+ that were exported"),
        ("tokenizer/tokenizer.json", _cut, "is missing or damaged .*: export again"),
        ("tokenizer/tokenizer.json", Path.unlink, "is missing or damaged .*: export again"),
        ("tokenizer", shutil.rmtree, "/tokenizer.json is missing or damaged .*: export again"),
        ("tokenizer/tokenizer_config.json", "{}", "has no eos_token: export again"),
        ("tokenizer/tokenizer_config.json", '{"eos_token": "</s>"}', "</s> is not a token of tokenizer.json"),
        ("export.json", "{}", "has no guidance: export again"),
        ("export.json", _cut, "cannot be read: export again"),
        ("unet/config.json", '{"in_channels": 4}', "has no out_channels: export again"),
        ("unet/steps.json", "[]", "is not a JSON object: export again"),
        ("unet/steps.json", "{}", "holds no table: export again"),
        ("unet/steps.json", '{"4": {}}', "timesteps for 4 steps is incomplete: export again"),
        ("unet/steps.json", '{"1": {"timesteps": ["a"]}}', "timesteps for 1 steps is incomplete: export again"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_damaged_file_is_named_in_one_line(name, damage, sentence, exported, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(exported[0], copy)
    (copy / name).write_text(damage) if isinstance(damage, str) else damage(copy / name)
    command = ["sample", "--prompts", "ab", "--onnx", str(copy), "--output_dir", str(tmp_path / "a")]
    assert main(command) == 2
    *before, line = capsys.readouterr().err.splitlines()
    # Graphs are read when they are first needed, which is after steps and guidance have been printed.
    assert before in ([], ["d2f: num_inference_steps 4, the default", "d2f: guidance_scale 3, the default"])
    assert re.search(f"{name}.*{sentence}" if "." in name else sentence, line), line
    assert not list(tmp_path.glob("a/*"))
