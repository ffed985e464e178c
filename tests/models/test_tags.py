"""What the files of a model and of its LoRA say of the sampling."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from d2f_fast.errors import ModelError, RefusedInputError
from d2f_fast.models.options import ModelOptions
from d2f_fast.models.tags import (
    check_sampling_tags,
    chosen_steps,
    lowest_guidance,
    recommended_steps,
    saved_tags,
    tags_of_merged,
    take_trained_size,
    trained_size,
)


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


def test_steps_are_those_of_the_lora_before_those_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "d2f.json").write_text(json.dumps({"d2f.recommended_steps": "8"}))
    a, same, b = (lora(tmp_path, name, recommended_steps=steps) for name, steps in (("a", "2"), ("s", "2"), ("b", "4")))
    silent = lora(tmp_path, "silent", shift="2.0")
    assert chosen_steps(None, "some/hub-id", []) == (4, "the default")
    assert chosen_steps(None, str(tmp_path), [silent]) == (8, f"as saved in {tmp_path / 'd2f.json'}")
    assert chosen_steps(None, str(tmp_path), [silent, a, same]) == (2, f"as saved in {a} and {same}")
    assert chosen_steps(None, str(tmp_path), [a, b]) == (4, f"the highest of those saved: 2 in {a}, 4 in {b}")
    assert chosen_steps(7, str(tmp_path), [a, b]) == (7, "as given")


def test_steps_that_the_result_of_a_training_states_are_found(tmp_path: Path) -> None:
    assert recommended_steps("some/hub-id", [lora(tmp_path, "a", recommended_steps="1")]) == 1
    assert recommended_steps("some/hub-id", []) is None


@pytest.mark.parametrize("value", ["0", "2.5", "many", "10001"])
def test_steps_that_cannot_be_used_are_refused_unless_others_are_given(tmp_path: Path, value: str) -> None:
    file = lora(tmp_path, "a", recommended_steps=value)
    with pytest.raises(RefusedInputError, match=r"a\.safetensors holds no usable d2f\.recommended_steps \(.*\): give"):
        chosen_steps(None, "some/hub-id", [file])
    assert chosen_steps(3, "some/hub-id", [file]).number == 3


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


def test_merged_model_recommends_the_highest_number_of_steps_of_its_lora(tmp_path: Path) -> None:
    loras = [lora(tmp_path, name, recommended_steps=steps) for name, steps in (("a", "2"), ("b", "4"))]
    own = {"d2f.recommended_steps": "8"}
    assert tags_of_merged("some/hub-id", own, loras) == ({"d2f.recommended_steps": "4"}, [])
    assert tags_of_merged("some/hub-id", own, loras[:1])[0] == {"d2f.recommended_steps": "2"}
    assert tags_of_merged("some/hub-id", own, [lora(tmp_path, "c")])[0] == own


def test_merged_model_that_starts_from_zeros_takes_one_step(tmp_path: Path) -> None:
    zeros = {"d2f.task": "depth", "d2f.start": "zeros", "d2f.recommended_steps": "1"}
    noise = {"d2f.task": "depth", "d2f.recommended_steps": "4"}
    style = lora(tmp_path, "style", recommended_steps="4")
    assert tags_of_merged("some/hub-id", zeros, [style]) == (zeros, [])
    jump = lora(tmp_path, "jump", task="depth", start="zeros", recommended_steps="1")
    assert tags_of_merged("some/hub-id", noise, [jump, style]) == (zeros, [])
    several = lora(tmp_path, "several", task="depth", recommended_steps="4")
    assert tags_of_merged("some/hub-id", zeros, [several]) == (noise, [])


def test_tag_of_a_lora_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="shift"):
        tags_of_merged("some/hub-id", {}, [lora(tmp_path, "a", shift="-1")])


def test_size_of_the_training_is_that_of_the_lora_before_that_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "d2f.json").write_text(json.dumps({"d2f.resolution": "32"}))
    plain, high = lora(tmp_path, "plain", resolution="64"), lora(tmp_path, "high", resolution="48x64 64x64")
    silent = lora(tmp_path, "silent", shift="2.0")
    assert trained_size("some/hub-id", []) is None and trained_size("some/hub-id", [silent]) is None
    assert trained_size(str(tmp_path), []) == trained_size(str(tmp_path), [silent]) == (32, 32)
    assert trained_size(str(tmp_path), [silent, plain]) == (64, 64) and trained_size(str(tmp_path), [high]) == (48, 64)
    assert trained_size(str(tmp_path), [plain, high]) is None  # Nothing says which of them.
    with pytest.raises(
        RefusedInputError, match=r"a\.safetensors: d2f\.resolution must be a size in pixels, .*, got wide"
    ):
        trained_size(str(tmp_path), [lora(tmp_path, "a", resolution="wide")])


@pytest.mark.parametrize(
    ("text", "squares_only", "sides"),
    [
        ("16", True, 8),
        ("16x24", False, (8, 12)),
        ("16x24", True, 5),
        ("17", False, 5),
        ("12", False, 5),
        ("16x12", False, 5),
    ],
)
def test_size_of_the_training_becomes_that_of_the_network(
    text: str, squares_only: bool, sides: object, tmp_path: Path
) -> None:
    unet = UNet2DConditionModel(
        sample_size=5,
        block_out_channels=(4,),
        norm_num_groups=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        cross_attention_dim=4,
        attention_head_dim=4,
        layers_per_block=1,
    )
    vae = SimpleNamespace(config={"block_out_channels": [4, 4]})
    pipeline: Any = SimpleNamespace(unet=unet, vae=vae)
    take_trained_size(pipeline, "some/hub-id", [lora(tmp_path, "a", resolution=text)], squares_only=squares_only)
    assert unet.config.sample_size == sides


def test_model_that_starts_from_an_image_is_refused_where_the_flow_starts_from_noise(tmp_path: Path) -> None:
    (tmp_path / "d2f.json").write_text(json.dumps({"d2f.task": "image_to_image", "d2f.source_noise": "0.0"}))
    check_sampling_tags(str(tmp_path), (), ModelOptions(), None, from_image=True)
    with pytest.raises(ModelError, match="was trained to start from an image, and this command starts from noise: use"):
        check_sampling_tags(str(tmp_path), (), ModelOptions(), None)
