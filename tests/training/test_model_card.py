"""Tests of the model card and of the lines that say how to sample a result."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from d2f_fast.config import TrainingConfig
from d2f_fast.training.model_card import CARD_FILE, recipe, write_model_card

TAGS = {
    "d2f.objective": "diff2flow",
    "d2f.prediction_type": "epsilon",
    "d2f.training_shift": "1.0",
    "d2f.shift": "1.0",
    "d2f.resolution": "512",
    "d2f.recommended_sigmas": "17.6146, 3, 1, 0.3333, 0",
}
FLOW_TAGS = {**TAGS, "d2f.objective": "fm", "d2f.prediction_type": "flow_prediction", "d2f.shift": "3.0"}
RESULT = {"steps": 7, "images_per_step": 32}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a run with both LoRA files."""
    made = tmp_path / "owls"
    made.mkdir()
    for name in ("pytorch_lora_weights.safetensors", "owls_kohya.safetensors"):
        (made / name).touch()
    return made


@pytest.fixture
def config(folder: Path) -> TrainingConfig:
    """Return the options of a run into the folder."""
    return TrainingConfig(output_dir=str(folder))


def test_recipe_has_a_line_for_each_program(folder: Path) -> None:
    d2f, diffusers, comfyui, a1111 = recipe(folder, TAGS, "owls")
    assert d2f == "d2f_fast: `d2f sample --model BASE --lora owls --prompts TEXT --num_inference_steps 4`"
    assert 'load_lora_weights("owls", weight_name="pytorch_lora_weights.safetensors")' in diffusers
    assert "from_config(pipe.scheduler.config)`" in diffusers
    assert "`owls_kohya.safetensors` in models/loras" in comfyui
    assert "ManualSigmas (`17.6146, 3, 1, 0.3333, 0`)" in comfyui
    assert "`<lora:owls_kohya:1>`" in a1111


def test_recipe_of_a_flow_from_an_image_has_prompts_after_a_training_with_captions(
    folder: Path, config: TrainingConfig
) -> None:
    tags = TAGS | {"d2f.task": "image_to_image", "d2f.source_noise": "0.0", "d2f.captions": "true"}
    (line,) = recipe(folder, tags, "owls")
    assert line.endswith("--lora owls --image IMAGE --prompts TEXT --num_inference_steps 4`")
    card = write_model_card(folder, "base", config, tags, RESULT)
    assert card is not None and "to start from. TEXT is the caption of the result." in card.read_text()
    (line,) = recipe(folder, tags | {"d2f.captions": "false"}, "owls")
    assert line.endswith("--lora owls --image IMAGE --num_inference_steps 4`")


def test_recipe_after_pairs_has_two_steps_and_no_guidance(folder: Path, config: TrainingConfig) -> None:
    tags = TAGS | {"d2f.recommended_sigmas": "15.6146, 1, 0", "d2f.recommended_steps": "2", "d2f.data": "pairs"}
    tags |= {"d2f.pairs_guidance": "2 to 5", "d2f.recommended_guidance": "1.0"}
    d2f, diffusers, comfyui, a1111 = recipe(folder, tags, "owls")
    assert d2f.endswith("--prompts TEXT --num_inference_steps 2`")
    assert diffusers.endswith("and `pipe(TEXT, num_inference_steps=2, guidance_scale=1)`")
    assert comfyui.endswith("ManualSigmas (`15.6146, 1, 0`) and SamplerCustom (euler), with cfg 1")
    assert a1111.endswith("sampler Euler, CFG scale 1")
    card = write_model_card(folder, "base", config, tags, RESULT)
    assert card is not None
    text = card.read_text(encoding="utf-8")
    assert "## Generate images in two steps" in text and "| trained on pairs with guidance | 2 to 5 |" in text
    (folder / "pipeline").mkdir()
    assert recipe(folder, tags, "owls")[1].endswith("(TEXT, sigmas=[15.6146, 1, 0], guidance_scale=1)`")


