"""The model card says how a result was trained, and holds the lines that say how to use it."""

from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from d2f_fast.config import TrainingConfig
from d2f_fast.training.model_card import CARD_FILE, write_model_card
from d2f_fast.training.recipe import recipe

TAGS = {
    "d2f.objective": "diff2flow",
    "d2f.prediction_type": "epsilon",
    "d2f.training_shift": "1.0",
    "d2f.shift": "1.0",
    "d2f.resolution": "512",
    "d2f.recommended_sigmas": "17.6146, 3, 1, 0.3333, 0",
}
RESULT = {"steps": 7, "images_per_step": 32}


@pytest.fixture
def config(folder: Path) -> TrainingConfig:
    """Return the options of a run into the folder."""
    return TrainingConfig(output_dir=str(folder))


def test_card_is_read_by_the_hub_and_names_no_path_of_this_machine(folder: Path, config: TrainingConfig) -> None:
    path = write_model_card(folder, "some/model", "sd1", config, TAGS, RESULT)
    assert path == folder / CARD_FILE
    card = ModelCard.load(path)
    data = card.data.to_dict()
    assert data["base_model"] == "some/model"
    assert data["library_name"] == "diffusers"
    assert data["pipeline_tag"] == "text-to-image"
    assert {"lora", "flow-matching"} <= set(data["tags"])
    assert str(folder.parent) not in card.content
    for way in recipe(folder, TAGS, "sd1", "owls", "some/model"):
        assert way.words in card.content and all(line in card.content for line in way.statements)
    assert "TEXT is the caption, in quotes." in card.content and "BASE" not in card.content
    assert "| steps | 7 |" in card.content and "| images per step | 32 |" in card.content
    local = write_model_card(folder, str(folder / "base"), "sd1", config, TAGS, RESULT)
    assert local is not None
    text = local.read_text()
    assert str(folder) not in text and "| base model | a local model |" in text
    assert "--model BASE" in text and "BASE is the base model, in quotes." in text


def test_card_names_the_miniature_in_its_table_and_lines(folder: Path, config: TrainingConfig) -> None:
    path = write_model_card(folder, "miniature", None, config, TAGS, RESULT)
    assert path is not None
    card = ModelCard.load(path)
    assert "| base model | miniature, the tiny model in d2f_fast |" in card.content
    assert "--model miniature --lora owls" in card.content and "BASE" not in card.content
    assert "base_model" not in card.data.to_dict()


def test_card_of_a_run_on_pairs_counts_pairs(folder: Path, config: TrainingConfig) -> None:
    tags = TAGS | {"d2f.data": "pairs", "d2f.recommended_steps": "2", "d2f.pairs_guidance": "2 to 5"}
    path = write_model_card(folder, "base", "sd1", config, tags, RESULT)
    assert path is not None
    text = path.read_text(encoding="utf-8")
    assert "## Generate images in two steps" in text and "| trained on pairs with guidance | 2 to 5 |" in text
    assert "| pairs per step | 32 |" in text and "images per step" not in text
    tags = TAGS | {"d2f.task": "image_to_image", "d2f.source_noise": "0.0"}
    write_model_card(folder, "base", "sd1", config, tags, RESULT)
    assert "| pairs of images per step | 32 |" in path.read_text(encoding="utf-8")


def test_card_of_an_earlier_run_is_replaced_and_a_foreign_one_kept(folder: Path, config: TrainingConfig) -> None:
    write_model_card(folder, "some/model", "sd1", config, TAGS, RESULT)
    assert write_model_card(folder, "some/model", "sd1", replace(config, seed=5), TAGS, RESULT) is not None
    assert "| seed | 5 |" in (folder / CARD_FILE).read_text()
    (folder / CARD_FILE).write_text("# My own page\n")
    assert write_model_card(folder, "some/model", "sd1", config, TAGS, RESULT) is None
    assert (folder / CARD_FILE).read_text() == "# My own page\n"


def test_card_names_the_rank_of_the_lora(folder: Path, config: TrainingConfig) -> None:
    ranks = {
        "LoRA of rank 64": {},
        "LoRA of rank 8": {"rank": 8},
        "LoRA that went on from another one": {"init_lora": "x"},
    }
    for words, options in ranks.items():
        path = write_model_card(folder, "BASE", "sd1", replace(config, **options), TAGS, RESULT)
        assert path is not None and f"| trained | {words} |" in path.read_text()
