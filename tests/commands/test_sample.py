"""`d2f sample` as a user types it: the images it generates, and what it refuses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file

import d2f_fast
from d2f_fast.commands.main import main
from d2f_fast.commands.sample import Sample
from d2f_fast.files.tensor_file import read_tensors
from d2f_fast.lora.inject import inject_lora
from d2f_fast.lora.write import save_lora
from d2f_fast.models.save import stock_flow_scheduler
from d2f_fast.sampling.scheduler import Diff2FlowScheduler


@pytest.fixture(scope="session")
def lora(tiny_folder, tmp_path_factory):
    """Folder of a LoRA that changes the tiny model's images, in both formats."""
    unet = UNet2DConditionModel.from_pretrained(tiny_folder / "unet")
    inject_lora(unet, 2, first_last_layers=True)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return save_lora(unet, tmp_path_factory.mktemp("lora"), lora_format="both").parent


def generated_by_hand(
    model, *, lora=None, method="euler", flow_spacing="uniform", shift=1.0, prediction_type="epsilon", seed=0, **options
):
    """Return the images that the stock pipeline generates."""
    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.scheduler = Diff2FlowScheduler.from_config(
        pipe.scheduler.config,
        method=method,
        flow_spacing=flow_spacing,
        shift=shift,
        prediction_type=prediction_type,
    )
    if lora is not None:
        pipe.load_lora_weights(lora)
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "negative_prompt": "", **options}
    options["negative_prompt"] = [options["negative_prompt"]] * 2
    return pipe(["ab", "cd"], generator=torch.Generator().manual_seed(seed), **options).images


@pytest.mark.parametrize("option", [
    {},
    {"method": "midpoint"},
    {"method": "heun"},
    {"flow_spacing": "trailing"},
    {"shift": 3.0},
    {"prediction_type": "v_prediction"},
    {"prediction_type": "flow_prediction"},
    {"seed": 7},
    {"guidance_scale": 8.0},
    {"num_inference_steps": 3},
    {"negative_prompt": "xyz"},
    {"height": 24, "width": 32},
    {"lora": ""},
], ids=str)  # fmt: skip
def test_sample_generates_what_the_stock_pipeline_does(tiny_folder, lora, tmp_path, option):
    option = {name: str(lora) if name == "lora" else value for name, value in option.items()}
    typed = [word for name, value in option.items() for word in (f"--{name}", str(value))]
    command = ["sample", "--prompts", "ab", "cd", "--model", str(tiny_folder), "--output_dir", str(tmp_path)]
    assert main([*command, *typed]) == 0
    got = [np.asarray(Image.open(tmp_path / f"00{i}.png"), np.int16) for i in range(2)]
    want, plain = (
        [np.asarray(image, np.int16) for image in generated_by_hand(tiny_folder, **options)] for options in (option, {})
    )
    rounding = 1 if "lora" in option else 0
    for ours, theirs, other in zip(got, want, plain, strict=True):
        assert ours.shape == theirs.shape and np.abs(ours - theirs).max() <= rounding
        assert not option or theirs.shape != other.shape or np.abs(theirs - other).max() > rounding


