"""Rules of the folder layout and of the files around the code."""

import ast
import functools
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
import yaml

import d2f_fast

ROOT = Path(__file__).resolve().parent.parent
BARE_FOLDERS = ("kernels", "export", "benchmarks", "tests")
CODE_FOLDERS = ("d2f_fast", "kernels", "export")
MAX_FILE_LINES, MAX_CLASS_LINES = 400, 300
TIME_LIMIT_S = 900  # stops a process that hangs; a loaded machine takes minutes where an idle one takes seconds

# Imports go one way: a module imports from its own layer or from those above it in this list. A folder lies in one
# layer, except the embedded miniature: its loader belongs to the models, and the rest of it to the demonstration.
LAYERS = (
    {"d2f_fast.errors", "d2f_fast.image_sizes", "d2f_fast.stopping", "d2f_fast.unknown_options"},
    {"d2f_fast.config", "d2f_fast.option_help", "d2f_fast.option_pairs", "d2f_fast.files.*", "d2f_fast.flow.*"},
    {"d2f_fast.kernels.*"},
    {"d2f_fast.ops"},
    {"d2f_fast.layers.*"},
    {"d2f_fast.sampling.*"},
    {"d2f_fast.lora.*"},
    {"d2f_fast.models.*", "d2f_fast.miniature"},
    {"d2f_fast.data.*", "d2f_fast.evaluation.*"},
    {"d2f_fast.training.*"},
    {"d2f_fast.tasks.*"},
    {"d2f_fast.export.*"},
    {"d2f_fast.demo.*", "d2f_fast.miniature.*"},
    {"d2f_fast.commands.*", "d2f_fast.__main__"},
)
# What export/ may import, itself or through what it imports.
ROOMS_OF_EXPORT = (
    *("d2f_fast", "d2f_fast.errors", "d2f_fast.stopping", "d2f_fast.config", "d2f_fast.option_pairs"),
    *("d2f_fast.image_sizes", "d2f_fast.option_help", "d2f_fast.unknown_options"),
    *("d2f_fast.export.*", "d2f_fast.miniature"),
    *(f"d2f_fast.{room}.*" for room in ("models", "flow", "lora", "files", "sampling")),
)


# Each module of the package has a test file in the same place of tests/, except these.
TESTED_ELSEWHERE = {
    "d2f_fast.__main__": "tests/commands/test_main.py runs it, and tests/test_stopping.py stops it while it starts.",
    "d2f_fast.commands.evaluation_run": "tests/commands/test_evaluate.py runs it, by the command.",
    "d2f_fast.demo.report": "tests/demo/test_run.py reads the report of a whole demonstration.",
    "d2f_fast.errors": "It holds the types of errors; the tests of the code that raises them check type and exit code.",
    "d2f_fast.flow.flow": "It is the base class of Alignment and NaiveFlow, and is tested through both.",
    "d2f_fast.flow.formulas": "tests/flow/test_alignment.py compares every formula with a float64 oracle.",
    "d2f_fast.miniature.build": "It is the command that trained the committed weights, which takes hours.",
    "d2f_fast.miniature.build_classifier": "It trained the committed weights, which takes hours.",
    "d2f_fast.miniature.build_sheets": "It packed the committed pictures from files that are not in the repository.",
    "d2f_fast.miniature.build_vae": "It trained the committed weights, which takes hours.",
    "d2f_fast.models.library_messages": "It calls two functions of diffusers and transformers.",
}

# Each test file is called test_X.py, or test_X_more.py, in the place of the module X that it tests, except these.
TESTS_OF_NO_MODULE = {
    "tests/test_user_types.py": "It checks a user's script against the types of the whole package.",
    "tests/export/test_deploy.py": "It runs the examples of docs/deploy.md.",
    "tests/export/test_large.py": "It exports a model of Stable Diffusion 1.5's size.",
    "tests/export/test_lora.py": "It exports a model with a LoRA file.",
    "tests/export/test_optimum.py": "It loads an export in optimum-onnx.",
    "tests/kernels/test_objective.py": "It tests the kernels align and velocity_loss together.",
    "tests/layers/test_lora_on_a_gpu.py": "It holds the checks of the LoRA layers that only a GPU can run.",
    "tests/lora/test_other_versions.py": "It loads LoRA files in environments with other versions of diffusers.",
    "tests/sampling/test_comfyui.py": "It checks the graphs in docs/comfyui/, and restates ComfyUI's sampler.",
    "tests/tasks/test_killed_pairs.py": "It kills whole runs of `d2f pairs`.",
    "tests/test_benchmarks.py": "It tests benchmarks/.",
    "tests/test_docs.py": "It runs the examples of docs/.",
    "tests/test_environment.py": "It tests environment.sh and the Makefile.",
    "tests/test_layout.py": "It tests the folders and the files around the code.",
    "tests/training/test_full_size.py": "It trains models of Stable Diffusion's full size, saves and reloads them.",
    "tests/test_paper.py": "It compares the package with the published method from one end to the other.",
    "tests/test_readme.py": "It runs the examples of README.md.",
    "tests/training/test_killed_runs.py": "It stops, kills and divides whole runs.",
    "tests/training/test_random_signals.py": "It stops whole runs at random moments.",
}