def test_recipe_quotes_a_name_with_spaces_for_the_shell(folder: Path) -> None:
    assert shlex.split(recipe(folder, TAGS, "my owls")[0].split("`")[1])[3:6] == ["BASE", "--lora", "my owls"]
    (folder / "pipeline").mkdir()
    assert shlex.split(recipe(folder, TAGS, "my owls")[0].split("`")[1])[2:4] == ["--model", "my owls/pipeline"]


def test_recipe_of_a_flow_model_has_the_shift_and_no_line_for_a1111(folder: Path) -> None:
    _, diffusers, comfyui = recipe(folder, FLOW_TAGS)
    assert 'from_config(pipe.scheduler.config, prediction_type="flow_prediction", shift=3.0)' in diffusers
    assert "ModelSamplingSD3 (shift 3.0) and KSampler (euler, simple)" in comfyui


def test_recipe_of_the_published_form_names_this_package_only(folder: Path) -> None:
    assert len(recipe(folder, {**FLOW_TAGS, "d2f.fm_form": "published"})) == 1


def test_recipe_of_a_pipeline_passes_its_sigmas(folder: Path) -> None:
    (folder / "pipeline").mkdir()
    d2f, diffusers, comfyui, a1111 = recipe(folder, TAGS, "owls")
    assert "--model owls/pipeline" in d2f
    assert diffusers.endswith('from_pretrained("owls/pipeline")(TEXT, sigmas=[17.6146, 3, 1, 0.3333, 0])`')
    assert "`d2f convert owls/pipeline owls.safetensors`, that file in models/checkpoints" in comfyui
    assert "ManualSigmas (`17.6146, 3, 1, 0.3333, 0`)" in comfyui
    assert a1111 == "A1111, Forge: the same file in models/Stable-diffusion; sampler Euler"
    flow = recipe(folder, FLOW_TAGS)
    assert "FlowMatchEulerDiscreteScheduler(shift=3.0)`" in flow[2] and "sigmas=[1, 0.75, 0.5, 0.25]" in flow[2]
    assert len(flow) == 4 and flow[-1].endswith(
        "CheckpointLoaderSimple, ModelSamplingSD3 (shift 3.0) and KSampler (euler, simple)"
    )


def test_card_is_read_by_the_hub_and_names_no_path_of_this_machine(folder: Path, config: TrainingConfig) -> None:
    path = write_model_card(folder, "some/model", config, TAGS, RESULT)
    assert path == folder / CARD_FILE
    card = ModelCard.load(path)
    data = card.data.to_dict()
    assert data["base_model"] == "some/model"
    assert data["library_name"] == "diffusers"
    assert data["pipeline_tag"] == "text-to-image"
    assert {"lora", "flow-matching"} <= set(data["tags"])
    assert str(folder.parent) not in card.content
    assert all(line in card.content for line in recipe(folder, TAGS, "owls"))
    assert "| steps | 7 |" in card.content and "| images per step | 32 |" in card.content
    local = write_model_card(folder, str(folder / "base"), config, TAGS, RESULT)
    assert local is not None
    assert str(folder) not in local.read_text() and "| base model | a local model |" in local.read_text()


def test_card_of_an_earlier_run_is_replaced_and_a_foreign_one_kept(folder: Path, config: TrainingConfig) -> None:
    write_model_card(folder, "some/model", config, TAGS, RESULT)
    assert write_model_card(folder, "some/model", replace(config, seed=5), TAGS, RESULT) is not None
    assert "| seed | 5 |" in (folder / CARD_FILE).read_text()
    (folder / CARD_FILE).write_text("# My own page\n")
    assert write_model_card(folder, "some/model", config, TAGS, RESULT) is None
    assert (folder / CARD_FILE).read_text() == "# My own page\n"


def test_card_names_the_rank_of_the_lora(folder: Path, config: TrainingConfig) -> None:
    ranks = {
        "LoRA of rank 64": {},
        "LoRA of rank 8": {"rank": 8},
        "LoRA that went on from another one": {"init_lora": "x"},
    }
    for words, options in ranks.items():
        path = write_model_card(folder, "BASE", replace(config, **options), TAGS, RESULT)
        assert path is not None and f"| trained | {words} |" in path.read_text()
