"""The lines that say how to use a result name what each program needs, and give the image of `d2f sample`."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from d2f_fast.commands.main import main
from d2f_fast.training.model_card import CARD_FILE, write_model_card
from d2f_fast.training.recipe import placeholders, recipe

TAGS = {
    "d2f.prediction_type": "epsilon",
    "d2f.shift": "1.0",
    "d2f.resolution": "512",
    "d2f.recommended_sigmas": "17.6146, 3, 1, 0.3333, 0",
}
RESULT = {"steps": 7, "images_per_step": 32}
FLOW_TAGS = {**TAGS, "d2f.prediction_type": "flow_prediction", "d2f.shift": "3.0"}
PAIR_TAGS = TAGS | {
    "d2f.recommended_sigmas": "15.6146, 1, 0",
    "d2f.recommended_steps": "2",
    "d2f.recommended_guidance": "1.0",
    "d2f.data": "pairs",
}


@pytest.fixture
def lines(folder: Path) -> Callable[..., list[str]]:
    """Return a function that gives the lines about the folder with tags and more options."""
    return lambda tags=TAGS, name="owls", family="sd1", **more: [
        way.line for way in recipe(folder, tags, family, name, **more)
    ]


def test_recipe_has_a_line_for_each_program(lines: Callable[..., list[str]]) -> None:
    d2f, flow, stock, comfyui, a1111 = lines()
    sampling = "--num_inference_steps 4 --guidance_scale 3"
    assert d2f == f"d2f_fast: `d2f sample --model BASE --lora owls --prompts TEXT {sampling}`"
    for line in (flow, stock):
        assert "from_pretrained(BASE)" in line
        assert 'load_lora_weights("owls", weight_name="pytorch_lora_weights.safetensors")' in line
    assert "Diff2FlowScheduler.from_config(pipe.scheduler.config); " in flow
    assert "(TEXT, num_inference_steps=4, guidance_scale=3, height=512, width=512, generator=" in flow
    assert "import DiffusionPipeline, EulerDiscreteScheduler; " in stock and "d2f_fast" not in stock
    assert "(TEXT, sigmas=[17.6146, 3, 1, 0.3333, 0], guidance_scale=3, height=512, width=512)" in stock
    assert "`owls_kohya.safetensors` in models/loras" in comfyui
    assert comfyui.endswith("ManualSigmas (`17.6146, 3, 1, 0.3333, 0`) and SamplerCustom (euler, cfg 3)")
    assert a1111.startswith("A1111, Forge (in 20 steps or more, not in 4, because they take no list of sigmas): ")
    assert a1111.endswith("`<lora:owls_kohya:1>` in the prompt, sampler Euler, 20 steps, CFG scale 3")


def test_recipe_names_the_base_model(lines: Callable[..., list[str]]) -> None:
    d2f, *diffusers = lines(base="some/model")[:3]
    assert "--model some/model " in d2f
    assert all('pipe = DiffusionPipeline.from_pretrained("some/model"); ' in line for line in diffusers)
    d2f, flow, stock, other = lines(base="miniature", family=None)
    assert "--model miniature " in d2f and "pipe = load_miniature()" in flow and "pipe = load_miniature()" in stock
    assert other == "ComfyUI, A1111 and Forge load SD1.x, SD2.x and SDXL only, and not this model"
    for family, pipeline in (("sd2", "StableDiffusionPipeline"), ("sdxl", "StableDiffusionXLPipeline")):
        assert f'{pipeline}.from_single_file("a.safetensors")' in lines(base="a.safetensors", family=family)[1]


def test_recipe_of_a_flow_from_an_image_has_prompts_after_a_training_with_captions(
    lines: Callable[..., list[str]],
) -> None:
    tags = TAGS | {"d2f.task": "image_to_image", "d2f.source_noise": "0.0", "d2f.captions": "true"}
    tags |= {"d2f.recommended_guidance": "1.0"}
    sampling = "--num_inference_steps 4 --guidance_scale 1`"
    d2f, diffusers = lines(tags)
    assert d2f.endswith(f"--lora owls --image IMAGE --prompts TEXT {sampling}") and "pipe(TEXT, latents=" in diffusers
    assert "to start from; " in placeholders(tags, names_base=False)
    assert placeholders(tags, names_base=False).endswith("TEXT is the caption of the result, in quotes.")
    d2f, diffusers = lines(tags | {"d2f.captions": "false"})
    assert d2f.endswith(f"--lora owls --image IMAGE {sampling}") and 'pipe("", latents=' in diffusers


def test_recipe_after_pairs_has_two_steps_and_no_guidance(folder: Path, lines: Callable[..., list[str]]) -> None:
    d2f, flow, stock, comfyui, a1111 = lines(PAIR_TAGS)
    assert d2f.endswith("--prompts TEXT --num_inference_steps 2 --guidance_scale 1`")
    assert "pipe(TEXT, num_inference_steps=2, guidance_scale=1, " in flow
    assert "pipe(TEXT, sigmas=[15.6146, 1, 0], guidance_scale=1, " in stock
    assert comfyui.endswith("ManualSigmas (`15.6146, 1, 0`) and SamplerCustom (euler, cfg 1)")
    assert "not in 2" in a1111 and a1111.endswith("sampler Euler, 20 steps, CFG scale 1")
    distilled = PAIR_TAGS | {"d2f.recommended_steps": "1", "d2f.distilled": "true"}
    assert not any("A1111" in line for line in lines(distilled))
    (folder / "pipeline").mkdir()
    assert "(TEXT, sigmas=[15.6146, 1, 0], guidance_scale=1)" in lines(PAIR_TAGS)[1]


def test_recipe_quotes_a_name_with_spaces_for_the_shell(folder: Path, lines: Callable[..., list[str]]) -> None:
    assert shlex.split(lines(name="my owls")[0].split("`")[1])[3:6] == ["BASE", "--lora", "my owls"]
    (folder / "pipeline").mkdir()
    assert shlex.split(lines(name="my owls")[0].split("`")[1])[2:4] == ["--model", "my owls/pipeline"]


def test_recipe_of_a_flow_model_has_the_shift_and_no_line_for_a1111(lines: Callable[..., list[str]]) -> None:
    _, flow, stock, comfyui = lines(FLOW_TAGS)
    assert 'from_config(pipe.scheduler.config, prediction_type="flow_prediction", shift=3.0)' in flow
    assert "FlowMatchEulerDiscreteScheduler(shift=3.0)" in stock
    assert comfyui.endswith("ModelSamplingSD3 (shift 3.0) and KSampler (4 steps, cfg 3, euler, simple)")


def test_recipe_of_the_published_form_names_this_package_only(lines: Callable[..., list[str]]) -> None:
    assert len(lines({**FLOW_TAGS, "d2f.fm_form": "published"})) == 1


def test_recipe_of_a_pipeline_passes_its_sigmas(folder: Path, lines: Callable[..., list[str]]) -> None:
    (folder / "pipeline").mkdir()
    d2f, diffusers, comfyui, a1111 = lines()
    assert "--model owls/pipeline" in d2f
    assert 'from_pretrained("owls/pipeline"); ' in diffusers
    assert "pipe(TEXT, sigmas=[17.6146, 3, 1, 0.3333, 0], guidance_scale=3)" in diffusers
    assert "`d2f convert owls/pipeline owls.safetensors`, that file in models/checkpoints" in comfyui
    assert "ManualSigmas (`17.6146, 3, 1, 0.3333, 0`)" in comfyui
    assert a1111.endswith("the same file in models/Stable-diffusion; sampler Euler, 20 steps, CFG scale 3")
    flow = lines(FLOW_TAGS)
    assert "FlowMatchEulerDiscreteScheduler(shift=3.0); " in flow[2] and "sigmas=[1, 0.75, 0.5, 0.25]" in flow[2]
    assert len(flow) == 4 and "CheckpointLoaderSimple, ModelSamplingSD3 (shift 3.0)" in flow[-1]
    assert "height=48, width=64" in lines(TAGS | {"d2f.resolution": "48x64 32x32"})[1]
    assert len(lines(family=None)) == 3  # No other program loads the model, and `d2f convert` refuses it.


@pytest.mark.parametrize(
    ("options", "exact"),
    [
        ({"resolution": (24, 32)}, [True, False]),
        ({"objective": "fm"}, [True, True]),
        ({"objective": "fm", "adapter": "full", "sampling_shift": 3.0}, [False, True]),
    ],
    ids=str,
)
def test_lines_of_the_card_give_the_image_of_its_line_for_d2f_sample(
    options: dict[str, Any],
    exact: list[bool],
    make_trainer: Callable[..., Any],
    run_card: Callable[..., list[dict[str, Any]]],
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    trainer, folder = make_trainer(**options, ema_decay=0.0), tmp_path / "run"
    with torch.no_grad():
        for name, parameter in trainer.unet.named_parameters():
            if "lora_B" in name:  # These are zeros before a training.
                parameter += torch.randn(parameter.shape)
    folder.mkdir(exist_ok=True)
    if "adapter" in options:
        trainer.save_pipeline(folder / "pipeline")
    else:
        trainer.save_lora(folder)
    assert write_model_card(folder, str(tiny_folder), None, trainer.config, trainer.tags, RESULT) is not None
    card = (folder / CARD_FILE).read_text(encoding="utf-8")
    command = re.search("`d2f (sample .*?)`", card)
    assert command is not None
    arguments = shlex.split(command[1].replace("BASE", shlex.quote(str(tiny_folder))).replace("TEXT", "ab"))
    assert main([*arguments, "--output_dir", "images"]) == 0
    expected = np.asarray(Image.open("images/000.png")).astype(int)
    images = [np.asarray(found["image"]) for found in run_card(card, BASE=str(tiny_folder), TEXT="ab")]
    assert len(images) == len(exact)
    for image, is_exact in zip(images, exact, strict=True):
        difference = np.abs(image - expected)
        assert (difference.max() <= 1) if is_exact else (difference.mean() < 1)


def test_depth_that_starts_from_zeros_is_given_a_scheduler_that_starts_there(tmp_path: Path) -> None:
    exact = "pipe.scheduler = FlowMatchEulerDiscreteScheduler()"
    depth = {"d2f.task": "depth", "d2f.start": "zeros", "d2f.recommended_steps": "1"}
    for tags, is_needed in ((FLOW_TAGS, True), (TAGS, False), (FLOW_TAGS | {"d2f.fm_form": "published"}, False)):
        assert (exact in recipe(tmp_path, tags | depth, None)[1].statements) is is_needed
