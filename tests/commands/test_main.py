"""The command line as a whole: choice of the command, help, version, exit codes, and a quick start."""

import json
import subprocess
import sys

import pytest

import d2f_fast
from d2f_fast.commands.main import COMMANDS, main
from d2f_fast.commands.train import Train
from d2f_fast.errors import RefusedInputError
from d2f_fast.files.lock import locked_folder

HEAVY_LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "typeguard", "yaml")
ARGUMENTS = {
    "demo": [],
    "train": ["--train_data_dir", "x"],
    "sample": ["--prompts", "x"],
    "pairs": ["--prompts_file", "x"],
    "convert": ["x"],
    "inspect": [],
}


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
    assert len([line for line in text.splitlines() if line.startswith("  d2f ")]) == 2
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
def test_dry_run_prints_the_resolved_options_and_writes_nothing(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    positional = {"convert": "output", "inspect": "path"}.get(name)
    option = () if positional else ("--output_dir",)
    assert main([name, *ARGUMENTS[name], *option, "none", "--dry_run"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed.get("options", printed)[positional or "output_dir"] == "none" and printed["dry_run"] is True
    assert not list(tmp_path.iterdir())


def test_last_line_is_the_output_path_or_the_whole_result_as_json(capsys, monkeypatch):
    monkeypatch.setattr(Train, "run", lambda command: {"output": "somewhere", "steps": 3})
    assert main(["train", "--train_data_dir", "x"]) == 0
    assert capsys.readouterr().out == "somewhere\n"
    assert main(["train", "--train_data_dir", "x", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"output": "somewhere", "steps": 3}


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


def test_bad_options_and_paths_are_refused_before_torch_is_imported(tmp_path):
    (tmp_path / "run" / "pipeline").mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "c.yaml").write_text("rank: many\n")
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "pytorch_lora_weights.safetensors").touch()
    data, run, file, config = (str(tmp_path / name) for name in (".", "run", "file", "c.yaml"))
    locked, done = str(tmp_path / "locked"), str(tmp_path / "done")
    refused = [
        ["train", "--train_data_dir", "no-such-folder"],
        ["pairs"],
        ["pairs", "--prompts_file", "no-such-file"],
        ["train", "--train_data_dir", data, "--adapter", "full", "--output_dir", run],
        ["train", "--train_data_dir", data, "--rank", "0"],
        ["train", "--train_data_dir", data, "--init_lora", "no-such-lora"],
        ["train", "--train_data_dir", data, "--config", config],
        ["sample", "--prompts", "a", "--height", "1"],
        ["sample", "--prompts", "a", "--lora", "no-such-lora:0.8"],
        ["sample", "--prompts", "a", "--onnx", "no-such-folder"],
        ["sample", "--prompts", "a", "--output_dir", file],
        ["demo", "--seed", "-1"],
        ["demo", "--output_dir", file],
        ["demo", "--output_dir", locked],
        ["sample", "--prompts", "a", "--output_dir", locked],
        ["train", "--train_data_dir", data, "--output_dir", locked],
        ["pairs", "--train_data_dir", data, "--output_dir", locked],
        ["train", "--train_data_dir", data, "--output_dir", done],
        ["train", "--train_data_dir", data, "--output_dir", done, "--resume_from_checkpoint", "latest"],
    ]
    code = "\n".join(f"assert main({arguments}) == 2, {arguments}" for arguments in refused)
    with locked_folder(locked):
        imported = imported_by(code)
    assert "torch" not in imported and "diffusers" not in imported


def test_module_runs_as_the_command_does():
    done = subprocess.run([sys.executable, "-m", "d2f_fast", "--version"], capture_output=True, text=True, timeout=600)
    assert done.stdout == f"d2f {d2f_fast.__version__}\n", done.stderr
