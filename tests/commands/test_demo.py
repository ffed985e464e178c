"""`d2f demo` as a user types it: where the report goes, and what is refused."""

import json
import os
import signal
from pathlib import Path

import pytest

from d2f_fast.commands.main import main
from d2f_fast.training.signals import stop_signals


def test_demo_writes_its_report_into_the_folder_with_the_seed(tmp_path, capsys, monkeypatch):
    import d2f_fast.demo.run

    def run_demo(folder, seed):
        assert Path(folder).is_dir()  # it is made before the slow work begins
        return Path(folder) / f"{seed}.html"

    monkeypatch.setattr(d2f_fast.demo.run, "run_demo", run_demo)
    output = tmp_path / "a" / "demo"
    assert main(["demo", "--output_dir", str(output), "--seed", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"output": str(output / "5.html")}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_ends_the_demo_in_one_line_that_promises_nothing(number, code, tmp_path, capfd, monkeypatch):
    import d2f_fast.demo.run

    def run_demo(folder, seed):
        with stop_signals(lambda: True):  # as in a training run with unsaved steps
            os.kill(os.getpid(), number)

    monkeypatch.setattr(d2f_fast.demo.run, "run_demo", run_demo)
    assert main(["demo", "--output_dir", str(tmp_path / "demo")]) == code
    assert capfd.readouterr().err == f"d2f: stopped by {signal.Signals(number).name}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--seed", "-1"], "seed must be in [0, 2**63), got -1"),
        (["--output_dir", "file"], "file cannot be made a folder (File exists): name another"),
    ],
)
def test_bad_demo_options_are_refused(options, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert main(["demo", *options]) == 2
    assert capsys.readouterr().err == f"d2f: {sentence}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
