"""Models with LoRA for sampling: what is taken from the tags, and the fingerprints of the model before the LoRA."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from d2f_fast.commands import load_model
from d2f_fast.commands.load_model import load_with_lora, options_of_training
from d2f_fast.commands.main import main
from d2f_fast.errors import RefusedInputError
from d2f_fast.models.base_model import BaseModel
from d2f_fast.models.options import ModelOptions


@pytest.fixture
def tagged(tmp_path: Path) -> Path:
    """Return a LoRA of the tiny model's first convolution with tags."""
    path = tmp_path / "lora.safetensors"
    halves = {"A": torch.ones(2, 4, 3, 3), "B": torch.ones(8, 2, 1, 1)}
    tags = {"d2f.shift": "3.0", "d2f.prediction_type": "flow_prediction", "d2f.fm_form": "published"}
    save_file({f"unet.conv_in.lora_{half}.weight": value for half, value in halves.items()}, path, tags)
    return path


def test_options_are_those_of_the_tags_unless_they_are_given(tagged: Path, tiny_folder: Path) -> None:
    lora, options = [f"{tagged}:0.5"], ModelOptions()
    assert options_of_training(str(tiny_folder), lora, options, None) == {
        "prediction_type": "flow_prediction",
        "fm_form": "published",
        "shift": 3.0,
        "vae_reflection_padding": False,
    }
    assert options_of_training(str(tiny_folder), lora, options, 2.0)["shift"] == 2.0
    given = ModelOptions(prediction_type="epsilon", vae_reflection_padding=True)
    assert options_of_training(str(tiny_folder), lora, given, None) == {"prediction_type": "epsilon", "shift": 3.0}
    assert options_of_training(str(tiny_folder), [], given, None) == {"prediction_type": "epsilon"}


def test_fingerprints_are_those_of_the_model_without_the_lora(tagged: Path, tiny_folder: Path) -> None:
    plain = BaseModel.load(tiny_folder)
    loaded = load_with_lora(str(tiny_folder), [str(tagged)], ModelOptions(), None)
    assert loaded.fingerprints == plain.fingerprints()
    assert BaseModel(loaded.pipeline).fingerprints()["unet"] != loaded.fingerprints["unet"]
    assert torch.equal(loaded.pipeline.unet.conv_in.weight, plain.unet.conv_in.weight + 2)
    assert [entry["file"] for entry in loaded.lora] == ["lora.safetensors"]
    assert loaded.scheduler_options["prediction_type"] == "flow_prediction"


def test_lora_without_a_usable_shift_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    save_file({"unet.conv_in.lora_A.weight": torch.ones(1)}, tmp_path / "a.safetensors", {"d2f.shift": "wide"})
    with pytest.raises(RefusedInputError, match=r"a\.safetensors: d2f\.shift must be a number .*: give --shift"):
        options_of_training(str(tiny_folder), [str(tmp_path / "a.safetensors")], ModelOptions(), None)


def test_autoencoder_that_a_lora_was_trained_with_is_named(
    tagged: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = load_file(tagged)
    save_file(tensors, tagged, {"d2f.vae": "madebyollin/sdxl-vae-fp16-fix", "d2f.vae_scale": "0.5"})

    class LoadedError(Exception):
        """The line is printed before the model is loaded."""

    def load(*arguments: object, **options: object) -> None:
        raise LoadedError

    monkeypatch.setattr(load_model, "load_model", load)
    lines = {
        ModelOptions(): "d2f: the LoRA was trained with --pretrained_vae_model_name_or_path"
        " madebyollin/sdxl-vae-fp16-fix --vae_custom_scale 0.5: give the same, unless the model itself has this"
        " autoencoder\n",
        ModelOptions(pretrained_vae_model_name_or_path="madebyollin/sdxl-vae-fp16-fix", vae_custom_scale=0.5): "",
    }
    for options, line in lines.items():
        with pytest.raises(LoadedError):
            load_with_lora(str(tiny_folder), [str(tagged)], options, None)
        assert capsys.readouterr().err == line


def test_hub_id_is_sampled_as_its_folder_says(
    tiny_folder: Path, cached_as: Callable[[str, Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tags = {"d2f.shift": "2.0", "d2f.recommended_guidance": "1.0", "d2f.recommended_steps": "2"}
    folder = cached_as("me/flow", tiny_folder)
    (folder / "d2f.json").write_text(json.dumps(tags | {"d2f.resolution": "24"}))
    rows = []
    for number, model in enumerate(("me/flow", str(folder))):
        output = tmp_path / str(number)
        assert main(["sample", "--model", model, "--prompts", "abc", "--output_dir", str(output), "--json"]) == 0
        rows.append(json.loads(capsys.readouterr().out))
    for row in rows:
        assert (row["steps"], row["guidance_scale"], row["shift"], row["height"]) == (2, 1.0, 2.0, 24)
    assert rows[0]["model"] == "me/flow"
    pixels = [np.asarray(Image.open(tmp_path / number / "000.png")) for number in "01"]
    assert np.array_equal(*pixels)
    (folder / "d2f.json").write_text(json.dumps({"d2f.task": "image_to_image", "d2f.source_noise": "0.0"}))
    with pytest.raises(RefusedInputError, match=r"snapshots.* was trained to start from an image"):
        load_with_lora("me/flow", [], ModelOptions(), None)
