"""Write the outcome of each test as a row, and leave out the tests that passed before: a plugin of pytest.

    python -m pytest -m gpu -p benchmarks.kept_tests --results FOLDER

Rows are written to `FOLDER/<device>-tests.csv`, each as soon as its test ends. A run in which nothing is left to do is
a success.
"""

from pathlib import Path
from types import ModuleType

import pytest

TABLE = "tests"


class KeptTests:
    """Write the rows of a run.

    Args:
        config: configuration of the run.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write a row for a test that has run, or that was skipped or failed before it could."""
        if report.when == "call" or (report.when == "setup" and not report.passed):
            row = {"test": report.nodeid, "outcome": report.outcome, "seconds": f"{report.duration:.2f}"}
            _clock(self._config).append(row, TABLE, _results(self._config))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that have a row which says that they passed."""
    rows = _clock(config).measured(TABLE, ("test", "outcome"), _results(config))
    config.hook.pytest_deselected(items=[item for item in items if (item.nodeid, "passed") in rows])
    items[:] = [item for item in items if (item.nodeid, "passed") not in rows]


def pytest_configure(config: pytest.Config) -> None:
    """Let the one process write rows that hears of all tests."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(KeptTests(config))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Count a run without tests as a success."""
    if session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK


def _results(config: pytest.Config) -> Path:
    return Path(config.getoption("--results"))


def _clock(config: pytest.Config) -> ModuleType:
    """Return benchmarks.clock. It imports triton, before which tests/conftest.py must choose the interpreter."""
    from benchmarks import clock

    clock.DRY_RUN[0] = config.getoption("--dry_run")
    return clock