def _files(folder: str, pattern: str = "*.py") -> list[Path]:
    """Return the files below a top-level folder, each once: links to other folders are not followed."""
    found = (Path(path, name) for path, _, names in os.walk(ROOT / folder) for name in names)
    return sorted(path for path in found if fnmatch(path.name, pattern) and "__pycache__" not in path.parts)


def _packaged(path: Path) -> Path:
    """Return the path that a wheel gives the file `path`: kernels/ and export/ go inside the package."""
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


@functools.cache
def _imported_modules(module: str) -> set[str]:
    """Return the modules of this package that `module` imports, in functions too, but not only for type checkers."""
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
    """Return the module of this package that `name` is or is defined in; None for a name of another package."""
    parent, _, attribute = name.rpartition(".")
    if name in SOURCES:
        return name
    if parent == "d2f_fast":
        return d2f_fast._MODULE_OF.get(attribute, parent)
    return parent if parent in SOURCES else None


def _layer(module: str) -> int:
    """Return the number of a module's layer; -1 for an empty __init__.py, which every module may import."""
    if SOURCES[module].name == "__init__.py" and module != "d2f_fast.miniature":
        return -1
    return next(i for i, layer in enumerate(LAYERS) if any(fnmatch(module, pattern) for pattern in layer))


@pytest.mark.parametrize("folder", BARE_FOLDERS)
def test_folder_has_no_init_file(folder: str) -> None:
    # transformers, diffusers and peft import a PyPI package called `kernels`; ours must not hide it
    assert not _files(folder, "__init__.py")


@pytest.mark.parametrize("folder", ["kernels", "export"])
def test_link_inside_the_package_is_relative_and_resolves(folder: str) -> None:
    link = ROOT / "d2f_fast" / folder
    assert link.is_symlink(), f"{link} is not a link: on Windows, git config core.symlinks true"
    assert os.readlink(link) == f"../{folder}"
    assert link.resolve() == ROOT / folder and link.is_dir()


def test_no_module_has_the_name_of_a_library() -> None:
    taken = sys.stdlib_module_names | importlib.metadata.packages_distributions().keys()
    ours = {path.stem: path for folder in BARE_FOLDERS for path in _files(folder) if path.name != "conftest.py"}
    assert not {str(path) for name, path in ours.items() if name in taken}


def test_setuptools_packages_are_the_folders_with_code() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {_module_name(path.with_name("__init__.py")) for path in SOURCES.values()}
    assert set(setuptools["packages"]) == folders
    assert setuptools["package-dir"] == {"d2f_fast.kernels": "kernels", "d2f_fast.export": "export"}


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_module_imports_nothing_from_a_later_layer(module: str) -> None:
    reached, waiting = {module}, [module]
    while waiting:
        new = _imported_modules(waiting.pop()) - reached
        reached |= new
        waiting += new
    assert not {target for target in reached if _layer(target) > _layer(module)}


def test_imports_between_modules_have_no_cycle() -> None:
    tuple(graphlib.TopologicalSorter({module: _imported_modules(module) for module in SOURCES}).static_order())


def test_only_ops_imports_the_kernels() -> None:
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
    # run as a script it is the module __main__, so that an import would load a second copy
    assert not {module for module in SOURCES if "d2f_fast.export.to_onnx" in _imported_modules(module)}


def test_each_kernel_has_its_tests_and_its_benchmark() -> None:
    modules = {path.stem for path in _files("kernels")}
    tested = {path.stem.removeprefix("test_") for path in _files("tests/kernels", "test_*.py")}
    measured = {path.stem.removeprefix("bench_") for path in _files("benchmarks", "bench_*.py")}
    assert tested == modules | {"objective"}  # the two alignment kernels together
    # lora_dispatch and lora_kernels are the parts of lora_linear, and measured through it.
    assert modules - {"runtime", "lora_dispatch", "lora_kernels"} <= measured


