"""Entries of LoRA files that say how they are sampled: impossible ones, and files that do not go together."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from d2f_fast.errors import ModelError
from d2f_fast.lora.tags import common_tags, tags_with_lora

A, B = "unet.a.b.lora_A.weight", "unet.a.b.lora_B.weight"
DOWN, UP = torch.ones(2, 6), torch.ones(5, 2)


@pytest.mark.parametrize(
    ("tags", "sentence"),
    [
        ({"d2f.shift": "1e300"}, "d2f.shift must be a number from 0.001 to 1000, got 1e300: give --shift"),
        ({"d2f.shift": "-2"}, "d2f.shift must be a number from 0.001 to 1000, got -2: give --shift"),
        ({"d2f.shift": "nan"}, "got nan: give --shift"),
        ({"d2f.shift": "wide\n"}, r"got 'wide\\n': give --shift"),
        ({"d2f.fm_form": "mine"}, "d2f.fm_form must be diffusers or published, got mine: correct the entry"),
        (
            {"d2f.prediction_type": "flow"},
            "d2f.prediction_type must be epsilon, .* or flow_prediction, got flow: correct",
        ),
        ({"d2f.start": "ones"}, "d2f.start must be noise or zeros, got ones: correct the entry"),
        ({"d2f.vae_reflection_padding": "True"}, "d2f.vae_reflection_padding must be true or false, got True: correct"),
    ],
)
def test_tag_with_an_impossible_value_is_refused_with_its_file(
    tags: dict[str, str], sentence: str, tmp_path: Path
) -> None:
    save_file({A: DOWN, B: UP}, tmp_path / "x.safetensors", metadata=tags)
    with pytest.raises(ModelError, match=rf"LoRA .*x\.safetensors: .*{sentence}") as caught:
        common_tags([tmp_path / "x.safetensors"])
    assert "\n" not in str(caught.value)
    if "d2f.shift" in tags:
        assert common_tags([tmp_path / "x.safetensors"], shift=2.0) == tags


def test_files_of_two_forms_of_naive_flow_matching_are_not_mixed(tmp_path: Path) -> None:
    for name, form in (("a", {"d2f.fm_form": "published"}), ("b", {"d2f.fm_form": "diffusers"}), ("c", {})):
        tags = {"d2f.prediction_type": "flow_prediction"} | form
        save_file({A: DOWN, B: UP}, tmp_path / f"{name}.safetensors", metadata=tags)
    assert common_tags([tmp_path / "b.safetensors", tmp_path / "c.safetensors"])["d2f.fm_form"] == "diffusers"
    with pytest.raises(ModelError, match=r"a\.safetensors \(published\) and .*c\.safetensors \(diffusers\) were"):
        common_tags([tmp_path / "a.safetensors", tmp_path / "c.safetensors"])


def test_files_of_one_task_that_start_in_two_ways_are_not_mixed(tmp_path: Path) -> None:
    depth = {"d2f.task": "depth"}
    for name, tags in (("noise", depth), ("zeros", depth | {"d2f.start": "zeros"}), ("style", {"d2f.shift": "1.0"})):
        save_file({A: DOWN, B: UP}, tmp_path / f"{name}.safetensors", metadata=tags)
    noise, zeros, style = (tmp_path / f"{name}.safetensors" for name in ("noise", "zeros", "style"))
    assert common_tags([zeros, style])["d2f.start"] == "zeros" and "d2f.start" not in common_tags([noise, style])
    with pytest.raises(
        ModelError, match=r"noise\.safetensors \(from noise\) and .*\(from zeros\) were trained to start"
    ):
        common_tags([noise, zeros])


def test_lora_of_a_task_starts_as_it_was_trained_to_on_any_model() -> None:
    zeros = {"d2f.task": "depth", "d2f.start": "zeros", "d2f.distilled": "true"}
    assert tags_with_lora(zeros, {"d2f.shift": "1.0"}) == zeros | {"d2f.shift": "1.0"}
    assert tags_with_lora(zeros, {"d2f.task": "depth"}) == {"d2f.task": "depth"}
    assert tags_with_lora({"d2f.task": "depth"}, zeros) == zeros
