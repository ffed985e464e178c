"""Models with LoRA for sampling: what is taken from the tags, and the fingerprints of the model before the LoRA."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from d2f_fast.commands.load_model import load_with_lora, options_of_training
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