def test_shift_and_prediction_type_are_those_of_the_models_flow_scheduler(tiny_folder, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    stock_flow_scheduler(1000, 3.0).save_pretrained(model / "scheduler")
    index = json.loads((model / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "DPMSolverMultistepScheduler"]
    (model / "model_index.json").write_text(json.dumps(index))
    command = ["sample", "--prompts", "ab", "cd", "--model", str(model), "--output_dir", str(tmp_path)]
    assert main(command) == 0
    expected = generated_by_hand(tiny_folder, prediction_type="flow_prediction", shift=3.0)
    for i, image in enumerate(expected):
        written = Image.open(tmp_path / f"00{i}.png")
        assert np.array_equal(np.asarray(written), np.asarray(image)) and "Shift: 3.0" in written.text["parameters"]


def test_reflection_padding_is_an_option_and_is_taken_from_the_tags_of_a_lora(tiny_folder, lora, tmp_path):
    tensors, header = read_tensors(lora / "pytorch_lora_weights.safetensors")
    tagged = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(tensors, tagged, header | {"d2f.vae_reflection_padding": "true"})
    images = []
    for path, options in ((lora, []), (lora, ["--vae_reflection_padding"]), (tagged, [])):
        command = ["sample", "--prompts", "ab", "--model", str(tiny_folder), "--lora", str(path)]
        assert main([*command, "--num_inference_steps", "1", "--output_dir", str(tmp_path / "out"), *options]) == 0
        images.append(np.asarray(Image.open(tmp_path / "out" / f"00{len(images)}.png")))
    assert np.array_equal(images[1], images[2]) and not np.array_equal(images[0], images[1])


def test_images_are_never_replaced_and_say_how_they_were_generated(tiny_folder, lora, tmp_path, capsys):
    output = tmp_path / "images"
    output.mkdir()
    for name in ("007.png", "mine.png"):
        (output / name).write_text("mine")
    command = ["sample", "--prompts", "ab", "cd", "--model", str(tiny_folder), "--output_dir", str(output), "--json"]
    more = ["--lora", f"{lora}:0.5", "--negative_prompt", "x", "--num_inference_steps", "1", "--seed", "3"]
    for options in (more, ["--num_inference_steps", "1", "--height", "24"]):
        assert main([*command, *options]) == 0
    files = [f"0{number:02d}.png" for number in (8, 9, 10, 11)]
    assert [Path(file).name for file in json.loads(capsys.readouterr().out.splitlines()[-1])["files"]] == files[2:]
    assert sorted(path.name for path in output.glob("*.png")) == ["007.png", *files, "mine.png"]
    assert (output / "007.png").read_text() == (output / "mine.png").read_text() == "mine"
    with Image.open(output / "009.png") as image:
        text = image.text["parameters"]
    assert text == (
        "cd\nNegative prompt: x\nSteps: 1, Sampler: d2f flow euler, Schedule type: uniform, Shift: 1.0, CFG scale: 3.0,"
        f' Seed: 3, Size: 16x16, Model: pipeline, Lora: "{lora.name}:0.5", Batch size: 2, Batch pos: 1, Version:'
        f" d2f_fast {d2f_fast.__version__}"
    )
    first, second = json.loads((output / "metrics.json").read_text())["results"]
    assert first["prompts"] == ["ab", "cd"] and first["negative_prompt"] == "x" and first["files"] == files[:2]
    assert (first["model"], first["lora"], first["seed"]) == (str(tiny_folder), [f"{lora}:0.5"], 3)
    assert (second["height"], second["width"], second["steps"], second["guidance_scale"]) == (24, 16, 1, 3.0)


@pytest.mark.slow
def test_command_prints_nothing_of_other_libraries(tiny_folder, tmp_path):
    command = [sys.executable, "-m", "d2f_fast", "sample", "--prompts", "ab", "--model", str(tiny_folder)]
    more = ["--num_inference_steps", "1", "--output_dir", str(tmp_path)]
    done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=600)
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line]
    assert done.returncode == 0 and lines[0].startswith(f"d2f: Model {tiny_folder}: ")
    assert all(line.startswith("d2f: ") or "%|" in line for line in lines), done.stderr


def test_record_of_another_command_is_not_replaced(tiny_folder, tmp_path, capsys):
    record = tmp_path / "metrics.json"
    record.write_text('{"command": "d2f train", "results": []}')
    assert main(["sample", "--prompts", "ab", "--model", str(tiny_folder), "--output_dir", str(tmp_path)]) == 2
    line = f"d2f: {record} is the record of another command: choose another output_dir\n"
    assert capsys.readouterr().err == line
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_images_of_a_trained_lora_are_the_same_each_time(train, tiny_folder, tmp_path, capsys):
    output = tmp_path / "run"
    assert train(output) == 0
    capsys.readouterr()
    images = []
    for name, lora in (("plain", []), ("adapted", ["--lora", str(output)]), ("again", ["--lora", str(output)])):
        command = ["sample", "--prompts", "ab", "cd", "--model", str(tiny_folder), "--output_dir", str(tmp_path / name)]
        size = ["--height", "16", "--width", "16", "--num_inference_steps", "2", "--json"]
        assert main([*command, *lora, *size]) == 0
        files = json.loads(capsys.readouterr().out)["files"]
        assert len(files) == 2
        images.append([np.asarray(Image.open(file)) for file in files])
    assert np.array_equal(images[1], images[2]) and images[0][0].shape == (16, 16, 3)


