"""Rules of the folder layout that no other test would notice broken."""

import ast
import graphlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

import d2f_fast

ROOT = Path(__file__).resolve().parent.parent
BARE_FOLDERS = ("kernels", "export", "benchmarks", "tests")
CODE_FOLDERS = ("d2f_fast", "kernels", "export")
TIME_LIMIT_S = 900  # for a process that hangs; a loaded machine takes minutes over what an idle one does in seconds

# Imports go one way: a module imports others of its own layer or of those before it. A folder is in one layer whole,
# but for the embedded miniature: its loader is a model's, the rest of it is a demonstration.
LAYERS = (
    {"d2f_fast.errors"},
    {"d2f_fast.config", "d2f_fast.files.*", "d2f_fast.flow.*"},
    {"d2f_fast.kernels.*"},
    {"d2f_fast.ops"},
    {"d2f_fast.layers.*"},
    {"d2f_fast.sampling.*"},
    {"d2f_fast.lora.*"},
    {"d2f_fast.models.*", "d2f_fast.miniature"},
    {"d2f_fast.data.*", "d2f_fast.evaluation.*"},
    {"d2f_fast.training.*"},
    {"d2f_fast.export.*"},
    {"d2f_fast.demo.*", "d2f_fast.miniature.*"},
    {"d2f_fast.commands.*", "d2f_fast.__main__"},
)
# What export/ may import, itself or through what it imports.
ROOMS_OF_EXPORT = (
    *("d2f_fast", "d2f_fast.errors", "d2f_fast.config", "d2f_fast.export.*", "d2f_fast.miniature"),
    *(f"d2f_fast.{room}.*" for room in ("models", "flow", "lora", "files", "sampling")),
)


def _files(folder: str, pattern: str = "*.py") -> list[Path]:
    """Files below a top-level folder, each once: links to other folders are not followed."""
    found = (Path(path, name) for path, _, names in os.walk(ROOT / folder) for name in names)
    return sorted(path for path in found if fnmatch(path.name, pattern) and "__pycache__" not in path.parts)


def _packaged(path: Path) -> Path:
    """Where a wheel holds `path`: kernels/ and export/ go inside the package."""
    relative = path.relative_to(ROOT)
    return relative if relative.parts[0] == "d2f_fast" else "d2f_fast" / relative


