"""Processes that divide a task: their locks, their shards and their devices."""

import os
from pathlib import Path

import pytest
import torch

from d2f_fast.tasks.processes import Process, device_of, owned_folder


def test_locks_of_processes_that_no_run_has_are_removed_and_others_kept(tmp_path: Path) -> None:
    with owned_folder(tmp_path, Process(1, 2)), owned_folder(tmp_path, Process(0, 2)):
        assert sorted(os.listdir(tmp_path)) == [".lock", ".lock-process-1"]
    (tmp_path / ".lock-process-3").touch()
    with owned_folder(tmp_path, Process(0, 2)):
        assert os.listdir(tmp_path) == [".lock"]
    assert os.listdir(tmp_path) == []


def test_process_is_the_one_that_the_launcher_started(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert Process.from_environment() == Process(0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert Process.from_environment() == Process(2, 3) and not Process(2, 3).is_main
    assert [Process(2, 3).owns(i) for i in range(6)] == [False, False, True, False, False, True]


def test_cpu_is_used_where_accelerate_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of(3) == torch.device("cuda", 1)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert device_of(3) == torch.device("cpu")