def test_sampling_takes_prediction_type_and_shift_from_the_trained_files(train, tiny_folder, tmp_path, capsys):
    options = ["--objective", "fm", "--flow_shift", "3", "--learning_rate", "0.1"]
    assert train(tmp_path / "lora", *options) == 0
    assert train(tmp_path / "full", *options, "--adapter", "full") == 0
    saved, base = str(tmp_path / "full" / "pipeline"), str(tiny_folder)
    said, other = (
        ["--prediction_type", "flow_prediction", "--shift", "3"],
        ["--prediction_type", "epsilon", "--shift", "1"],
    )
    for model, lora in ((base, ["--lora", str(tmp_path / "lora")]), (saved, [])):
        images = []
        for more in ([], said, other):
            command = ["sample", "--prompts", "ab", "--model", model, *lora, "--height", "16", *more, "--json"]
            assert main([*command, "--output_dir", str(tmp_path / "images")]) == 0
            (file,) = json.loads(capsys.readouterr().out.splitlines()[-1])["files"]
            images.append(np.asarray(Image.open(file)))
        assert np.array_equal(images[0], images[1]) and not np.array_equal(images[0], images[2])
        assert images[0].shape == (16, 16, 3)


def test_guidance_is_the_lowest_that_the_files_recommend_unless_it_is_given(tiny_folder, tmp_path, capsys):
    random_lora(tiny_folder, tmp_path / "pairs.safetensors", 1, {"d2f.recommended_guidance": "1.0"})
    random_lora(tiny_folder, tmp_path / "style.safetensors", 2, {"d2f.recommended_guidance": "3.0"})
    pair, style = (str(tmp_path / f"{name}.safetensors") for name in ("pairs", "style"))
    images = {}
    for name, options, expected in (
        ("saved", ["--lora", style, pair], "1, as saved with the model or LoRA"),
        ("one", ["--lora", style, pair, "--guidance_scale", "1"], "1, as given"),
        ("style", ["--lora", style], "3, as saved with the model or LoRA"),
        ("three", ["--lora", style, "--guidance_scale", "3"], "3, as given"),
        ("added", ["--lora", pair, "--guidance_scale", "3"], "3, as given"),
        ("default", [], "3, the default"),
    ):
        command = ["sample", "--prompts", "ab", "--model", str(tiny_folder), "--num_inference_steps", "2"]
        assert main([*command, "--output_dir", str(tmp_path / "images"), *options]) == 0
        images[name] = np.asarray(Image.open(tmp_path / "images" / "000.png"))
        said = [line for line in capsys.readouterr().err.splitlines() if "guidance" in line]
        added = ["d2f: the model or LoRA has guidance built in, to which this one is added: leave --guidance_scale out"]
        assert said == [f"d2f: guidance_scale {expected}", *(added if name == "added" else [])]
    assert np.array_equal(images["saved"], images["one"]) and np.array_equal(images["style"], images["three"])
    random_lora(tiny_folder, tmp_path / "bad.safetensors", 1, {"d2f.recommended_guidance": "0.5"})
    assert main([*command, "--lora", str(tmp_path / "bad.safetensors")]) == 2
    assert "bad.safetensors holds no usable d2f.recommended_guidance" in capsys.readouterr().err