def _test_file(module: str) -> str:
    """Return the path of the test file that mirrors `module`."""
    folders = _packaged(SOURCES[module]).parts[1:-1]
    stem = SOURCES[module].stem
    if stem == "__init__":
        stem = folders[-1] if folders else "init"
    return Path("tests", *folders, f"test_{stem}.py").as_posix()


def _has_behaviour(path: Path) -> bool:
    """Return whether a module defines functions or classes, which an __init__.py, as a rule, does not."""
    return any(
        isinstance(node, ast.FunctionDef | ast.ClassDef) for node in ast.parse(path.read_text(encoding="utf-8")).body
    )


def test_each_module_has_a_test_file_of_its_name() -> None:
    tested = {path.relative_to(ROOT).as_posix() for path in _files("tests", "test_*.py")}
    modules = {module for module, path in SOURCES.items() if _has_behaviour(path)}
    assert {module for module in modules if _test_file(module) not in tested} == TESTED_ELSEWHERE.keys()


def test_each_test_file_has_the_name_of_a_module() -> None:
    tests = {path.relative_to(ROOT).as_posix() for path in _files("tests", "test_*.py")}
    names = [_test_file(module).removesuffix(".py") for module in SOURCES]
    mirrors = {path for path in tests if any(path == f"{name}.py" or path.startswith(f"{name}_") for name in names)}
    assert tests - mirrors == TESTS_OF_NO_MODULE.keys()


def test_no_code_file_is_longer_than_its_limit() -> None:
    lines = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES.values()}
    assert not {path: count for path, count in lines.items() if count > MAX_FILE_LINES}


def test_no_class_is_longer_than_its_limit() -> None:
    lines = {
        f"{module}.{node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for module, path in SOURCES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    }
    assert not {name: count for name, count in lines.items() if count > MAX_CLASS_LINES}


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


@pytest.mark.slow
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


@pytest.fixture
def wheel(pytestconfig: pytest.Config, tmp_path: Path) -> Path:
    """Return the wheel that --wheel names, or build one from a copy of the checkout."""
    if given := pytestconfig.getoption("--wheel"):
        return Path(given)

    def ignored(folder: str, names: list[str]) -> set[str]:
        return {name for name in names if name == "__pycache__" or name.endswith(".egg-info")}

    for name in CODE_FOLDERS:
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "d2f_fast/miniature/__pycache__").mkdir()
    (tmp_path / "d2f_fast/miniature/__pycache__/stale.pyc").touch()
    built = _python("from setuptools import build_meta; print(build_meta.build_wheel('dist'))", cwd=tmp_path)
    return tmp_path / "dist" / built.split()[-1]


def test_wheel_holds_each_module_once_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
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


@pytest.mark.parametrize(
    ("arguments", "processes"),
    [
        ([], 2),
        (["-k", "unit", "-x", "tests"], 2),
        (["-m", "gpu or not gpu"], 0),
        (["-s"], 0),
        (["tests/test_unit.py::test_unit"], 0),
        (["--pdb"], 0),
        (["--benchmark"], 0),
        (["--benchmark", "-n", "1"], 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_default_selection_runs_in_two_processes(arguments: list[str], processes: int, tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_unit.py").write_text("def test_unit(): pass")
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    code = f"""
import os, pytest
os.cpu_count = lambda: 2
class Plugin:
    @pytest.hookimpl(trylast=True)
    def pytest_configure(self, config):
        print("processes:", len(config.option.tx))
        pytest.exit("seen", returncode=0)
pytest.main({arguments!r}, plugins=[Plugin()])
"""
    assert f"processes: {processes}\n" in _python(code, cwd=tmp_path)


def test_citation_names_this_version_and_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == d2f_fast.__version__
    (paper,) = citation["references"]
    assert paper["title"].startswith("Diff2Flow") and paper["identifiers"][0]["value"] == "arXiv:2506.02221"


def test_newest_changelog_entry_is_this_version() -> None:
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines() if line[:3] == "## "]
    assert headings[0] == f"## {d2f_fast.__version__}"


@pytest.mark.parametrize(
    "path", sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / ".github").rglob("*.yml"))
)
def test_github_file_is_yaml_of_its_kind(path: str) -> None:
    content = yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))
    if "/workflows/" in path:
        assert True in content, "YAML reads the key `on` as true"
        assert all(job["steps"] and job["runs-on"] for job in content["jobs"].values())
    else:
        assert {"name", "description", "body"} <= content.keys()


def test_release_publishes_nothing_yet() -> None:
    release = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8"))
    assert release["jobs"]["publish"]["if"] is False
