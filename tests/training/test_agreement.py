"""Numbers and texts that the processes of a run exchange, and connections that are lost."""

from typing import Any

import pytest
import torch
from torch import distributed

from d2f_fast.training import agreement as agreement_module
from d2f_fast.training.agreement import Agreement, LostProcessError, connecting, sum_over_processes

CPU = torch.device("cpu")


def lose(*arguments: Any, **options: Any) -> None:
    raise RuntimeError("[pair.cc:547] Connection closed by peer")


def test_one_process_agrees_with_itself_and_exchanges_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "all_reduce", lose)
    agreement = Agreement(CPU, 1)
    assert agreement.largest(15, 0) == [15, 0] and agreement.texts("a") == ["a"]


def test_several_processes_agree_on_the_largest_values(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_reduce(values: torch.Tensor, op: Any, group: Any) -> None:
        assert op == distributed.ReduceOp.MAX and values.device == CPU
        torch.maximum(values, torch.tensor([2, 1]), out=values)

    monkeypatch.setattr(distributed, "all_reduce", all_reduce)
    assert Agreement(CPU, 2).largest(15, 0) == [15, 1]


def test_lost_connection_is_reported_as_a_lost_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "all_reduce", lose)
    monkeypatch.setattr(distributed, "all_gather_object", lose)
    monkeypatch.setattr(distributed, "get_world_size", lambda group: 2)
    agreement = Agreement(CPU, 2)
    for exchange in (
        lambda: agreement.largest(0),
        lambda: agreement.texts(""),
        lambda: sum_over_processes(torch.ones(1)),
    ):
        with pytest.raises(LostProcessError, match="another process of this run has ended"):
            exchange()


def test_processes_that_cannot_connect_are_refused_with_the_first_line_of_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(agreement_module, "LAUNCHER_SECONDS", 0.0)
    sentence = r"cannot connect \(Connection reset by peer\): another one has ended"
    with pytest.raises(LostProcessError, match=sentence), connecting():
        raise distributed.DistNetworkError("Connection reset by peer\nException raised from recvBytes")
