"""Test the tables and entries of `d2f evaluate`."""

import numpy as np
import torch

from d2f_fast.commands.evaluation_tables import comparison_table, name_entries, straightness_table
from d2f_fast.miniature import emoji
from d2f_fast.miniature.classifier import load_classifier

ROW = {
    "samples": 7,
    "reference_samples": 9,
    "generated_images": 7,
    "real_images": 16,
    "features": "imagenet",
    "seed": 3,
    "frechet_distance": 12.345,
    "frechet_low": 10.0,
    "frechet_high": 15.5,
    "frechet_floor": 2.0,
    **{name: 0.5 for name in ("precision", "recall", "coverage")},
    **{f"{name}_floor": 0.75 for name in ("precision", "recall", "coverage")},
}


def test_comparison_table_says_counts_interval_floor_and_direction() -> None:
    first, head, *lines, few = comparison_table(ROW | {"images": "folder"})
    assert few.startswith("  7 images are few: precision, recall and coverage can be high by chance")
    assert first.startswith("7 generated images (folder) and, for comparison, 7 real ones, against 9 other real ones")
    assert head.split() == ["generated", "95", "%", "interval", "real", "images"]
    assert lines[0].split("  ")[1:] != [] and lines[0].endswith("lower is better")
    assert "12.35" in lines[0] and "10 … 15.5" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == ["precision", "recall", "coverage"]
    assert all(line.endswith("higher is better") and "0.750" in line for line in lines[1:])
    made = {"model": "m", "lora": ["l:0.5"], "steps": 2, "method": "heun", "guidance_scale": 1.0}
    assert "(m + l:0.5, 2 steps of heun, guidance 1)" in comparison_table(ROW | made)[0]


def test_images_that_are_not_compared_and_too_few_images_are_stated_below_the_table() -> None:
    row = ROW | {"images": "folder"}
    many = {"samples": 100, "reference_samples": 100, "generated_images": 100, "real_images": 200}
    assert comparison_table(row | many)[-1].endswith("higher is better")
    (left_out,) = comparison_table(row | many | {"generated_images": 160})[6:]
    assert left_out.startswith("  100 of the 160 generated images, chosen at random, are compared: half as many as")
    names = {"name_top1": 0.5, "name_top5": 1.0, "name_samples": 16}
    left_out, few = comparison_table(row | names | {"samples": 8, "generated_images": 16})[8:]
    assert left_out.startswith("  8 of the 16 ") and left_out.endswith("right name is looked for in all of them")
    assert few.startswith("  8 images are few")


def test_straightness_table_has_a_line_for_each_segment() -> None:
    row = {"paths": 4, "prompts": 2, "model": "m", "lora": [], "guidance_scale": 3.0, "seed": 0, "mean_deviation": 0.25}
    lines = straightness_table(row | {name: (0.0, 0.5) for name in ("deviation", "curvature", "step_error")})
    assert lines[0].startswith("Straightness of 4 paths of m, 2 prompts, guidance 3, seed 0; lower is better")
    assert lines[2].split() == ["0", "…", "0.5", "0", "0", "0"] and lines[4].split() == ["all", "0.25"]


def test_names_are_counted_where_captions_name_an_emoji() -> None:
    classifier = load_classifier()
    items = [emoji.Emoji(name, 1) for name in (5, 90, 33)]
    with torch.no_grad():
        features = classifier.features(emoji.render(items, "noto")).numpy().astype(np.float32)
    captions = [emoji.caption(5, 1), "a picture", emoji.caption(34, None)]
    found = name_entries(features, captions, classifier, torch.device("cpu"))
    assert found["name_samples"] == 2 and found["name_top1"] == 0.5
    assert name_entries(features, ["a picture", None, None], classifier, torch.device("cpu")) == {}
