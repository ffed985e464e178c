"""The command line as a user types it: options, refusals, exit codes, and what is left on the disk."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2f_fast.cli import main, parse
from d2f_fast.errors import RefusedInputError


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


def test_train_then_sample_with_its_lora(pictures, tiny_folder, tmp_path, capsys):
    output = tmp_path / "run"
    assert train(pictures, tiny_folder, output) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(output / "pytorch_lora_weights.safetensors")
    assert sum(line.startswith("d2f: step on ") for line in printed.err.splitlines()) == 1
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


def test_options_come_from_the_file_and_typed_ones_win(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("rank: 7\nlearning_rate: 3.0e-5\ncenter_crop: true\nobjective: fm\ntrain_data_dir: somewhere\n")
    command = parse(["train", "--config", str(config), "--rank=9", "--max-train-steps", "5"])
    assert (command.options.rank, command.options.learning_rate) == (9, 3e-5)
    assert (command.options.objective, command.train_data_dir) == ("fm", "somewhere")
    assert command.options.max_train_steps == 5


def test_dry_run_prints_the_resolved_options_and_touches_nothing(tmp_path, capsys):
    output = tmp_path / "none"
    assert main(["train", "--train_data_dir", "x", "--output_dir", str(output), "--dry_run"]) == 0
    assert json.loads(capsys.readouterr().out)["options"]["output_dir"] == str(output)
    assert not output.exists()


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
        (["--train_data_dir", "x", "--rank", "0", "--pretrained_model_name_or_path", "./nothing"], "x is not a folder"),
        (["--train_data_dir", "x", "--caption_dropout", "1.5"], "caption_dropout must be in [0, 1)"),
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


def test_a_lora_of_another_model_is_refused_by_file_and_key(tiny_folder, tmp_path, capsys):
    import torch
    from safetensors.torch import save_file

    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({"unet.conv_in.lora_A.weight": torch.zeros(2, 9, 3, 3)}, file)
    command = ["sample", "--prompts", "ab", "--model", str(tiny_folder), "--lora"]
    assert main([*command, str(file)]) == 2
    assert "unet.conv_in" in (error := capsys.readouterr().err) or "conv_in" in error
    assert "another model" in error
    assert main([*command, str(tmp_path / "weights.bin")]) == 2
    assert "is not safetensors" in capsys.readouterr().err


def test_help_imports_no_torch_and_is_instant():
    code = "import sys; from d2f_fast.cli import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules"
    started = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--train_batch_size" in result.stdout and "pictures per process" in result.stdout
    assert time.monotonic() - started < 30  # a hang, not a speed: `benchmarks/` measures that
