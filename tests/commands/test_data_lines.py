"""What a run says of its data before it starts."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from d2f_fast.commands.data_lines import data_lines
from d2f_fast.config import TrainingConfig
from d2f_fast.data.image_folder import CaptionedImages
from d2f_fast.data.mixed import MixedImages
from d2f_fast.data.pairs import PairDataset
from d2f_fast.data.source_images import SourceTargetDataset, SourceTargetFolder


def test_share_of_each_folder_and_length_of_an_epoch_are_said(images: Path, tmp_path: Path) -> None:
    folders = [str(images), str(shutil.copytree(images, tmp_path / "other"))]
    trainer: Any = SimpleNamespace(config=TrainingConfig(max_train_steps=6, resolution=16), global_batch_size=2)
    trainer.model = SimpleNamespace(stated_resolution=None, tokenizers=[])
    mixed = MixedImages([CaptionedImages(folder) for folder in folders], (2.0, 1.0))
    lines = list(data_lines(trainer, mixed, folders, 16))
    assert lines[0] == "trained at 16 x 16 pixels (option --resolution)"
    assert lines[1:3] == [f"{folders[i]} has 3 images, and an epoch takes {4 - 2 * i} from it" for i in range(2)]
    assert lines[3] == "6 images, 2 per step: an epoch has 3 steps, and 6 steps are 2 epochs"
    alone = list(data_lines(trainer, CaptionedImages(images), folders[:1], None))
    assert alone[:2] == [
        "trained at 16 x 16 pixels (the model's own size)",
        "3 images, 2 per step: an epoch has 2 steps, and 6 steps are 3 epochs",
    ]


def test_size_of_each_folder_is_said(images: Path, tmp_path: Path) -> None:
    folders = [str(images), str(shutil.copytree(images, tmp_path / "other"))]
    config = TrainingConfig(max_train_steps=8, resolution=(16, 24, 32, 32))
    trainer: Any = SimpleNamespace(config=config, global_batch_size=2)
    trainer.model = SimpleNamespace(stated_resolution=None, tokenizers=[])
    lines = list(data_lines(trainer, MixedImages([CaptionedImages(folder) for folder in folders]), folders, 16))
    assert lines[0] == "trained at 16 x 24 and 32 x 32 pixels (height x width; option --resolution)"
    assert lines[1:3] == [
        f"{folder} has 3 images, and an epoch takes 3 from it, at {size} pixels"
        for folder, size in zip(folders, ("16 x 24", "32 x 32"), strict=True)
    ]
    # Each folder has a batch of two and one of one.
    assert lines[3] == "6 images, 2 per step: an epoch has 4 steps, and 8 steps are 2 epochs"


def test_pairs_without_captions_and_repeats_of_their_folders_are_said(source_targets: Path, tmp_path: Path) -> None:
    for name in ("source", "target"):
        shutil.copytree(source_targets / name, tmp_path / name / "2_x")
    trainer: Any = SimpleNamespace(config=TrainingConfig(max_train_steps=4, resolution=16), global_batch_size=2)
    trainer.model = SimpleNamespace(stated_resolution=None, tokenizers=[])
    lines = list(data_lines(trainer, SourceTargetDataset(SourceTargetFolder(tmp_path)), [str(tmp_path)], 16))
    assert lines[2:4] == [
        f"{tmp_path} has no captions: every prompt is empty",
        "4 image files count as 8 images, because the numbers of folders repeat them: 2_x 2 times",
    ]
    for number in range(4):
        (tmp_path / f"target/2_x/{number}.txt").write_text("a")
    lines = list(data_lines(trainer, SourceTargetDataset(SourceTargetFolder(tmp_path)), [str(tmp_path)], 16))
    assert lines[2].startswith("4 image files count as 8 images")


def test_size_of_pairs_is_said_whatever_the_resolution_of_the_run_is(
    write_pairs: Callable[..., Path], tmp_path: Path
) -> None:
    dataset = PairDataset([write_pairs(tmp_path / "0.tar", shape=(4, 8, 12))])
    trainer: Any = SimpleNamespace(config=TrainingConfig(max_train_steps=3, resolution=16), global_batch_size=2)
    trainer.model, trainer.teacher = SimpleNamespace(stated_resolution=16, downsampling=2), None
    for resolution in (None, 16):
        line = next(data_lines(trainer, dataset, [], resolution))
        assert line == "trained at 16 x 24 pixels (height x width; size of the pairs)"
