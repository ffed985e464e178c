"""`d2f train --task image_to_image` and `d2f sample --task image_to_image`: their files, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from d2f_fast.commands.main import main
from d2f_fast.lora.merge import fuse_adapter
from d2f_fast.lora.read import read_lora
from d2f_fast.models.base_model import BaseModel, to_pil


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, source_targets: Path) -> Path:
    """Folder of a short run of the tiny model from source to target images. No test may change it."""
    output = tmp_path_factory.mktemp("source") / "run"
    paths = ["--train_data_dir", str(source_targets), "--pretrained_model_name_or_path", str(tiny_folder)]
    options = ["--max_train_steps", "2", "--resolution", "16", "--train_batch_size", "2", "--rank", "2"]
    options += ["--learning_rate", "1e-2", "--source_noise", "0.25", "--ema_decay", "0"]
    assert main(["train", "--task", "image_to_image", *paths, "--output_dir", str(output), *options]) == 0
    return output


@pytest.fixture
def sample(run: Path, tiny_folder: Path, source_targets: Path, tmp_path: Path) -> Callable[..., int]:
    """Return a function that changes images with the run's LoRA and more options, and returns the exit code."""
    image = str(source_targets / "source/1.jpg")
    lora = ["--model", str(tiny_folder), "--lora", str(run)]
    return lambda *more, images=(image,), lora=lora, output="out": main(
        ["sample", "--task", "image_to_image", "--image", *images, *lora, "--output_dir", str(tmp_path / output), *more]
    )


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_run_records_its_task_and_how_it_is_sampled(run: Path) -> None:
    with safe_open(run / "pytorch_lora_weights.safetensors", "pt") as file:
        tags = file.metadata()
    assert (tags["d2f.task"], tags["d2f.source_noise"], tags["d2f.image_pairs"]) == ("image_to_image", "0.25", "4")
    assert (tags["d2f.recommended_steps"], tags["d2f.recommended_guidance"]) == ("4", "1.0")
    assert tags["modelspec.usage_hint"] == "4 steps; starts from an image, with d2f sample --task image_to_image"
    assert not list(run.glob("*_kohya*")) and not (run / "pipeline").exists()
    card = (run / "README.md").read_text()
    assert "pipeline_tag: image-to-image" in card and "## Change images in four steps" in card
    assert (
        "`d2f sample --task image_to_image --model BASE --lora run --image IMAGE"
        " --num_inference_steps 4 --guidance_scale 1`"
    ) in card
    assert "BASE is the base model, in quotes. IMAGE is the file of the image to start from; " in card
    assert "| pairs of images per step | 2 |" in card
    assert "| share of noise at the start | 0.25 |" in card and "ComfyUI" not in card
    assert json.loads((run / "config.json").read_text())["source_noise"] == 0.25


