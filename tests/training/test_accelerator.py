"""Settings under which accelerate would not start the run that was asked for."""

from typing import Any

import pytest

from d2f_fast.errors import RefusedInputError
from d2f_fast.training import accelerator, agreement
from d2f_fast.training.agreement import LostProcessError


def test_float16_precision_is_refused(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RefusedInputError, match="mixed_precision must be no or bf16, got fp16"):
        make_trainer(mixed_precision="fp16")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(RefusedInputError, match="mixed_precision must be no or bf16, got fp16"):
        make_trainer()


def test_processes_that_would_train_alone_are_refused(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RefusedInputError, match="2 processes were started, and accelerate sees 1: start them"):
        make_trainer()


def test_process_whose_partner_ends_while_they_connect_says_so(
    make_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("Connection reset by peer")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(accelerator, "Accelerator", connect)
    monkeypatch.setattr(agreement, "LAUNCHER_SECONDS", 0.0)
    with pytest.raises(LostProcessError, match=r"cannot connect \(Connection reset by peer\)"):
        make_trainer()
