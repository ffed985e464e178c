"""The command line as a user types it: options, refusals, exit codes, and what is left on the disk."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

from d2f_fast.commands.main import main, parse
from d2f_fast.errors import RefusedInputError
from d2f_fast.files.tensor_file import read_tensors
from d2f_fast.lora.inject import inject_lora
from d2f_fast.lora.write import save_lora
from d2f_fast.sampling.scheduler import Diff2FlowScheduler


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("abc")
    return folder


def train(folder: Path, model: Path, output: Path, *more: str) -> int:
    options = ["--max_train_steps", "2", "--resolution", "16", "--rank", "2", "--train_batch_size", "2"]
    paths = [
        "--train_data_dir",
        str(folder),
        "--pretrained_model_name_or_path",
        str(model),
        "--output_dir",
        str(output),
    ]
    return main(["train", *paths, *options, *more])


def test_full_finetuning_leaves_the_averaged_pipeline_and_no_lora(pictures, tiny_folder, tmp_path, capsys):
    output = tmp_path / "run"
    assert train(pictures, tiny_folder, output, "--adapter", "full", "--learning_rate", "0.01") == 0
    assert capsys.readouterr().out.strip() == str(output / "pipeline")
    assert not list(output.rglob("pytorch_lora_weights.safetensors"))
    saved = StableDiffusionPipeline.from_pretrained(output / "pipeline").unet.state_dict()
    average, _ = read_tensors(output / "checkpoint-2" / "ema.safetensors")
    assert all(torch.equal(tensor, average[f"shadow.{name}"]) for name, tensor in saved.items())
    base = UNet2DConditionModel.from_pretrained(tiny_folder / "unet").state_dict()
    assert not any(torch.equal(saved[name], base[name]) for name in saved)


@pytest.fixture(scope="session")
def lora(tiny_folder, tmp_path_factory):
    """Folder of a LoRA that changes the tiny model's pictures."""
    unet = UNet2DConditionModel.from_pretrained(tiny_folder / "unet")
    inject_lora(unet, 2, first_last_layers=True)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return save_lora(unet, tmp_path_factory.mktemp("lora")).parent


def drawn_by_hand(
    model, *, lora=None, method="euler", flow_spacing="uniform", shift=1.0, prediction_type="epsilon", seed=0, **options
):
    """The pictures of the stock pipeline."""
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
def test_sample_draws_what_the_stock_pipeline_does(tiny_folder, lora, tmp_path, option):
    option = {name: str(lora) if name == "lora" else value for name, value in option.items()}
    typed = [word for name, value in option.items() for word in (f"--{name}", str(value))]
    command = ["sample", "--prompts", "ab", "cd", "--model", str(tiny_folder), "--output_dir", str(tmp_path)]
    assert main([*command, *typed]) == 0
    got = [np.asarray(Image.open(tmp_path / f"00{i}.png"), np.int16) for i in range(2)]
    want, plain = (
        [np.asarray(picture, np.int16) for picture in drawn_by_hand(tiny_folder, **options)] for options in (option, {})
    )
    rounding = 1 if "lora" in option else 0
    for ours, theirs, other in zip(got, want, plain, strict=True):
        assert ours.shape == theirs.shape and np.abs(ours - theirs).max() <= rounding
        assert not option or theirs.shape != other.shape or np.abs(theirs - other).max() > rounding


def test_train_then_sample_with_its_lora(pictures, tiny_folder, tmp_path, capsys):
    output = tmp_path / "run"
    assert train(pictures, tiny_folder, output) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(output / "pytorch_lora_weights.safetensors")
    assert sum(line.startswith("d2f: step on ") for line in printed.err.splitlines()) == 1
    assert "d2f: 3 pictures, 2 a step: 2 steps are 1 epochs\n" in printed.err
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["command"] == "d2f train" and metrics["peak_memory_bytes"] > 0
    assert metrics["results"][0]["steps"] == 2
    assert json.loads((output / "config.json").read_text())["rank"] == 2

    drawn = []
    for name, lora in (("plain", []), ("adapted", ["--lora", str(output)]), ("again", ["--lora", str(output)])):
        command = ["sample", "--prompts", "ab", "cd", "--model", str(tiny_folder), "--output_dir", str(tmp_path / name)]
        size = ["--height", "16", "--width", "16", "--num_inference_steps", "2", "--json"]
        assert main([*command, *lora, *size]) == 0
        files = json.loads(capsys.readouterr().out)["files"]
        assert len(files) == 2
        drawn.append([np.asarray(Image.open(file)) for file in files])
    assert np.array_equal(drawn[1], drawn[2]) and drawn[0][0].shape == (16, 16, 3)