def test_steps_are_those_that_the_files_recommend_unless_they_are_given(tiny_folder, tmp_path, capsys):
    reflow = tmp_path / "reflow.safetensors"
    random_lora(tiny_folder, reflow, 1, {"d2f.recommended_steps": "1"})
    command = ["sample", "--prompts", "ab", "--model", str(tiny_folder), "--output_dir", str(tmp_path / "images")]
    cases = {
        ("--lora", str(reflow)): (1, f"d2f: num_inference_steps 1, as saved in {reflow}"),
        ("--lora", str(reflow), "--num_inference_steps", "2"): (2, "d2f: num_inference_steps 2, as given"),
        (): (4, "d2f: num_inference_steps 4, the default"),
    }
    for options, (steps, line) in cases.items():
        assert main([*command, *options, "--json"]) == 0
        captured = capsys.readouterr()
        assert json.loads(captured.out)["steps"] == steps
        assert [text for text in captured.err.splitlines() if "num_inference_steps" in text] == [line]
    saved, given = (np.asarray(Image.open(tmp_path / f"images/00{i}.png")) for i in (0, 1))
    assert not np.array_equal(saved, given)
    assert main([*command, "--lora", str(reflow), "--method", "heun", "--dry_run"]) == 2
    assert "method heun needs at least 2 num_inference_steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--num_inference_steps", "0"], "num_inference_steps must be at least 1, got 0"),
        (["--method", "heun", "--num_inference_steps", "1"], "method heun needs at least 2 num_inference_steps"),
        (["--negative_prompt", "c", "--guidance_scale", "1"], "negative_prompt has no effect with guidance_scale 1"),
        (["--onnx_provider", "auto"], "onnx_provider needs --onnx: add --onnx FOLDER, or leave onnx_provider out"),
        (["--seed", "-1"], "seed must be in [0, 2**63), got -1"),
        (["--shift", "-1"], "shift must be positive and finite, got -1.0"),
        (["--guidance_scale", "nan"], "guidance_scale must be finite, got nan"),
        (["--height", "17"], "height must be a positive multiple of 8, got 17"),
        (
            ["--flow_spacing", "trailing", "--num_inference_steps", "1500"],
            "steps must be 1 to 1000 with trailing spacing",
        ),
        (["--flow_spacing", "trailing", "--prediction_type", "flow_prediction"], 'spacing must be "uniform"'),
        (["--method", "rk45"], "method"),
        (["--output_dir", "file"], "file cannot be made a folder (File exists): name another"),
    ],
)
def test_bad_sampling_options_are_refused(options, sentence, tiny_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    try:
        code = main(["sample", "--prompts", "ab", "--model", str(tiny_folder), *options])
    except SystemExit as exit_:  # raised by the option parser
        code = exit_.code
    assert code == 2 and sentence in capsys.readouterr().err


def test_model_of_instruct_pix2pix_changes_an_image_as_the_stock_pipeline_does(tiny_folder, tmp_path, capsys):
    base = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    torch.manual_seed(2)
    network = UNet2DConditionModel.from_config(dict(base.unet.config) | {"in_channels": 8}).eval()
    parts = base.components | {"unet": network, "safety_checker": None}
    pipe = StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)
    pipe.save_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    image.save(tmp_path / "a.png")
    pipe.scheduler = Diff2FlowScheduler.from_config(pipe.scheduler.config)
    command = ["sample", "--model", str(tmp_path / "model"), "--prompts", "ab", "--output_dir", str(tmp_path / "out")]
    command += ["--num_inference_steps", "3", "--json"]
    for scales in ((3.0, 1.5), (3.0, 1.0), (1.0, 1.0)):
        options = {"guidance_scale": scales[0], "image_guidance_scale": scales[1]}
        given = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(0), **options}
        (want,) = pipe("ab", image, **given).images
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        assert main([*command, "--image", str(tmp_path / "a.png"), *words]) == 0
        row = json.loads(capsys.readouterr().out)
        got = Image.open(row["files"][0])
        assert np.abs(np.asarray(got, np.int16) - np.asarray(want, np.int16)).max() <= 1
        assert row["image_guidance_scale"] == scales[1]
        assert f"Image CFG scale: {scales[1]}" in got.text["parameters"]
    for model, words, sentence in (
        (
            tmp_path / "model",
            [],
            "takes 8 channels, and its latents have 4: add --task depth for a model of depth, or --image",
        ),
        (
            tiny_folder,
            ["--image", str(tmp_path / "a.png")],
            "takes 4 channels, and its latents and an image have 8: leave",
        ),
    ):
        assert main(["sample", "--model", str(model), "--prompts", "ab", *words]) == 2
        assert sentence in capsys.readouterr().err


def test_unusable_saved_shift_is_refused_with_its_file(tiny_folder, tmp_path, capsys):
    shutil.copytree(tiny_folder, tmp_path / "model")
    for text in ('{"d2f.shift": "wide"}', "[1]", '{"d2f.shift": null}', '{"d2f.shift": "1e300"}'):
        (tmp_path / "model" / "d2f.json").write_text(text)
        assert main(["sample", "--prompts", "ab", "--model", str(tmp_path / "model")]) == 2
        error = capsys.readouterr().err
        assert "d2f.json" in error
        assert ("is not a JSON object" if text == "[1]" else "d2f.shift must be a number") in error
        assert error.count("\n") == 1


