"""Options and markers shared by tests/ and benchmarks/; at the root, so that they exist whatever path is given."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--benchmark", action="store_true", help="run benchmarks/ instead of tests/, slow and gpu ones too"
    )
    parser.addoption("--results", default="benchmarks/results", help="folder that benchmarks append their rows to")
    parser.addoption("--go_on", action="store_true", help="leave out what --results has by an earlier --go_on")
    parser.addoption("--dry_run", action="store_true", help="try each benchmark once at its smallest size")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--benchmark"):
        return
    config.addinivalue_line("python_files", "bench_*.py")
    if config.args_source is not pytest.Config.ArgsSource.ARGS:  # paths the user typed are kept
        config.args = [str(config.rootpath / "benchmarks")]
    if config.option.markexpr in config.getini("addopts"):  # so is a -m the user typed
        config.option.markexpr = ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch  # here: collecting and listing tests needs no torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA GPU")
