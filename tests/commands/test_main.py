"""The command line as a whole: choice of the command, help, version, exit codes, and a quick start."""

import json
import logging
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import d2f_fast
from d2f_fast.commands.main import COMMANDS, main
from d2f_fast.commands.train import Train
from d2f_fast.errors import RefusedInputError
from d2f_fast.files.lock import locked_folder

HEAVY_LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "typeguard", "yaml")
ARGUMENTS = {
    "demo": [],
    "train": ["--train_data_dir", "images"],
    "sample": ["--prompts", "x"],
    "pairs": ["--train_data_dir", "images"],
    "evaluate": ["--model", "miniature", "--straightness", "--prompts", "x"],
    "convert": ["x"],
    "inspect": [],
}


OF_DEPTH = {"sample": "--image", "evaluate": "--reference"}


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Folder of a captioned image that is not decoded."""
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").touch()
    (folder / "a.txt").write_text("abc")
    return str(folder)


def imported_by(code: str) -> set[str]:
    """Run code in a fresh interpreter, and return the heavy libraries that it imported."""
    code += f"\nprint('imported:', *(name for name in {HEAVY_LIBRARIES} if name in sys.modules))"
    command = [sys.executable, "-c", "import sys\nfrom d2f_fast.commands.main import main\n" + code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("imported:")[2].split())


def test_help_says_what_d2f_is_and_lists_each_command_with_its_purpose(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "d2f finetunes a Stable Diffusion model on your captioned images with a flow-matching loss" in text
    for name in COMMANDS:
        (line,) = [line for line in text.splitlines() if line.startswith(f"  {name} ")]
        assert line.endswith(".")
    assert len([line for line in text.splitlines() if line.startswith("  d2f ")]) == 3
    assert all(word in text for word in ("--config FILE", "--dry_run", "--json", "--version"))
    assert max(map(len, text.splitlines())) <= 100


def test_version_prints_the_version_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"d2f {d2f_fast.__version__}\n"


@pytest.mark.parametrize(("arguments", "got"), [([], "nothing"), (["tarin"], "tarin"), (["--rank", "3"], "--rank")])
def test_unknown_command_is_refused(arguments, got, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"d2f: give a command ({', '.join(COMMANDS)}), got {got}: see d2f --help\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_dry_run_prints_the_resolved_options_and_writes_nothing(name, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    positional = {"convert": "output", "inspect": "path"}.get(name)
    option = () if positional else ("--output_dir",)
    value = data if name == "inspect" else "none"
    assert main([name, *ARGUMENTS[name], *option, value, "--dry_run"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed.get("options", printed)[positional or "output_dir"] == value and printed["dry_run"] is True
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_last_line_is_the_output_path_or_the_whole_result_as_json(capsys, monkeypatch):
    monkeypatch.setattr(Train, "run", lambda command: {"output": "somewhere", "steps": 3})
    assert main(["train", "--train_data_dir", "x"]) == 0
    assert capsys.readouterr().out == "somewhere\n"
    assert main(["train", "--train_data_dir", "x", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"output": "somewhere", "steps": 3}


def test_warning_is_a_line_like_the_others(capsys, monkeypatch):
    def run(command):
        logging.getLogger("d2f_fast.training.resume").warning("the dataset had %d samples", 3)
        return {"output": "somewhere"}

    monkeypatch.setattr(Train, "run", run)
    assert main(["train", "--train_data_dir", "x"]) == 0
    assert capsys.readouterr().err == "d2f: the dataset had 3 samples\n"
    assert logging.getLogger("d2f_fast").handlers == []


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("convert", "inspect")])
def test_empty_output_folder_is_refused(command, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [ARGUMENTS.get(command, [])]
    if command in OF_DEPTH:
        given.append(["--task", "depth", "--model", "miniature", OF_DEPTH[command], data])
    for arguments in given:
        assert main([command, *arguments, "--output_dir", ""]) == 2
        assert capsys.readouterr().err == "d2f: output_dir is empty: give a file or a folder\n"
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


class StoppedError(RuntimeError):
    exit_code = 143


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RefusedInputError("no such thing"), 2, "d2f: no such thing\n"),
        (StoppedError("saved"), 143, "d2f: saved\n"),
        (FileNotFoundError(2, "No such file or directory", "a.png"), 2, "d2f: a.png: No such file or directory\n"),
    ],
    ids=["refused", "stopped", "file"],
)
def test_error_is_one_line_with_its_exit_code(error, code, line, capsys, monkeypatch):
    def fail(command):
        raise error

    monkeypatch.setattr(Train, "run", fail)
    assert main(["train", "--train_data_dir", "x"]) == code
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("error", [ValueError("defect"), RuntimeError("defect"), OSError("defect")], ids=repr)
def test_defect_keeps_its_traceback(error, monkeypatch):
    def fail(command):
        raise error

    monkeypatch.setattr(Train, "run", fail)
    with pytest.raises(type(error), match="defect"):
        main(["train", "--train_data_dir", "x"])


def test_start_and_help_import_no_heavy_library():
    assert imported_by("main(['--help'])\nmain(['--version'])") == set()
    code = "\n".join(f"try: main(['{name}', '--help'])\nexcept SystemExit: pass" for name in COMMANDS)
    assert imported_by(code) <= {"typeguard"}  # tyro loads it for the required list of prompts
    assert imported_by("try: main(['train', '--help'])\nexcept SystemExit: pass") == set()


def test_bad_options_and_paths_are_refused_before_torch_is_imported(data, tiny_folder, tmp_path):
    (tmp_path / "run" / "pipeline").mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "c.yaml").write_text("rank: many\n")
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "pytorch_lora_weights.safetensors").touch()
    model = tmp_path / "no-size"
    shutil.copytree(tiny_folder, model)
    unet = model / "unet" / "config.json"
    unet.write_text(json.dumps(json.loads(unet.read_text()) | {"sample_size": None}))
    flow = shutil.copytree(tiny_folder, tmp_path / "flow")
    scheduler = flow / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": "flow_prediction"}))
    checkpoint = tmp_path / "resumed" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text(json.dumps({"format": 1, "step": 3, "files": {}}))
    for name in ("trainable", "ema", "optimizer"):
        (checkpoint / f"{name}.safetensors").touch()
    state = {"identity": {"learning_rate": 0.5}, "samples": 1, "skipped_steps": 0}
    (checkpoint / "state.json").write_text(json.dumps(state))
    resumed = ("--output_dir", str(tmp_path / "resumed"), "--resume_from_checkpoint", "latest")
    on_flow = ("train", "--train_data_dir", data, "--pretrained_model_name_or_path", str(flow))
    run, file, config = (str(tmp_path / name) for name in ("run", "file", "c.yaml"))
    made = tmp_path / "made"
    made.mkdir()
    (made / "pairs.json").write_text(json.dumps({"num_pairs": 3}))
    locked, done = str(tmp_path / "locked"), str(tmp_path / "done")
    refused = {
        ("train", "--train_data_dir", "no-such-folder"): "no-such-folder is not a folder",
        ("train", "--train_data_dir", run): "has no captioned images",
        ("train", "--train_data_dir", data, "--adapter", "full", "--output_dir", run): "pipeline exists",
        ("train", "--train_data_dir", data, "--rank", "0"): "rank must be at least 1",
        ("train", "--train_data_dir", data, "--resolution", "501"): "resolution must be a multiple of 8, got 501",
        ("train", "--train_data_dir", data, "--pretrained_model_name_or_path", str(model)): "has sample_size None",
        ("train", "--train_data_dir", data, "--pretrained_model_name_or_path", "no/model"): "nor in the hub's cache",
        ("train", "--train_data_dir", data, "--caption_column", "text"): "caption_column text is read from",
        ("train", "--train_data_dir", data, "--init_lora", "no-such-lora"): "no-such-lora: there is no such file",
        ("train", "--train_data_dir", data, "--config", config): "c.yaml: rank must be",
        ("train", "--train_data_dir", data, "--report_to", "dvclive"): "dvclive, which is not installed",
        ("train", "--train_data_dir", data, "--output_dir", done): "of a finished run",
        ("train", "--train_data_dir", data, "--output_dir", done, "--resume_from_checkpoint", "latest"): "finished",
        ("train", "--train_data_dir", data, *resumed, "--max_train_steps", "2"): "is past max_train_steps 2",
        ("train", "--train_data_dir", data, *resumed, "--objective", "fm"): "objective was None and is now 'fm'",
        (*on_flow, "--objective", "diff2flow"): "objective diff2flow needs a base model that predicts noise",
        (*on_flow, "--fm_form", "published"): "fm_form published does not fit this base model",
        ("sample", "--prompts", "a", "--height", "36"): "height must be a positive multiple of 8, got 36",
        ("sample", "--prompts", "a", "--model", str(model)): "has sample_size None",
        ("sample", "--prompts", "a", "--lora", "no-such-lora:0.8"): "no-such-lora: there is no such file",
        ("sample", "--prompts", "a", "--onnx", "no-such-folder"): "no-such-folder is not a folder",
        ("sample", "--prompts", "a", "--output_dir", file): "file cannot be made a folder",
        ("pairs",): "give --prompts_file, --train_data_dir, or both",
        ("pairs", "--prompts_file", "no-such-file"): "no-such-file is not a file",
        ("pairs", "--prompts_file", config, "--caption_column", "text"): "caption_column needs --train_data_dir",
        ("pairs", "--prompts_file", config, "--model", str(model)): "has sample_size None",
        ("pairs", "--train_data_dir", data, "--height", "35"): "height must be a positive multiple of 8, got 35",
        ("pairs", "--train_data_dir", run): "has no captioned images",
        ("pairs", "--train_data_dir", data, "--output_dir", str(made)): "pairs.json: num_pairs was 3 and is now 1",
        (
            "pairs",
            "--prompts_file",
            config,
            "--guidance_scale",
            "1",
            "--negative_prompt",
            "b",
        ): "negative_prompt has no",
        ("evaluate", "--reference", data): "there is nothing to evaluate",
        ("evaluate", "--reference", "no-such-folder", "--images", data): "no-such-folder is not a folder",
        ("evaluate", "--reference", data, "--images", data): "holds 1 images: give at least 14",
        ("evaluate", "--reference", data, "--model", str(model)): "has sample_size None",
        ("convert", "x", "out", "--lora", "no-such-lora"): "no-such-lora: there is no such file",
        ("demo", "--seed", "-1"): "seed must be in",
        ("demo", "--output_dir", file): "file cannot be made a folder",
        ("inspect", "no-such-folder"): "no such file or folder",
    }
    in_use = [
        ["demo", "--output_dir", locked],
        ["sample", "--prompts", "a", "--output_dir", locked],
        ["train", "--train_data_dir", data, "--output_dir", locked],
        ["pairs", "--train_data_dir", data, "--output_dir", locked],
        ["evaluate", "--model", "miniature", "--straightness", "--prompts", "a", "--output_dir", locked],
    ]
    code = f"""
import contextlib, io
def refusal(arguments):
    with contextlib.redirect_stderr(io.StringIO()) as error:
        assert main(arguments) == 2, arguments
    return error.getvalue()
for arguments, sentence in {refused}.items():
    for more in ((), ("--dry_run",)):
        line = refusal([*arguments, *more])
        assert sentence in line and line.count("\\n") == 1, (arguments, more, line)
for arguments in {in_use}:
    assert "in use" in refusal(arguments)
"""
    with locked_folder(locked):
        imported = imported_by(code)
    assert imported <= {"yaml", "numpy", "typeguard"}


@pytest.mark.slow
def test_missing_folder_is_refused_in_ten_times_the_time_of_an_empty_program(tmp_path):
    def seconds(*arguments: str) -> float:
        times = []
        for _ in range(5):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, timeout=600, check=False)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            times.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        return min(times)

    refused = seconds("-m", "d2f_fast", "train", "--train_data_dir", "missing")
    assert refused <= 10 * seconds("-c", "pass")


def test_module_runs_as_the_command_does():
    done = subprocess.run([sys.executable, "-m", "d2f_fast", "--version"], capture_output=True, text=True, timeout=600)
    assert done.stdout == f"d2f {d2f_fast.__version__}\n", done.stderr
