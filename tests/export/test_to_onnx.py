"""Tests of the export command as a user runs it: exit codes, messages, and failures that leave nothing behind."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

import d2f_fast
from d2f_fast.errors import RefusedInputError
from d2f_fast.export import folder as folder_module
from d2f_fast.export import resources
from d2f_fast.export.to_onnx import main

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "export" / "to_onnx.py"


def _run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize(
    "script", [["export/to_onnx.py"], ["-P", "export/to_onnx.py"], ["-m", "d2f_fast.export.to_onnx"]]
)
def test_help_is_printed_from_the_checkout(script: list[str]) -> None:
    done = _run(*script, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: to_onnx.py")


def test_script_runs_the_checkout_from_any_folder(tmp_path: Path) -> None:
    (tmp_path / "d2f_fast.py").write_text("raise SystemExit('not the checkout')")
    done = _run(str(SCRIPT), "--version", cwd=tmp_path)
    assert done.stdout == f"d2f_fast {d2f_fast.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "code"), [(["--help"], 0), (["--model", "./no/model"], 2)], ids=["help", "missing model"]
)
def test_help_and_a_refusal_need_no_heavy_import(arguments: list[str], code: int) -> None:
    done = _run("-X", "importtime", str(SCRIPT), *arguments)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == code and "tyro" in imported
    assert not {"torch", "onnx", "onnxruntime", "numpy", "diffusers"} & imported


def test_script_exports_a_component(one_level_folder, tmp_path, monkeypatch, capsys, request):
    done = _run(
        str(SCRIPT), "--model", str(one_level_folder), "--components", "text_encoder", "--output", "out", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "out" and lines[1].startswith("text_encoder/model.onnx")
    parts = ["computing torch's results of text_encoder", "exporting text_encoder/model.onnx"]
    assert done.stderr.splitlines()[-3:] == [*parts, "comparing text_encoder/model.onnx with torch"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    # Writing to a link, or verifying one, uses the folder that it leads to, and the link stays.
    request.getfixturevalue("text_encoder_of_exported")
    (tmp_path / "link").symlink_to("out")
    monkeypatch.chdir(tmp_path)
    rest = ["--model", str(one_level_folder), "--components", "text_encoder", "--overwrite", "--skip_verify"]
    assert main([*rest, "--output", "link"]) == 0 and capsys.readouterr().out.splitlines()[-1] == "link"
    assert (tmp_path / "link").is_symlink() and not (tmp_path / "out").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]
    assert (tmp_path / "out/text_encoder/model.onnx").is_file()
    again = ["--model", str(one_level_folder), "--output", "link", "--verify_only", "--json"]
    assert main(again) == 0
    report = json.loads(capsys.readouterr().out)
    assert max(row["rms"] for row in report["parity"]) <= 5e-6
    assert 0 < report["seconds"] < 600 and 2**26 < report["peak_memory_bytes"] < 2**36


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--components", "unet,vea"],
            "components must be some of unet, text_encoder, vae_encoder, vae_decoder, sampler, got vea",
        ),
        (["--components", "sampler"], "the sampler uses the weights in unet/: add unet to components"),
        (["--components", "unet", "--unroll", "4"], "unroll changes the sampler only: add sampler to components"),
        (["--components", "unet,sampler", "--with_vae"], "with_vae needs vae_decoder: add vae_decoder to components"),
        (["--unroll", "51"], "unroll must be 0 to 50, got 51: each step is a copy of the network"),
        (["--steps", "1,zero"], "steps must be numbers from 1 to 1000 separated by commas, got '1,zero'"),
        (["--steps", "0"], "steps must be numbers from 1 to 1000 separated by commas, got '0'"),
        (["--steps", "4,1001"], "steps must be numbers from 1 to 1000 separated by commas, got '4,1001'"),
        (["--static", "512"], "static must be BATCHxHEIGHTxWIDTH in pixels, for example 1x512x512, got '512'"),
        (["--static", "1x32x17"], "width 17 is not a multiple of 2: choose one in --static"),
        (["--tolerance", "2"], "tolerance must be above 0 and below 1, got 2.0"),
        (["--verify_only", "--skip_verify"], "verify_only and skip_verify exclude each other: give only one of them"),
        (["--verify_only"], "out is not an export (export.json is missing): name the folder of an export"),
        (
            ["--precision", "bf16"],
            "bf16 graphs do not run on ONNX Runtime's CPU provider: use --precision fp16 or --skip_verify",
        ),
        (
            ["--precision", "bf16", "--skip_verify", "--opset", "20"],
            "bf16 needs opset 23, got 20: ONNX has no bfloat16 convolution before 22; leave opset out",
        ),
        (["--model", "model.ckpt"], "model.ckpt is a pickle, which can run code: convert it to safetensors first"),
        (["--model", "empty"], "empty has no model_index.json: give the folder of a diffusers pipeline"),
        (["--lora", "none.safetensors:0.5"], "LoRA none.safetensors: there is no such file or folder; check the path"),
        (["--lora", "empty"], "LoRA empty: the folder holds no pytorch_lora_weights.safetensors: give the folder of a"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusal_is_one_line_and_leaves_nothing(
    arguments: list[str], sentence: str, one_level_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert main(["--model", str(one_level_folder), "--output", "out", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("to_onnx.py: error: ") and printed.err.count("\n") == 1
    assert sentence in printed.err and printed.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_unknown_option_is_refused(capsys):
    assert main(["--presicion", "fp16"]) == 2
    printed = capsys.readouterr().err
    assert "--presicion" in printed and "--precision" in printed and printed.count("\n") == 1


def _error(capsys):
    """Return the one line of an error; only the model and the parts that began may be named before it."""
    *before, line = capsys.readouterr().err.splitlines()
    assert all(earlier.startswith(("Model: ", "computing ", "exporting ", "comparing ")) for earlier in before)
    return line


def _refused(arguments, folder, capsys):
    """Return the one line of a refused export, after checking that it left `folder` as it was."""
    before = sorted(folder.rglob("*"))
    assert main(arguments) == 2
    assert sorted(folder.rglob("*")) == before
    return _error(capsys)


def test_folder_with_files_is_refused_without_overwrite(one_level_folder, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    arguments = ["--model", str(one_level_folder), "--output", str(tmp_path / "out")]
    assert _refused(arguments, tmp_path, capsys).endswith("is not empty: name another, or give --overwrite")
    line = _refused([*arguments, "--overwrite"], tmp_path, capsys)
    assert line.endswith("is not an export (export.json is missing): name another, or remove it yourself")


def test_output_that_is_a_file_is_refused(one_level_folder, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    line = _refused(["--model", str(one_level_folder), "--output", str(tmp_path / "out")], tmp_path, capsys)
    assert line.endswith("out is a file: name a folder")


def test_lora_of_another_model_is_refused(one_level_folder, tmp_path, capsys):
    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    save_file(
        {f"{name}.lora_down.weight": torch.randn(4, 640), f"{name}.lora_up.weight": torch.randn(640, 4)},
        tmp_path / "xl.safetensors",
    )
    arguments = [
        "--model",
        str(one_level_folder),
        "--output",
        str(tmp_path / "out"),
        "--lora",
        f"{tmp_path}/xl.safetensors",
    ]
    line = _refused(arguments, tmp_path, capsys)
    assert f"0 of 1 layers exist in this model, and {name} is not one of them: it is a LoRA of another model" in line


def test_epsilon_at_zero_terminal_snr_is_refused(one_level_folder, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(one_level_folder, model)
    config = json.loads((model / "scheduler/scheduler_config.json").read_text())
    (model / "scheduler/scheduler_config.json").write_text(json.dumps(config | {"rescale_betas_zero_snr": True}))
    line = _refused(["--model", str(model), "--output", str(tmp_path / "out")], tmp_path, capsys)
    assert "prediction_type 'epsilon' with zero terminal SNR" in line and "use a v-prediction model" in line


@pytest.mark.parametrize("lacking", ["memory", "disk"])
def test_too_little_memory_or_disk_is_refused(lacking, one_level_folder, tmp_path, monkeypatch, capsys):
    if lacking == "memory":
        monkeypatch.setattr(resources, "available_memory_bytes", lambda: 10**8)
    else:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    line = _refused(["--model", str(one_level_folder), "--output", str(tmp_path / "out")], tmp_path, capsys)
    assert "GB of free memory and 0.0 GB of disk, have " in line
    assert line.endswith("make room, or export fewer components at a time")


def test_operator_without_onnx_form_is_named_with_its_module(one_level_folder, tmp_path, monkeypatch, capsys):
    with torch.library._scoped_library("d2f_test", "FRAGMENT") as library:
        library.define("secret(Tensor x) -> Tensor")
        library.impl("secret", lambda x: x * 2, "CompositeExplicitAutograd")

        class Secret(torch.nn.Module):
            def forward(self, x):
                return torch.ops.d2f_test.secret(x)

        components = folder_module.vae_components

        def patched(vae):
            vae.encoder.down_blocks = torch.nn.ModuleList()  # The fewer operators, the sooner it is refused.
            vae.encoder.conv_act = Secret()
            return components(vae)

        monkeypatch.setattr(folder_module, "vae_components", patched)
        arguments = ["--model", str(one_level_folder), "--components", "vae_encoder", "--output", str(tmp_path / "out")]
        line = _refused(arguments, tmp_path, capsys)
    assert "operator d2f_test::secret has no ONNX form (module vae.encoder.conv_act)" in line


@pytest.mark.usefixtures("text_encoder_of_exported")
def test_wrong_graph_is_exit_code_1_and_leaves_nothing(one_level_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(folder_module.verify, "relative_errors", lambda *_: (0.5, 0.5))
    arguments = ["--model", str(one_level_folder), "--components", "text_encoder", "--output", str(tmp_path / "out")]
    assert main(arguments) == 1
    line = _error(capsys)
    assert "text_encoder/model.onnx differs from torch by 5.0e-01" in line
    assert list(tmp_path.iterdir()) == []


def _run_until_it_writes(model: Path, output: Path) -> subprocess.Popen[bytes]:
    """Start an export in a process, and return it in the middle of its work."""
    command = [sys.executable, str(SCRIPT), "--model", str(model), "--output", str(output), "--skip_verify"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while not list(output.parent.glob(".tmp-*/*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() is None and list(output.parent.glob(".tmp-*/*"))
    return process


def test_terminated_run_removes_its_unfinished_folder(one_level_folder, tmp_path):
    process = _run_until_it_writes(one_level_folder, tmp_path / "out")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=600) == 143
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_killed_run_leaves_no_output_and_the_next_run_removes_its_leftovers(one_level_folder, tmp_path, monkeypatch):
    process = _run_until_it_writes(one_level_folder, tmp_path / "out")
    process.kill()
    assert process.wait(timeout=600) == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock-out", f".tmp-{process.pid}-out"]
    # The next run to the same folder removes the leftovers even if it is refused.
    refusal = mock.Mock(side_effect=RefusedInputError("too little memory"))
    monkeypatch.setattr(folder_module, "check_memory_to_load", refusal)
    assert main(["--model", str(one_level_folder), "--output", str(tmp_path / "out")]) == 2
    assert refusal.called and list(tmp_path.iterdir()) == []
