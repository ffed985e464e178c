"""Networks without weights have the layers of the published models, and of a folder's own configuration."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from d2f_fast.errors import CheckpointError, ModelError
from d2f_fast.lora.family import family_of
from d2f_fast.models.skeleton import skeleton_of_family, skeleton_of_folder


@pytest.mark.parametrize(
    ("family", "millions", "text"),
    [("sd1", 859.5, 12), ("sd2", 865.9, 23), ("sdxl", 2567.5, 12)],
)
def test_published_model_has_its_number_of_parameters(family: Any, millions: float, text: int) -> None:
    networks = skeleton_of_family(family)
    parameters = list(networks.unet.parameters())
    assert all(parameter.is_meta for parameter in parameters)
    assert round(sum(parameter.numel() for parameter in parameters) / 1e6, 1) == millions
    assert family_of(networks.unet) == family
    assert networks.text_encoder.config.num_hidden_layers == text
    assert (networks.text_encoder_2 is not None) == (family == "sdxl")


def test_folder_gives_the_layers_of_its_pipeline(tiny_folder: Path) -> None:
    networks, pipeline = skeleton_of_folder(tiny_folder), StableDiffusionPipeline.from_pretrained(tiny_folder)
    for name in ("unet", "text_encoder"):
        got, want = getattr(networks, name).state_dict(), getattr(pipeline, name).state_dict()
        assert {key: value.shape for key, value in got.items()} == {key: value.shape for key, value in want.items()}
        assert all(value.device == torch.device("meta") for value in got.values())


def test_folder_without_configuration_or_with_a_wrong_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"unet/config\.json: no such file"):
        skeleton_of_folder(tmp_path)
    for name in ("unet", "text_encoder"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"down_block_types": ["No"], "hidden_size": 3}')
    with pytest.raises(ModelError, match=r"a config\.json does not fit its network"):
        skeleton_of_folder(tmp_path)
