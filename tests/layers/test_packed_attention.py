"""Packed attention projections give the results of separate ones, and are used only where both are the same."""

from collections.abc import Callable
from typing import Any

import pytest
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor, nn

from d2f_fast.kernels.lora_dispatch import PATH_VARIABLE
from d2f_fast.layers import packed_attention
from d2f_fast.layers.fused_lora import use_fused_lora


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that receives the number of layers in each packed product."""
    counts: list[int] = []
    theirs = packed_attention._packed

    def count(x: Tensor, layers: Any) -> tuple[Tensor, ...]:
        counts.append(len(layers))
        return theirs(x, layers)

    monkeypatch.setattr(packed_attention, "_packed", count)
    return counts


def test_text_and_self_attention_projections_are_packed(
    unets: Any, monkeypatch: pytest.MonkeyPatch, packed: list[int]
) -> None:
    unet = unets.adapted()
    with use_fused_lora(unet):
        unets.step(unet)
        assert packed == []  # without a GPU, plain torch runs
        monkeypatch.setenv(PATH_VARIABLE, "addmm")
        unets.step(unet)
        assert packed == [8]  # keys and values of 4 layers; the table fuses no q, k, v here
        packed.clear()
        monkeypatch.setenv(PATH_VARIABLE, "split")
        unets.step(unet)
        assert packed == [8, 3, 3, 3, 3]
        packed.clear()
        unet.text_products.wanted = False
        unets.step(unet)
        assert packed == [3, 3, 3, 3]
        assert unet.text_products.text is None and not unet.text_products.projected


@pytest.mark.parametrize(("ranks", "products"), [(12, [3, 3, 2]), (31, [7, 1]), (7, [])])
def test_text_products_hold_at_most_so_many_ranks(
    unets: Any, monkeypatch: pytest.MonkeyPatch, packed: list[int], ranks: int, products: list[int]
) -> None:
    unet = unets.adapted()
    want = unets.step(unet)
    monkeypatch.setenv(PATH_VARIABLE, "addmm")
    monkeypatch.setattr(packed_attention, "MOST_PACKED_RANKS", ranks)
    with use_fused_lora(unet):
        got = unets.step(unet)
    assert packed == products
    assert unets.largest_error(got, want) <= 2e-5


def test_scale_in_cross_attention_kwargs_is_applied(
    unets: Any, monkeypatch: pytest.MonkeyPatch, packed: list[int]
) -> None:
    unet = unets.adapted()
    want = unets.step(unet, cross_attention_kwargs={"scale": 0.5})
    monkeypatch.setenv(PATH_VARIABLE, "split")
    with use_fused_lora(unet):
        got = unets.step(unet, cross_attention_kwargs={"scale": 0.5})
    assert 8 not in packed
    assert unets.largest_error(got, want) <= 2e-5


def test_other_processors_and_partial_adapters_are_not_packed(
    unets: Any, monkeypatch: pytest.MonkeyPatch, packed: list[int]
) -> None:
    monkeypatch.setenv(PATH_VARIABLE, "split")
    unet = unets.adapted()
    unet.set_attn_processor(AttnProcessor())
    with use_fused_lora(unet):
        unets.step(unet)
    with use_fused_lora(unets.with_config(target_modules=["to_q", "to_v"])) as handle:
        unets.step(handle._unet)
    assert packed == []


def with_projected_text(unets: Any) -> Any:
    return unets.new_unet(encoder_hid_dim=16, encoder_hid_dim_type="text_proj")


def with_attention(unets: Any, name: str, **options: Any) -> Any:
    unet = unets.new_unet()
    text = {"cross_attention_dim": 16} if name == "attn2" else {}
    attention = Attention(32, heads=4, dim_head=8, **text, **options)
    setattr(unet.mid_block.attentions[0].transformer_blocks[0], name, attention)
    return unet


def with_spatial_norm(unets: Any) -> Any:
    class Halved(nn.Module):
        def forward(self, x: Tensor, zq: Tensor | None) -> Tensor:
            return x / 2

    unet = unets.new_unet()
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.spatial_norm = Halved()
    return unet


def with_changed_text(unets: Any) -> Any:
    def change(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"encoder_hidden_states": kwargs["encoder_hidden_states"] * 2}

    unet = unets.new_unet()
    unet.mid_block.attentions[0].transformer_blocks[0].register_forward_pre_hook(change, with_kwargs=True)
    return unet


@pytest.mark.parametrize(("make", "products"), [
    (with_projected_text, [3, 3, 3, 3]),
    (lambda unets: with_attention(unets, "attn2", cross_attention_norm="layer_norm"), [6, 3, 3, 3, 3]),
    (lambda unets: with_attention(unets, "attn2", added_kv_proj_dim=16), [6, 3, 3, 3, 3]),
    (lambda unets: with_attention(unets, "attn1", norm_num_groups=8), [8, 3, 3, 3]),
    (with_spatial_norm, [8, 3, 3, 3]),
    (with_changed_text, [8, 3, 3, 3, 3]),
], ids=["text projected", "text normed", "text added", "group norm", "spatial norm", "text changed"])  # fmt: skip
def test_operations_between_a_layer_and_its_input_are_kept(
    unets: Any, monkeypatch: pytest.MonkeyPatch, packed: list[int], make: Callable[[Any], Any], products: list[int]
) -> None:
    unet = unets.adapted(make(unets))
    want = unets.step(unet)
    monkeypatch.setenv(PATH_VARIABLE, "split")
    with use_fused_lora(unet):
        got = unets.step(unet)
    assert packed == products
    assert unets.largest_error(got, want) <= 2e-5


def test_text_products_of_a_failed_forward_are_dropped(unets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PATH_VARIABLE, "split")
    unet = unets.adapted()
    sample, timestep, text = unets.inputs(unet)
    with use_fused_lora(unet):
        with pytest.raises(RuntimeError):
            unet(sample[:, :3], timestep, text)
        assert unet.text_products.text is None
    assert not hasattr(unet, "text_products") and not unet._forward_hooks and not unet._forward_pre_hooks
