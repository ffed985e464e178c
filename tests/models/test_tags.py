"""What the files of a model and of its LoRA say of the sampling."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from d2f_fast.errors import ModelError, RefusedInputError
from d2f_fast.models.tags import lowest_guidance, saved_tags, tags_of_merged


def lora(folder: Path, name: str, **tags: str) -> Path:
    """Write a LoRA file of one layer with these tags."""
    header = {f"d2f.{key}": value for key, value in tags.items()}
    save_file({"unet.a.lora_A.weight": torch.zeros(1, 1)}, folder / f"{name}.safetensors", header | {"other": "1"})
    return folder / f"{name}.safetensors"


def test_tags_of_a_folder_and_of_a_file_are_read(tmp_path: Path) -> None:
    (tmp_path / "d2f.json").write_text(json.dumps({"d2f.shift": 2.0, "other": 1}))
    assert saved_tags(str(tmp_path)) == {"d2f.shift": "2.0"}
    assert saved_tags(str(lora(tmp_path, "model", shift="3.0"))) == {"d2f.shift": "3.0"}
    assert saved_tags("some/hub-id") == {}


def test_malformed_tags_are_refused(tmp_path: Path) -> None:
    (tmp_path / "d2f.json").write_text("[1]")
    with pytest.raises(ModelError, match=r"d2f\.json is not a JSON object"):
        saved_tags(str(tmp_path))


def test_lowest_guidance_is_recommended(tmp_path: Path) -> None:
    (tmp_path / "d2f.json").write_text(json.dumps({"d2f.recommended_guidance": "4.0"}))
    assert lowest_guidance(str(tmp_path), []) == 4
    assert lowest_guidance(str(tmp_path), [lora(tmp_path, "a", recommended_guidance="1.0")]) == 1
    assert lowest_guidance("some/hub-id", [lora(tmp_path, "b")]) is None


@pytest.mark.parametrize("value", ["0.5", "nan", "strong"])
def test_guidance_that_cannot_be_used_is_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(RefusedInputError, match=r"a\.safetensors holds no usable d2f\.recommended_guidance"):
        lowest_guidance("some/hub-id", [lora(tmp_path, "a", recommended_guidance=value)])


def test_merged_model_has_the_tags_of_its_lora(tmp_path: Path) -> None:
    loras = [
        lora(tmp_path, "a", shift="2.0", recommended_guidance="3.0", objective="diff2flow"),
        lora(tmp_path, "b", shift="3.0", recommended_guidance="1.0", objective="diff2flow"),
    ]
    own = {"d2f.shift": "5.0", "d2f.zero_snr": "true"}
    expected = {"d2f.zero_snr": "true", "d2f.objective": "diff2flow", "d2f.recommended_guidance": "1.0"}
    assert tags_of_merged("some/hub-id", own, loras) == (expected, ["d2f.shift"])
    merged, differing = tags_of_merged("some/hub-id", own, loras[:1])
    assert merged["d2f.shift"] == "2.0" and not differing


def test_tag_of_a_lora_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="shift"):
        tags_of_merged("some/hub-id", {}, [lora(tmp_path, "a", shift="-1")])