def _module_name(path: Path) -> str:
    return ".".join(_packaged(path).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {_module_name(path): path for folder in CODE_FOLDERS for path in _files(folder)}


def _python(code: str, *, cwd: Path = ROOT) -> str:
    """Run code in a fresh interpreter whose sys.path starts with `cwd`, and return what it prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=TIME_LIMIT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _imported_modules(module: str) -> set[str]:
    """Modules of this package that `module` imports, inside functions too, but not for type checkers alone."""
    return {target for name in _imported_names(module) if (target := _defining_module(name)) and target != module}


def _imported_names(module: str) -> Iterator[str]:
    path = SOURCES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_type_checkers = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in for_type_checkers:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _defining_module(name: str) -> str | None:
    """The module of this package that `name`, a module or a name in one, leads to."""
    parent, _, attribute = name.rpartition(".")
    if name in SOURCES:
        return name
    if parent == "d2f_fast":
        return d2f_fast._MODULE_OF.get(attribute, parent)
    return parent if parent in SOURCES else None


def _layer(module: str) -> int:
    """Number of a module's layer; -1 for the packages' own empty modules, which anything may import."""
    if SOURCES[module].name == "__init__.py" and module != "d2f_fast.miniature":
        return -1
    return next(i for i, layer in enumerate(LAYERS) if any(fnmatch(module, pattern) for pattern in layer))


@pytest.mark.parametrize("folder", BARE_FOLDERS)
def test_folder_is_no_regular_package(folder: str) -> None:
    # transformers, diffusers and peft import a PyPI package called `kernels`; ours must not hide it
    assert not _files(folder, "__init__.py")


@pytest.mark.parametrize("folder", ["kernels", "export"])
def test_link_inside_the_package_is_relative_and_resolves(folder: str) -> None:
    link = ROOT / "d2f_fast" / folder
    assert link.is_symlink(), f"{link} is not a link: on Windows, git config core.symlinks true"
    assert os.readlink(link) == f"../{folder}"
    assert link.resolve() == ROOT / folder and link.is_dir()


def test_no_module_is_named_like_a_library() -> None:
    taken = sys.stdlib_module_names | importlib.metadata.packages_distributions().keys()
    ours = {path.stem: path for folder in BARE_FOLDERS for path in _files(folder) if path.name != "conftest.py"}
    assert not {str(path) for name, path in ours.items() if name in taken}


def test_setuptools_packages_are_the_folders_with_code() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {_module_name(path.with_name("__init__.py")) for path in SOURCES.values()}
    assert set(setuptools["packages"]) == folders
    assert setuptools["package-dir"] == {"d2f_fast.kernels": "kernels", "d2f_fast.export": "export"}


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_module_reaches_nothing_of_a_later_layer(module: str) -> None:
    reached, waiting = {module}, [module]
    while waiting:
        new = _imported_modules(waiting.pop()) - reached
        reached |= new
        waiting += new
    assert not {target for target in reached if _layer(target) > _layer(module)}


def test_imports_between_modules_have_no_cycle() -> None:
    tuple(graphlib.TopologicalSorter({module: _imported_modules(module) for module in SOURCES}).static_order())


def test_ops_is_the_one_door_to_the_kernels() -> None:
    through = {m for m in SOURCES if any(t.startswith("d2f_fast.kernels.") for t in _imported_modules(m))}
    assert {m for m in through if not m.startswith("d2f_fast.kernels.")} <= {"d2f_fast.ops"}


def test_export_reaches_only_the_rooms_that_a_graph_needs() -> None:
    # a graph needs plain torch: never ops or layers; and an export neither trains nor runs a command
    waiting = [module for module in SOURCES if module.startswith("d2f_fast.export.")]
    assert "d2f_fast.export.to_onnx" in waiting
    reached = set(waiting)
    while waiting:
        new = _imported_modules(waiting.pop()) - reached
        reached |= new
        waiting += new
    assert not {module for module in reached if not any(fnmatch(module, room) for room in ROOMS_OF_EXPORT)}


def test_nothing_imports_the_export_command() -> None:
    # run as a script it is __main__: importing it too would give two copies
    assert not {module for module in SOURCES if "d2f_fast.export.to_onnx" in _imported_modules(module)}


def test_each_kernel_has_its_tests_and_its_benchmark() -> None:
    # lora_dispatch and lora_kernels are the parts of lora_linear, and tested and measured through it
    kernels = {path.stem for path in _files("kernels")} - {"runtime", "lora_dispatch", "lora_kernels"}
    tested = {path.stem.removeprefix("test_") for path in _files("tests/kernels", "test_*.py")}
    measured = {path.stem.removeprefix("bench_") for path in _files("benchmarks", "bench_*.py")}
    assert tested - {"runtime", "aot_compile"} == kernels
    assert kernels <= measured


def test_importing_the_package_imports_no_heavy_library() -> None:
    imported = _python("import sys, d2f_fast; dir(d2f_fast); d2f_fast.__version__; print(*sys.modules)").split()
    assert "d2f_fast" in imported
    assert not {"torch", "diffusers", "transformers", "peft", "accelerate", "triton", "numpy"} & set(imported)


@pytest.mark.parametrize("name", d2f_fast.__all__)
def test_public_name_is_importable_and_listed(name: str) -> None:
    assert getattr(d2f_fast, name) is not None
    assert name in dir(d2f_fast)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'd2f_fast' has no attribute 'align_all'"):
        d2f_fast.align_all  # noqa: B018


def test_dependencies_import_with_the_checkout_as_working_directory() -> None:
    code = """
import importlib.util, sys
import transformers, diffusers, peft
from transformers import CLIPTextModel
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
spec = importlib.util.find_spec("kernels")
print("absent" if spec is None else "namespace" if spec.origin is None else spec.origin)
"""
    found = _python(code).strip()
    assert found in ("absent", "namespace") or "site-packages" in found


def test_wheel_holds_each_module_once_and_nothing_else(tmp_path: Path) -> None:
    def ignored(folder: str, names: list[str]) -> set[str]:
        return {name for name in names if name == "__pycache__" or name.endswith(".egg-info")}

    for name in ("d2f_fast", "kernels", "export"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "d2f_fast/miniature/__pycache__").mkdir()
    (tmp_path / "d2f_fast/miniature/__pycache__/stale.pyc").touch()
    built = _python("from setuptools import build_meta; print(build_meta.build_wheel('dist'))", cwd=tmp_path)
    names = zipfile.ZipFile(tmp_path / "dist" / built.split()[-1]).namelist()
    data = [path for name in ("d2f_fast", "kernels") for path in _files(name, "*") if path.suffix != ".py"]
    expected = [_packaged(path).as_posix() for path in [*SOURCES.values(), *data]]
    assert sorted(name for name in names if ".dist-info/" not in name) == sorted(expected)


@pytest.mark.parametrize(
    ("arguments", "collected"),
    [
        ([], ["unit"]),
        (["--benchmark"], ["fast_bench", "slow_bench"]),
        (["--benchmark", "-m", "not slow"], ["fast_bench"]),
        (["--benchmark", "benchmarks/bench_slow.py"], ["slow_bench"]),
        (["benchmarks"], []),
    ],
    ids=" ".join,
)
def test_benchmark_option_swaps_tests_for_benchmarks(
    arguments: list[str], collected: list[str], tmp_path: Path
) -> None:
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name, text in {
        "tests/test_unit.py": "def test_unit(): pass",
        "benchmarks/bench_fast.py": "def test_fast_bench(benchmark): benchmark.pedantic(sum, args=([1],))",
        "benchmarks/bench_slow.py": "import pytest\npytestmark = pytest.mark.slow\n"
        "def test_slow_bench(benchmark): benchmark.pedantic(sum, args=([1],))",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--verbose", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=TIME_LIMIT_S)
    passed = [line.split("::test_")[1].split()[0] for line in done.stdout.splitlines() if " PASSED" in line]
    assert passed == collected
    assert ("Median" in done.stdout) == ("--benchmark" in arguments)
