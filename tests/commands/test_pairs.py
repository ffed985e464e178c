"""`d2f pairs` as a user types it: what it writes, how it goes on, and what it refuses."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

from d2f_fast.commands.main import main
from d2f_fast.data.pairs import PairDataset
from d2f_fast.files.atomic import make_folder
from d2f_fast.models.base_model import BaseModel
from d2f_fast.sampling.integrate import sample_flow, unet_velocity


@pytest.fixture
def make_pairs(tiny_folder: Path, images: Path, tmp_path: Path) -> Callable[..., int]:
    """Return a function that makes pairs of the tiny model in a folder, and returns the exit code."""
    (tmp_path / "prompts.txt").write_text("\ufeffab\n\n  c \n")

    def run(output: Path, *more: str) -> int:
        data = ["--prompts_file", str(tmp_path / "prompts.txt"), "--train_data_dir", str(images)]
        options = ["--height", "16", "--width", "16", "--num_inference_steps", "2", "--solver", "euler"]
        return main(["pairs", *data, "--model", str(tiny_folder), "--output_dir", str(output), *options, *more])

    return run


def test_pairs_are_made_of_file_and_captions_and_completed_by_the_same_command(
    make_pairs: Callable[..., int],
    tiny_folder: Path,
    images: Path,
    adapted: tuple[Any, dict[str, Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "pairs"
    options = ("--num_pairs", "7", "--pairs_per_shard", "4", "--guidance_scale", "2", "--dtype", "float32", "--json")
    assert make_pairs(output, *options) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["pairs"] == result["pairs_made"] == 7 and result["evaluations"] == 7 * 2 * 2
    assert "7 pairs of 5 prompts in 2 shards; 0.1 MiB of disk needed" in captured.err
    assert sorted(path.name for path in output.iterdir()) == ["000000.tar", "000001.tar", "grid.png", "pairs.json"]
    dataset = PairDataset([output])
    assert [dataset.prompt(i) for i in range(7)] == ["ab", "c", "abc", "abc", "abc", "ab", "c"]
    model = BaseModel.load(tiny_folder)
    meta = dataset.shards[0].meta
    assert meta["model"] == model.fingerprints()["unet"] and meta["guidance_scale"] == 2.0 and meta["lora"] == []
    pair = dataset[6]
    with torch.no_grad():
        condition, empty = (model.encode_prompts([text])["encoder_hidden_states"] for text in ("c", ""))
        velocity = unet_velocity(model.unet, model.flow, condition, empty, 2.0)
        expected = sample_flow(velocity, torch.from_numpy(pair.noise.copy())[None], 2)
    assert isinstance(expected, torch.Tensor) and np.abs(expected[0].numpy() - pair.latents).max() < 1e-4
    before = (output / "000000.tar").stat()
    (output / "000001.tar").unlink()
    assert make_pairs(output, *options) == 0
    assert json.loads(capsys.readouterr().out)["pairs_made"] == 3
    after = (output / "000000.tar").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    # Each other option is refused before the model is loaded, and so by --dry_run; the same ones are not.
    assert make_pairs(output, *options, "--dry_run") == 0
    changes = {
        "--num_pairs 8": "num_pairs was 7 and is now 8",
        "--pairs_per_shard 5": "pairs_per_shard was 4 and is now 5",
        "--caption_extension .text": "prompts_sha256 was ",
        "--seed 1": "seed was 0 and is now 1",
        "--num_inference_steps 3": "num_inference_steps was 2 and is now 3",
        "--solver heun": 'solver was "euler" and is now "heun"',
        "--flow_spacing trailing": 'flow_spacing was "uniform" and is now "trailing"',
        "--shift 2": "shift was 1.0 and is now 2.0",
        "--prediction_type flow_prediction": 'prediction_type was "epsilon" and is now "flow_prediction"',
        "--guidance_scale 3": "guidance_scale was 2.0 and is now 3.0",
        "--guidance_scale_max 3": "guidance_scale_max was 2.0 and is now 3.0",
        "--negative_prompt x": 'negative_prompt was "" and is now "x"',
        "--height 24": "height was 16 and is now 24",
        "--width 24": "width was 16 and is now 24",
        "--dtype float16": 'dtype was "float32" and is now "float16"',
        "--mixed_precision bf16": 'mixed_precision was "no" and is now "bf16"',
        "--batch_size 3": "batch_size was 8 and is now 3",
        "--save_images": "save_images was false and is now true",
        f"--lora {adapted[1]['peft']}:0.5": "lora was [] and is now [",
    }
    for path in images.glob("*.txt"):
        path.with_suffix(".text").write_text("x")
    capsys.readouterr()
    for given, sentence in changes.items():
        assert make_pairs(output, *options, *given.split(), "--dry_run") == 2, given
        assert f"pairs.json: {sentence}" in capsys.readouterr().err


def test_pairs_of_a_changed_model_are_not_mixed(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, output = shutil.copytree(tiny_folder, tmp_path / "model"), tmp_path / "pairs"
    (tmp_path / "prompts.txt").write_text("ab\nc\na\n")
    command = ["pairs", "--prompts_file", str(tmp_path / "prompts.txt"), "--model", str(model), "--num_pairs", "2"]
    command += ["--height", "16", "--width", "16", "--num_inference_steps", "1", "--output_dir", str(output)]
    assert main(command) == 0
    assert "d2f: 2 pairs of the first 2 of 3 prompts in 1 shard; " in capsys.readouterr().err
    scheduler, weights = model / "scheduler" / "scheduler_config.json", model / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    next(tensor for name, tensor in tensors.items() if name.endswith("final_layer_norm.bias")).add_(0.5)
    for path, content, sentence in (
        (scheduler, json.dumps(json.loads(scheduler.read_text()) | {"beta_end": 0.02}).encode(), "beta_end was 0.012"),
        (weights, save(tensors), 'text_encoders was "'),
    ):
        before = path.read_bytes()
        path.write_bytes(content)
        assert main(command) == 2
        assert f"pairs.json: {sentence}" in capsys.readouterr().err
        path.write_bytes(before)
    assert main(command) == 0
    # Before a shard is finished, other options are no contradiction: this is how a full disk is escaped.
    (output / "000000.tar").unlink()
    assert main([*command, "--dtype", "float32", "--num_pairs", "1"]) == 0
    assert len(PairDataset([output])) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give --prompts_file, --train_data_dir, or both: pairs need prompts"),
        (["--prompts_file", "no.txt"], "prompts_file: no.txt is not a file: give a text file"),
        (["--train_data_dir", "none"], "train_data_dir: none is not a folder"),
        (["--prompts_file", "a.txt", "--guidance_scale", "0.5"], "guidance_scale must be 1 or 0"),
        (
            ["--prompts_file", "a.txt", "--guidance_scale_max", "2"],
            "guidance_scale_max must be above guidance_scale, and that at least 1, got 2 and 3",
        ),
        (
            ["--prompts_file", "a.txt", "--guidance_scale", "1", "--negative_prompt", "x"],
            "negative_prompt has no effect",
        ),
        (["--prompts_file", "a.txt", "--guidance_scale", "0", "--guidance_scale_max", "2"], "and that at least 1, got"),
        (["--prompts_file", "a.txt", "--model", "./m.ckpt"], "is a pickle"),
        (["--prompts_file", "a.txt", "--lora", "no"], "LoRA no: there is no such file or folder"),
        (["--prompts_file", "a.txt", "--num_pairs", "0"], "num_pairs must be at least 1, got 0"),
        (["--prompts_file", "a.txt", "--output_dir", "a.txt"], "a.txt cannot be made a folder"),
        (["--prompts_file", "a.txt", "--solver", "rk4"], "solver"),
        (["--train_data_dir", "bare"], "sub-folder named 10_name repeats its images 10 times; or give the prompts as"),
        (["--prompts_file", "empty.txt"], "empty.txt holds no prompts: write one on each line"),
        (["--prompts_file", "latin.txt"], "latin.txt, line 2 is not UTF-8 text: save the file as UTF-8"),
        (["--prompts_file", "a.txt", "--height", "17"], "height must be a positive multiple of 8, got 17"),
        (
            ["--prompts_file", "a.txt", "--flow_spacing", "trailing", "--num_inference_steps", "1500"],
            "steps must be 1 to 1000 with trailing spacing",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_with_exit_code_2(
    arguments: list[str],
    sentence: str,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("ab")
    Path("empty.txt").write_text("\n \n")
    Path("bare").mkdir()
    Path("bare", "a.png").touch()
    Path("latin.txt").write_bytes(b"a\n\xe9\n")
    model = [] if "--model" in arguments else ["--model", str(tiny_folder)]
    try:
        code = main(["pairs", *model, *arguments])
    except SystemExit as exit_:  # raised by the option parser
        code = exit_.code if isinstance(exit_.code, int) else 1
    error = capsys.readouterr().err
    assert code == 2 and sentence in error
    assert not Path("d2f-pairs").exists()


def test_folder_in_use_is_refused(
    make_pairs: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(tmp_path / "pairs")
    code = "import sys; from d2f_fast.files.lock import locked_folder as f\n"
    code += "with f(sys.argv[1]): print(flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    other.stdout.readline()
    try:
        assert make_pairs(folder) == 2
    finally:
        other.communicate("\n")
    assert f"is in use by process {other.pid}" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
        ["torch.distributed.run", "--nproc_per_node", "2"],
    ],
    ids=["accelerate", "torchrun"],
)
def test_folder_of_two_launched_processes_is_that_of_one(
    launcher: list[str], tiny_folder: Path, tmp_path: Path
) -> None:
    """Launched as by a user, on a CPU; the second process makes every second shard."""
    (tmp_path / "prompts.txt").write_text("ab\nc\nde fg\n")
    options = ["pairs", "--model", str(tiny_folder), "--prompts_file", str(tmp_path / "prompts.txt"), "--seed", "3"]
    options += ["--num_pairs", "17", "--pairs_per_shard", "4", "--batch_size", "3", "--num_inference_steps", "2"]
    options += ["--height", "16", "--width", "16", "--guidance_scale", "2", "--guidance_scale_max", "6"]
    assert main([*options, "--output_dir", str(tmp_path / "one")]) == 0
    command = [sys.executable, "-m", *launcher, "-m", "d2f_fast", *options, "--output_dir", str(tmp_path / "two")]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one.keys() == two.keys() and len([name for name in two if name.endswith(".tar")]) == 5
    assert [name for name in one if one[name] != two[name]] == []