def test_lines_of_the_card_give_the_image_of_d2f_sample(
    sample: Callable[..., int],
    run_card: Callable[..., list[dict[str, Any]]],
    run: Path,
    tiny_folder: Path,
    source_targets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(run.parent)
    assert sample() == 0
    said = capsys.readouterr().err
    assert "d2f: num_inference_steps 4, as saved in " in said
    assert "d2f: guidance_scale 1, as saved with the model or LoRA\n" in said
    with Image.open(source_targets / "source/1.jpg") as image:
        (found,) = run_card((run / "README.md").read_text(), BASE=str(tiny_folder), IMAGE=image.convert("RGB"))
    assert np.abs(np.asarray(found["image"]).astype(int) - pixels(tmp_path / "out/1.png")).max() <= 1


def test_image_is_that_of_the_flow_from_the_noised_source(
    sample: Callable[..., int], run: Path, tiny_folder: Path, source_targets: Path, tmp_path: Path
) -> None:
    assert sample("--seed", "5", "--prompts", "a b", "--method", "heun", "--num_inference_steps", "2") == 0
    model = BaseModel.load(tiny_folder)
    fuse_adapter(model.pipeline, read_lora(run), 1.0)
    image = torch.from_numpy(pixels(source_targets / "source/1.jpg")).permute(2, 0, 1)[None] / 127.5 - 1
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    flow = model.alignment
    with torch.no_grad():
        text = model.encode_prompts(["a b"])["encoder_hidden_states"]

        def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
            now = torch.tensor([t])
            state = flow.to_sample(x, now)
            return flow.velocity(model.unet(state, flow.timestep(now), text).sample, state, now)

        x = 0.75 * model.vae.encode(image).latent_dist.mean * model.vae.config.scaling_factor + 0.25 * noise
        slope = velocity(x, 0.0)
        x = x + (slope + velocity(x + 0.5 * slope, 0.5)) / 4
        x = x + 0.5 * velocity(x, 0.5)
        expected = np.asarray(to_pil(model.decode(x))[0]).astype(int)
    assert np.abs(pixels(tmp_path / "out/1.png") - expected).max() <= 1
    row = json.loads((tmp_path / "out/metrics.json").read_text())["results"][0]
    assert (row["task"], row["source_noise"], row["guidance_scale"], row["steps"]) == ("image_to_image", 0.25, 1.0, 2)
    assert row["files"] == ["1.png"]
    with Image.open(tmp_path / "out/1.png") as made:
        assert "a b" in made.text["parameters"] and "Size: 16x16" in made.text["parameters"]  # type: ignore[attr-defined]


def test_hub_id_is_sampled_as_its_folder_says(
    sample: Callable[..., int],
    tiny_folder: Path,
    cached_as: Callable[[str, Path], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = cached_as("me/restore", tiny_folder)
    assert sample(lora=("--model", "me/restore")) == 2
    assert "d2f.json does not say that its flow starts from an image" in capsys.readouterr().err
    tags = {"d2f.task": "image_to_image", "d2f.source_noise": "0.5", "d2f.recommended_steps": "1"}
    (folder / "d2f.json").write_text(json.dumps(tags))
    assert sample(lora=("--model", "me/restore")) == 0
    row = json.loads((tmp_path / "out/metrics.json").read_text())["results"][0]
    assert (row["model"], row["source_noise"], row["steps"]) == ("me/restore", 0.5, 1)


def test_result_of_an_image_depends_on_no_other_and_has_its_size(
    sample: Callable[..., int], source_targets: Path, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    with Image.open(source_targets / "source/1.jpg") as image:
        wide = image.resize((35, 17))
    wide.save(tmp_path / "images/wide.png")
    shutil.copy(source_targets / "source/1.jpg", tmp_path / "images/1.jpg")
    options = ["--num_inference_steps", "1", "--source_noise", "0.5"]
    assert sample(*options, images=(str(tmp_path / "images"),)) == 0
    assert pixels(tmp_path / "out/wide.png").shape == (16, 32, 3)
    assert sample(*options, "--height", "16", "--width", "16", images=(str(tmp_path / "images"),), output="square") == 0
    assert (pixels(tmp_path / "out/1.png") == pixels(tmp_path / "square/1.png")).all()
    assert pixels(tmp_path / "square/wide.png").shape == (16, 16, 3)


def test_model_that_was_trained_with_captions_asks_for_prompts(
    sample: Callable[..., int], run: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = run / "pytorch_lora_weights.safetensors"
    with safe_open(lora, "pt") as file:
        tags = file.metadata()
    assert tags["d2f.captions"] == "false"
    captioned = tmp_path / "captioned.safetensors"
    save_file(load_file(lora), captioned, tags | {"d2f.captions": "true"})
    options = ["--num_inference_steps", "1"]
    for number, (prompts, path) in enumerate((([], captioned), (["--prompts", "a"], captioned), ([], lora))):
        given = ["--model", str(tiny_folder), "--lora", str(path)]
        assert sample(*options, *prompts, lora=given, output=f"out{number}") == 0
        said = "the model was trained with captions: describe the result with --prompts" in capsys.readouterr().err
        assert said is (number == 0)


def test_what_cannot_be_used_is_refused_in_one_line(
    sample: Callable[..., int],
    run: Path,
    tiny_folder: Path,
    source_targets: Path,
    tmp_path: Path,
    adapted: tuple[object, dict[str, Path]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/1.png").touch()
    Image.new("RGB", (7, 20)).save(tmp_path / "small.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    good = str(source_targets / "source/2.jpg")
    wrong = tmp_path / "wrong.safetensors"
    lora = run / "pytorch_lora_weights.safetensors"
    with safe_open(lora, "pt") as file:
        save_file(load_file(lora), wrong, file.metadata() | {"d2f.source_noise": "much"})
    base = ["--model", str(tiny_folder)]
    cases = {
        "1.png exists: choose another output_dir": {},
        "does not say that its flow starts from an image: give the result of d2f train": {"lora": base},
        "starts from an image: give the": {"lora": [*base, "--lora", str(adapted[1]["peft"])]},
        "d2f.source_noise must be in [0, 1], got much: give --source_noise": {"lora": [*base, "--lora", str(wrong)]},
        "missing.png does not exist: give an image file or a folder": {"images": ("missing.png",)},
        "small.png: 7x20 pixels are too small: each side needs 8": {"images": (good, str(tmp_path / "small.png"))},
        "bad.png does not decode as PNG, JPEG, WEBP, BMP": {"images": (good, str(tmp_path / "bad.png"))},
    }
    for sentence, options in cases.items():
        output = "out" if "exists" in sentence else "elsewhere"
        assert sample(output=output, **options) == 2, sentence
        assert sentence in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.glob("elsewhere/*.png"))
    for options, sentence in (
        (["--prompts", "a", "b"], "prompts: give one, or one for each of the 1 images, got 2"),
        (
            ["--method", "euler_maruyama"],
            "method euler_maruyama needs a flow that starts from noise, and this one starts",
        ),
        (["--method", "stochastic_heun"], "starts from an image: give --method euler or rk4"),
        (["--height", "16"], "height and width must be given together"),
        (["--negative_prompt", "a"], "negative_prompt has no effect with guidance_scale 1"),
    ):
        assert sample(*options, "--dry_run", output="elsewhere") == 2
        assert sentence in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "command",
    [
        ["sample", "--prompts", "a"],
        ["pairs", "--prompts_file", "PROMPTS"],
        ["evaluate", "--straightness", "--prompts", "a"],
    ],
    ids=["sample", "pairs", "evaluate"],
)
def test_commands_that_start_from_noise_refuse_the_lora(
    command: list[str], run: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("a\n")
    words = [word.replace("PROMPTS", str(tmp_path / "prompts.txt")) for word in command]
    lora = ["--model", str(tiny_folder), "--lora", str(run), "--output_dir", str(tmp_path / "out"), "--dry_run"]
    assert main([*words, *lora]) == 2
    assert "was trained to start from an image, and this command starts from noise" in capsys.readouterr().err
