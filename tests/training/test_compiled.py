"""Parts of a step that are compiled: the whole call of a network, or the blocks that it repeats."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch._dynamo.utils import counters

from d2f_fast.errors import RefusedInputError
from d2f_fast.kernels.lora_dispatch import PATH_VARIABLE
from d2f_fast.layers.fused_lora import use_fused_lora
from d2f_fast.lora.inject import inject_lora
from d2f_fast.training.compiled import CompiledBlocks


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
            make_one_level_trainer(compile="full").step(make_batch(4))


# Blocks


def blocks_of(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, BasicTransformerBlock | ResnetBlock2D)]


def is_compiled(network: nn.Module) -> bool:
    """Return whether the blocks of a network run compiled code; all of them or none do."""
    (found,) = {"forward" in vars(block) for block in blocks_of(network)}
    return found


@pytest.fixture
def check_blocks(
    make_trainer: Any, tiny_pipeline: Any, make_batch: Any, gradients_of: Any, distance: Any
) -> Callable[..., int]:
    """Return a function that asserts that steps with compiled blocks equal eager ones, and returns the graphs compiled.

    The network has one level, with seven blocks of three kinds. After a first step of each batch size nothing is
    compiled again.
    """

    def check(sizes: tuple[int, ...], tolerance: float, **options: Any) -> int:
        pipeline = tiny_pipeline()
        one_level = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("UpBlock2D",)}
        one_level |= {"block_out_channels": (16,), "layers_per_block": 2, "mid_block_type": None}
        torch.manual_seed(0)
        pipeline.unet = UNet2DConditionModel.from_config(dict(pipeline.unet.config) | one_level)
        options = {"pipeline": pipeline, "max_grad_norm": 1e9, **options}
        eager, compiled = make_trainer(**options), make_trainer(**options, compile="regional")
        assert len(blocks_of(compiled.unet)) == 7
        counters.clear()
        for number in range(2 * len(sizes)):
            given = make_batch(sizes[number % len(sizes)], number)
            with torch._dynamo.config.patch(error_on_recompile=number >= len(sizes)):
                loss = compiled.step(given)
            assert not is_compiled(compiled.unet)
            # Each step begins at the same weights, so that no difference grows.
            assert loss.item() == pytest.approx(eager.step(given).item(), rel=tolerance)
            assert distance(gradients_of(compiled), gradients_of(eager)) <= tolerance
            with torch.no_grad():
                for name, parameter in eager.trainable.items():
                    parameter.copy_(compiled.trainable[name])
        graphs: int = counters["stats"]["unique_graphs"]
        return graphs

    return check


def test_blocks_of_one_kind_share_their_code_and_a_checkpointed_step_equals_the_eager_one(
    aot_eager: None, check_blocks: Any
) -> None:
    # The first block of two kinds has no gradient to pass on, which takes a graph of its own.
    assert check_blocks((4,), 1e-6, gradient_checkpointing=True) == 5


@pytest.mark.slow
def test_blocks_share_their_code_where_products_of_the_text_are_packed_elsewhere(
    aot_eager: None, check_blocks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PATH_VARIABLE, "addmm")  # as on a GPU
    assert check_blocks((4,), 1e-6) == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"conv_rank": 2, "first_last_layers": True},
        {"adapter": "full"},
        {"adapter": "full", "gradient_checkpointing": True},
    ],
    ids=["convolutions", "full", "full, checkpointed"],
)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_steps_of_two_sizes_equal_the_eager_ones(
    aot_eager: None, check_blocks: Any, options: dict[str, Any], precision: str
) -> None:
    check_blocks((4, 3), {"no": 1e-6, "bf16": 2e-2}[precision], mixed_precision=precision, **options)


@pytest.mark.slow
def test_blocks_compiled_by_inductor_equal_the_eager_ones(
    check_blocks: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    check_blocks((4,), 2e-6, gradient_checkpointing=True)


def test_context_of_a_teacher_may_lie_inside_that_of_the_network(aot_eager: None, tiny_pipeline: Any) -> None:
    unet = tiny_pipeline().unet
    inject_lora(unet, 2)
    use_fused_lora(unet)
    outer, inner = (CompiledBlocks(unet, torch.device("cpu")) for _ in range(2))
    with outer:
        forwards = [vars(block)["forward"] for block in blocks_of(unet)]
        with inner:
            assert all(vars(block)["forward"] != own for block, own in zip(blocks_of(unet), forwards, strict=True))
            assert not unet.text_products.wanted
        assert [vars(block)["forward"] for block in blocks_of(unet)] == forwards
        with pytest.raises(ValueError, match="inside"), inner:
            raise ValueError("inside")
        assert is_compiled(unet) and not unet.text_products.wanted
    assert not is_compiled(unet) and unet.text_products.wanted


def test_network_without_such_blocks_is_refused() -> None:
    message = r"needs a UNet with a BasicTransformerBlock or ResnetBlock2D, and this one has none: give full"
    with pytest.raises(RefusedInputError, match=message):
        CompiledBlocks(nn.Sequential(nn.Linear(2, 2)), torch.device("cpu"))
