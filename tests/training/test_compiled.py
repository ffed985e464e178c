"""Parts of a step that are compiled."""

from typing import Any

import pytest
import torch


@pytest.mark.slow
def test_trainers_of_one_process_do_not_share_the_recompile_limit(
    make_batch: Any, monkeypatch: pytest.MonkeyPatch, make_one_level_trainer: Any
) -> None:
    # The limit is that of the tracing, which is the same for every backend.
    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda loss, fullgraph, options: compile(loss, fullgraph=fullgraph, backend="eager")
    )
    with torch._dynamo.config.patch(recompile_limit=1):
        for _ in range(2):
            make_one_level_trainer(compile=True).step(make_batch(4))
