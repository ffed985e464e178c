"""The export command, run as a user runs it."""

import subprocess
import sys
from pathlib import Path

import pytest

import d2f_fast

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


def test_the_checkout_is_what_runs_from_any_folder(tmp_path: Path) -> None:
    (tmp_path / "d2f_fast.py").write_text("raise SystemExit('not the checkout')")
    done = _run(str(SCRIPT), "--version", cwd=tmp_path)
    assert done.stdout == f"d2f_fast {d2f_fast.__version__}\n"


def test_export_is_refused_in_one_line() -> None:
    done = _run(str(SCRIPT), "--model", "folder", "--output", "graphs")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "to_onnx.py: error: ONNX export is not built yet\n")


def test_help_needs_no_heavy_import() -> None:
    done = _run("-X", "importtime", str(SCRIPT), "--help")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not {"torch", "onnx", "onnxruntime", "numpy", "diffusers"} & imported
