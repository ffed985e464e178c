"""A type checker sees this package's types after the installation that the README names."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OTHERS = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "numpy",
    "PIL",
    "onnx",
    "onnx_ir",
    "accelerate",
    "tyro",
    "triton",
)
SCRIPT = """\
from d2f_fast import AlignedTrainer, Alignment, TrainingConfig, align, load_miniature
from d2f_fast.export.options import ExportOptions
from d2f_fast.kernels.runtime import triton_available

config = TrainingConfig(rank=4)
trainer = AlignedTrainer.from_pretrained("miniature", config)
reveal_type(trainer.global_step)
reveal_type(align)
reveal_type(ExportOptions.check)
reveal_type(triton_available)
name: str = config.train_batch_size
TrainingConfig(ranks=4)
"""


def test_instructions_install_in_the_mode_that_type_checkers_follow() -> None:
    for file in ("README.md", "environment.sh", "docs/deploy.md"):
        lines = re.findall(r"^.*pip install.* -e \S+.*$", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
        assert lines and all("--config-settings editable_mode=compat" in line for line in lines)


@pytest.mark.slow
def test_mypy_checks_a_users_script_against_this_packages_types(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    ignored = shutil.ignore_patterns(".git", ".venv", "*.egg-info", "__pycache__", ".*_cache", "benchmarks", "tests")
    shutil.copytree(ROOT, checkout, symlinks=True, ignore=ignored)
    build = "from setuptools import build_meta; build_meta.build_editable('dist', {'editable_mode': 'compat'})"
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    subprocess.run([sys.executable, "-c", build], cwd=checkout, env=environment, check=True, capture_output=True)
    # A virtual environment with this package as pip would install it, and the other packages of this one.
    venv.create(tmp_path / "venv", with_pip=False)
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    with zipfile.ZipFile(next((checkout / "dist").glob("*.whl"))) as wheel:
        wheel.extractall(packages)
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    (tmp_path / "script.py").write_text(SCRIPT)
    # The types of other packages are left out, because those of torch alone take minutes.
    others = "\n".join(f"[mypy-{name}.*]\nfollow_imports = skip\n" for name in OTHERS)
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nignore_missing_imports = True\n{others}")
    command = [sys.executable, "-m", "mypy", "--python-executable", str(tmp_path / "venv/bin/python"), "script.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    found = [(line.partition(": ")[2] or line).replace("builtins.", "") for line in done.stdout.splitlines()]
    assert found == [
        'note: Revealed type is "int"',
        'note: Revealed type is "def (latents: Any, noise: Any, t: Any, flow: d2f_fast.flow.flow.Flow) -> '
        'tuple[Any, Any]"',
        'note: Revealed type is "def (self: d2f_fast.export.options.ExportOptions)"',
        'note: Revealed type is "functools._lru_cache_wrapper[bool]"',
        'error: Incompatible types in assignment (expression has type "int", variable has type "str")  [assignment]',
        'error: Unexpected keyword argument "ranks" for "TrainingConfig"; did you mean "rank"?  [call-arg]',
        "Found 2 errors in 1 file (checked 1 source file)",
    ]