def test_sampling_goes_by_what_the_files_say_of_their_training(pictures, tiny_folder, tmp_path, capsys):
    options = ["--objective", "fm", "--flow_shift", "3", "--learning_rate", "0.1"]
    assert train(pictures, tiny_folder, tmp_path / "lora", *options) == 0
    assert train(pictures, tiny_folder, tmp_path / "full", *options, "--adapter", "full") == 0
    saved, base = str(tmp_path / "full" / "pipeline"), str(tiny_folder)
    said, other = (
        ["--prediction_type", "flow_prediction", "--shift", "3"],
        ["--prediction_type", "epsilon", "--shift", "1"],
    )
    for model, lora in ((base, ["--lora", str(tmp_path / "lora")]), (saved, [])):
        drawn = []
        for more in ([], said, other):
            command = ["sample", "--prompts", "ab", "--model", model, *lora, "--height", "16", *more, "--json"]
            assert main([*command, "--output_dir", str(tmp_path / "drawn")]) == 0
            (file,) = json.loads(capsys.readouterr().out.splitlines()[-1])["files"]
            drawn.append(np.asarray(Image.open(file)))
        assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])
        assert drawn[0].shape == (16, 16, 3)


def test_options_come_from_the_file_and_typed_ones_win(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("rank: 7\nlearning_rate: 3.0e-5\ncenter_crop: true\nobjective: fm\ntrain_data_dir: somewhere\n")
    command = parse(["train", "--config", str(config), "--rank=9", "--max-train-steps", "5"])
    assert (command.options.rank, command.options.learning_rate) == (9, 3e-5)
    assert (command.options.objective, command.train_data_dir) == ("fm", "somewhere")
    assert command.options.max_train_steps == 5


def test_yaml_words_that_it_takes_for_truth_values_stay_words(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("mixed_precision: no\ntrain_data_dir: somewhere\n")
    assert parse(["train", "--config", str(config)]).options.mixed_precision == "no"


def test_dry_run_prints_the_resolved_options_and_touches_nothing(tmp_path, capsys):
    output = tmp_path / "none"
    assert main(["train", "--train_data_dir", "x", "--output_dir", str(output), "--dry_run"]) == 0
    assert json.loads(capsys.readouterr().out)["options"]["output_dir"] == str(output)
    assert not output.exists()


def test_the_file_may_hold_switches_and_lists(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("center_crop: false\ncache_latents: false\nrandom_flip: true\ntarget_modules: [to_q, to_k]\n")
    options = parse(["train", "--config", str(config), "--train_data_dir", "x"]).options
    assert (options.center_crop, options.cache_latents, options.random_flip) == (False, False, True)
    assert options.target_modules == ("to_q", "to_k")
    config.write_text("prompts:\n- two words\n- b\n")
    assert parse(["sample", "--config", str(config)]).prompts == ("two words", "b")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("rnak: 3\n", "rnak is no option of d2f train"),
        ("- 3\n", "must hold `option: value` lines"),
        ("rank: [\n", "cannot be read as YAML"),
    ],
)
def test_a_wrong_configuration_file_is_refused(tmp_path, text, sentence, capsys):
    config = tmp_path / "c.yaml"
    config.write_text(text)
    assert main(["train", "--train_data_dir", "x", "--config", str(config)]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    with pytest.raises(RefusedInputError, match="give the path"):
        parse(["train", "--config"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--train_data_dir", "no-such-folder"], "no-such-folder is not a folder"),
        (["--train_data_dir", "x", "--pretrained_model_name_or_path", "./model.ckpt"], "is a pickle"),
        (["--train_data_dir", "x", "--pretrained_model_name_or_path", "./nothing"], "x is not a folder"),
        *(
            (["--train_data_dir", "x", f"--{option}", *values.split()], sentence)
            for option, values, sentence in (
                ("rank", "0", "rank must be at least 1, got 0"),
                ("seed", "-1", "seed must be in [0, 2**63), got -1"),
                ("seed", str(2**63), "seed must be in [0, 2**63), got 9223372036854775808"),
                ("checkpoints_total_limit", "0", "checkpoints_total_limit must be at least 1, got 0"),
                ("caption_dropout", "1.5", "caption_dropout must be in [0, 1), got 1.5"),
                ("adam_beta1", "2", "adam_beta1 must be in [0, 1), got 2.0"),
                ("learning_rate", "nan", "learning_rate must be positive and finite, got nan"),
                ("max_grad_norm", "0", "max_grad_norm must be positive and finite, got 0.0"),
                ("lora_alpha", "0", "lora_alpha must be positive and finite, got 0.0"),
                ("flow_shift", "inf", "flow_shift must be positive and finite, got inf"),
                ("adam_weight_decay", "-1", "adam_weight_decay must be at least 0, got -1.0"),
                ("logit_mean", "nan", "logit_mean must be finite, got nan"),
                ("objective", "fm --loss_weighting native", "objective fm has no loss_weighting but flow, got native"),
                ("lr_scheduler", "foo", "lr_scheduler"),
                ("snr_gamma", "3", "snr_gamma is of loss_weighting min_snr, got flow"),
            )
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, sentence, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [str(pictures) if a == "x" and "ckpt" in arguments[-1] else a for a in arguments]
    try:
        code = main(["train", *arguments])
    except SystemExit as exit_:  # raised by the option parser
        code = exit_.code
    error = capsys.readouterr().err
    assert code == 2 and sentence in error
    assert not (tmp_path / "d2f-output").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--num_inference_steps", "0"], "num_inference_steps must be at least 1, got 0"),
        (["--seed", "-1"], "seed must be in [0, 2**63), got -1"),
        (["--shift", "-1"], "shift must be positive and finite, got -1.0"),
        (["--guidance_scale", "nan"], "guidance_scale must be finite, got nan"),
        (["--height", "17"], "height must be a positive multiple of 8, got 17"),
        (
            ["--flow_spacing", "trailing", "--num_inference_steps", "1500"],
            "steps must be 1 to 1000 with trailing spacing",
        ),
        (["--flow_spacing", "trailing", "--prediction_type", "flow_prediction"], 'spacing must be "uniform"'),
        (["--method", "rk4"], "method"),
        (["--output_dir", "file"], "file cannot be made a folder (File exists): name another"),
    ],
)
def test_sampling_that_cannot_be_is_refused(options, sentence, tiny_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    try:
        code = main(["sample", "--prompts", "ab", "--model", str(tiny_folder), *options])
    except SystemExit as exit_:  # raised by the option parser
        code = exit_.code
    assert code == 2 and sentence in capsys.readouterr().err


def test_a_shift_that_is_none_is_refused_by_its_file(tiny_folder, tmp_path, capsys):
    shutil.copytree(tiny_folder, tmp_path / "model")
    for text in ('{"d2f.shift": "wide"}', "[1]", '{"d2f.shift": null}'):
        (tmp_path / "model" / "d2f.json").write_text(text)
        assert main(["sample", "--prompts", "ab", "--model", str(tmp_path / "model")]) == 2
        error = capsys.readouterr().err
        assert "d2f.json tells no usable shift" in error and error.count("\n") == 1


def test_a_full_finetuning_that_could_not_be_saved_is_not_begun(pictures, tiny_folder, tmp_path, capsys):
    (tmp_path / "run" / "pipeline").mkdir(parents=True)
    command = ["train", "--train_data_dir", str(pictures), "--pretrained_model_name_or_path", str(tiny_folder)]
    assert main([*command, "--adapter", "full", "--output_dir", str(tmp_path / "run")]) == 2
    assert "pipeline exists: move it away" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["pipeline"]


def test_a_lora_of_another_model_is_refused_by_file_and_key(tiny_folder, tmp_path, capsys):
    from safetensors.torch import save_file

    file = tmp_path / "pytorch_lora_weights.safetensors"
    halves = {"A": torch.zeros(2, 9, 3, 3), "B": torch.zeros(8, 2, 1, 1)}
    save_file({f"unet.conv_in.lora_{half}.weight": value for half, value in halves.items()}, file)
    command = ["sample", "--prompts", "ab", "--model", str(tiny_folder), "--lora"]
    assert main([*command, str(file)]) == 2
    assert "unet.conv_in" in (error := capsys.readouterr().err) or "conv_in" in error
    assert "another model" in error
    assert main([*command, str(tmp_path / "weights.bin")]) == 2
    assert "is not safetensors" in capsys.readouterr().err


def test_help_imports_no_torch_and_is_instant():
    code = (
        "import sys; from d2f_fast.commands.main import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass\n"
    )
    code += "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules"
    started = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--train_batch_size" in result.stdout and "pictures per process" in result.stdout
    assert time.monotonic() - started < 30  # a hang, not a speed: `benchmarks/` measures that