def random_lora(tiny_folder, file, seed, header=None):
    """Write a LoRA of the first convolution, and return the weight that it adds at full strength."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(*shape, generator=generator) * 0.3 for shape in ((2, 4, 3, 3), (8, 2, 1, 1)))
    save_file({"unet.conv_in.lora_A.weight": a, "unet.conv_in.lora_B.weight": b}, file, header)
    return (b.flatten(1) @ a.flatten(1)).reshape(8, 4, 3, 3)


def test_several_lora_are_added_with_their_scales(tiny_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run:2", "checkpoint-3").mkdir(parents=True)
    first = random_lora(tiny_folder, Path("one.safetensors"), 1)
    second = random_lora(tiny_folder, Path("run:2", "checkpoint-3", "pytorch_lora_weights.safetensors"), 2)
    size = ["--height", "16", "--width", "16", "--num_inference_steps", "2", "--output_dir", "images"]
    command = ["sample", "--prompts", "ab", "--model", str(tiny_folder), *size, "--lora"]
    assert main([*command, "one.safetensors:0.8", "run:2/checkpoint-3"]) == 0
    got = np.asarray(Image.open("images/000.png"), np.int16)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    with torch.no_grad():
        pipe.unet.conv_in.weight += 0.8 * first + second
    pipe.scheduler = Diff2FlowScheduler.from_config(pipe.scheduler.config)
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 16, "width": 16}
    want = pipe(["ab"], generator=torch.Generator().manual_seed(0), **options).images[0]
    assert np.abs(got - np.asarray(want, np.int16)).max() <= 1
    capsys.readouterr()
    assert main([*command, "run:2"]) == 2
    assert "give run:2/checkpoint-3, its newest checkpoint" in capsys.readouterr().err


def test_lora_whose_tags_contradict_each_other_are_refused(tiny_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random_lora(tiny_folder, "one.safetensors", 1, {"d2f.shift": "1.0", "d2f.prediction_type": "epsilon"})
    random_lora(tiny_folder, "three.safetensors", 1, {"d2f.shift": "3.0", "d2f.prediction_type": "epsilon"})
    random_lora(tiny_folder, "flow.safetensors", 1, {"d2f.prediction_type": "flow_prediction"})
    command = ["sample", "--prompts", "ab", "--model", str(tiny_folder), "--lora"]
    assert main([*command, "one.safetensors", "three.safetensors", "--shift", "2", "--dry_run"]) == 0
    monkeypatch.setattr(Sample, "_generate", lambda *arguments: pytest.fail("the files were refused too late"))
    capsys.readouterr()
    assert main([*command, "one.safetensors", "three.safetensors"]) == 2
    assert "their shifts 1.0 and 3.0 differ: give --shift" in capsys.readouterr().err
    assert main([*command, "one.safetensors", "flow.safetensors"]) == 2
    assert "flow.safetensors makes the network predict the flow velocity, and one.safetensors does not" in (
        capsys.readouterr().err
    )


def test_lora_of_another_model_is_refused_with_its_key(tiny_folder, tmp_path, capsys):
    file = tmp_path / "pytorch_lora_weights.safetensors"
    halves = {"A": torch.zeros(2, 9, 3, 3), "B": torch.zeros(8, 2, 1, 1)}
    save_file({f"unet.conv_in.lora_{half}.weight": value for half, value in halves.items()}, file)
    command = ["sample", "--prompts", "ab", "--model", str(tiny_folder), "--lora"]
    assert main([*command, str(file)]) == 2
    assert "unet.conv_in changes a weight of 8 x 81, which does not fit" in (error := capsys.readouterr().err)
    assert "it is a LoRA of a network that takes 9 channels, and this one takes 4" in error and error.count("\n") == 1
    save_file({"unet.conv_in.oft_R": torch.zeros(2)}, tmp_path / "oft.safetensors")
    assert (
        main(["sample", "--prompts", "ab", "--model", str(tiny_folder), "--lora", str(tmp_path / "oft.safetensors")])
        == 2
    )
    assert "oft.safetensors: unet.conv_in.oft_R is a key of OFT, which is not read" in capsys.readouterr().err
    (tmp_path / "weights.bin").touch()
    assert main([*command, str(tmp_path / "weights.bin")]) == 2
    assert "is not safetensors" in capsys.readouterr().err
    assert main([*command, "nope:0.8"]) == 2
    assert capsys.readouterr().err == "d2f: LoRA nope: there is no such file or folder; check the path\n"
