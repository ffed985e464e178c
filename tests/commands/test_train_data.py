"""Data of `d2f train`: mixed folders, source and target images, and options that are refused with them."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from d2f_fast.commands.main import main, parse
from d2f_fast.commands.train import Train
from d2f_fast.commands.train_data import held_out_files, known_settings, training_files
from d2f_fast.data.mixed import MixedImages
from d2f_fast.data.source_images import SourceTargetDataset


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "task image_to_image needs --train_data_dir, a folder with the sub-folders source and target"),
        (["--train_data_dir", "DATA/source"], "has no sub-folder source: expected the sub-folders source and target"),
        (["--train_data_dir", "DATA", "--objective", "diffusion"], "objective diffusion always starts from noise"),
        (["--train_data_dir", "DATA", "--teacher", "base"], "teacher does not go with --task image_to_image: leave it"),
        (
            ["--train_data_dir", "DATA", "--lora_format", "both"],
            "lora_format both is for programs that start from noise",
        ),
        (["--train_data_dir", "DATA", "--source_noise", "2"], "source_noise must be at most 1.0, got 2.0"),
        (["--train_data_dir", "DATA", "--validation_pairs", "x"], "validation_pairs does not go with --task image_to"),
        (["--train_data_dir", "DATA", "--depth_scale", "9"], "depth_scale needs --task depth: add it, or leave the"),
        (
            ["--train_data_dir", "DATA", "--validation_prompts", "x", "--validation_steps", "1"],
            "validation_prompts does not go with --task image_to_image: leave it out, and give --validation_data_dir",
        ),
    ],
)
def test_options_that_do_not_go_with_image_to_image_are_refused(
    options: list[str], sentence: str, source_targets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.replace("DATA", str(source_targets)) for word in options]
    assert main(["train", "--task", "image_to_image", *words, "--output_dir", str(tmp_path / "x"), "--dry_run"]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_pairs_of_different_sizes_are_refused_before_the_training(
    source_targets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(source_targets, tmp_path / "pairs")
    Image.new("RGB", (32, 32)).save(folder / "source/3.jpg")
    training = ["--train_data_dir", str(folder)]
    validation = [
        "--train_data_dir",
        str(source_targets),
        "--validation_data_dir",
        str(folder),
        "--validation_steps",
        "1",
    ]
    for words in (training, validation):
        assert (
            main(["train", "--task", "image_to_image", *words, "--output_dir", str(tmp_path / "x"), "--dry_run"]) == 2
        )
        assert "3.jpg has 32x32 pixels and" in capsys.readouterr().err


def test_images_of_several_folders_are_mixed(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = (str(images), str(shutil.copytree(images, tmp_path / "other")))
    dataset = training_files(Train(train_data_dir=folders, dataset_weights=(2.0, 1.0)))
    assert isinstance(dataset, MixedImages) and dataset.mixture is not None and dataset.mixture.counts == (4, 2)
    mixed, single = Train(train_data_dir=folders, dataset_weights=(2.0, 1.0)), Train(train_data_dir=folders[:1])
    assert known_settings(mixed, dataset) == {"dataset_weights": "2.0, 1.0"}
    assert known_settings(single, training_files(single)) == {}
    assert main(["train", "--train_data_dir", folders[0], "--dataset_weights", "1", "--dry_run"]) == 2
    assert "dataset_weights: 1 for 1 data set: give several folders" in capsys.readouterr().err


def test_share_of_noise_needs_its_task(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--train_data_dir", str(images), "--source_noise", "0.5", "--dry_run"]) == 2
    assert "source_noise needs --task image_to_image: add it, or leave the option out" in capsys.readouterr().err


def test_source_and_target_images_are_found_for_training_and_validation(source_targets: Path) -> None:
    folder = str(source_targets)
    words = ["train", "--task", "image_to_image", "--train_data_dir", folder, folder, "--dataset_weights", "3", "1"]
    command = parse([*words, "--validation_data_dir", folder, "--validation_steps", "1", "--source_noise", "0.5"])
    assert isinstance(command, Train)
    found, held_out = training_files(command), held_out_files(command)
    assert isinstance(found, SourceTargetDataset) and isinstance(held_out, SourceTargetDataset)
    assert found.mixture is not None and found.mixture.counts == (6, 2) and len(held_out) == 4
    assert found.options.source_noise == held_out.options.source_noise == 0.5
