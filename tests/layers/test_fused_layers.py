"""Fused LoRA layers give the results and gradients of peft's own layers, and leave unknown layers to peft."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from d2f_fast.kernels.lora_dispatch import PATH_VARIABLE
from d2f_fast.layers.fused_lora import use_fused_lora
from d2f_fast.lora.inject import inject_lora


@pytest.mark.parametrize("convolutions", [False, True], ids=["attention and feed-forward", "convolutions too"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_float32_results_equal_peft_bit_for_bit(unets: Any, convolutions: bool, layout: torch.memory_format) -> None:
    unet = unets.adapted(convolutions=convolutions).to(memory_format=layout)
    want = unets.step(unet)
    with use_fused_lora(unet):
        unets.assert_equal(unets.step(unet), want)
    unets.assert_equal(unets.step(unet), want)


@pytest.mark.parametrize("path", [None, "addmm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_lora_leaves_the_output_unchanged(
    unets: Any, monkeypatch: pytest.MonkeyPatch, path: str | None, dtype: torch.dtype
) -> None:
    unet = unets.new_unet().to(dtype)
    want = unet(*unets.inputs(unet)).sample
    inject_lora(unet, 4, conv_rank=3, first_last_layers=True)
    if path:
        monkeypatch.setenv(PATH_VARIABLE, path)
    for layout in (torch.contiguous_format, torch.channels_last):
        with use_fused_lora(unet.to(memory_format=layout)):
            got = unet(*unets.inputs(unet)).sample
        assert layout == torch.channels_last or torch.equal(got, want)
        assert torch.equal(got, unet(*unets.inputs(unet)).sample)


def test_strided_1x1_convolution_is_not_run_as_a_linear_layer(unets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = unets.new_unet()
    unet.down_blocks[0].downsamplers[0].conv = nn.Conv2d(16, 16, 1, stride=2)
    unet = unets.adapted(unet).to(memory_format=torch.channels_last)
    want = unets.step(unet)
    monkeypatch.setenv(PATH_VARIABLE, "split")
    with use_fused_lora(unet):
        assert 0 < unets.largest_error(unets.step(unet), want) <= 2e-5


@pytest.mark.parametrize("path", ["addmm", "split"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_forced_paths_equal_peft_up_to_rounding(
    unets: Any, monkeypatch: pytest.MonkeyPatch, path: str, layout: torch.memory_format
) -> None:
    # float64 has no kernel, so "split" runs in float32, where the same sums are added in another order.
    dtype, tolerance = (torch.float64, 1e-12) if path == "addmm" else (torch.float32, 2e-5)
    unet = unets.adapted().to(dtype).to(memory_format=layout)
    want = unets.step(unet)
    monkeypatch.setenv(PATH_VARIABLE, path)
    with use_fused_lora(unet):
        got = unets.step(unet)
    assert 0 < unets.largest_error(got, want) <= tolerance


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("path", [None, "addmm", "split"])
def test_bfloat16_error_is_at_most_that_of_peft(
    unets: Any, monkeypatch: pytest.MonkeyPatch, path: str | None, autocast: bool
) -> None:
    unet = unets.adapted()
    for name, parameter in unet.named_parameters():
        parameter.data = parameter.data if "lora_" in name else parameter.data.bfloat16().float()
    truth = unets.step(unet)
    if not autocast:  # float32 adapters in a bfloat16 base
        for name, parameter in unet.named_parameters():
            parameter.data = parameter.data if "lora_" in name else parameter.data.bfloat16()

    def error() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results = unets.step(unet)
        distance = [(results[name].float() - truth[name]).square().sum() for name in truth]
        return (sum(distance) / sum(value.square().sum() for value in truth.values())).sqrt().item()

    want = error()
    if path:
        monkeypatch.setenv(PATH_VARIABLE, path)
    with use_fused_lora(unet):
        assert error() <= 1.2 * want


@pytest.mark.parametrize("path", [None, "addmm", "split"])
def test_forward_of_float32_adapters_in_a_bfloat16_base_is_as_exact_as_that_of_peft(
    unets: Any, monkeypatch: pytest.MonkeyPatch, path: str | None
) -> None:
    unet = unets.adapted()
    for name, parameter in unet.named_parameters():
        parameter.data = parameter.data if "lora_" in name else parameter.data.bfloat16().float()
    inputs = unets.inputs(unet)
    with torch.no_grad():
        truth = copy.deepcopy(unet).double()(*[tensor.double() for tensor in inputs]).sample
        for name, parameter in unet.named_parameters():
            parameter.data = parameter.data if "lora_" in name else parameter.data.bfloat16()
        theirs = unet(*unets.inputs(unet)).sample
        if path:
            monkeypatch.setenv(PATH_VARIABLE, path)
        with use_fused_lora(unet):
            ours = unet(*unets.inputs(unet)).sample
    want, got = ((result.double() - truth).norm() / truth.norm() for result in (theirs, ours))
    # The roundings of either one depend on the processor's instructions.
    assert torch.equal(ours, theirs) if path is None else got <= 1.2 * want


def test_trainable_base_weights_get_their_gradients(unets: Any) -> None:
    unet = unets.adapted()
    for name, parameter in unet.named_parameters():
        if "to_q" in name or "conv1" in name:
            parameter.requires_grad_(True)
    want = unets.step(unet)
    with use_fused_lora(unet):
        unets.assert_equal(unets.step(unet), want)
    assert any("conv1.base_layer.weight" in name for name in want)


def with_hook(unets: Any) -> Any:
    unet = unets.with_config()
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    layer.base_layer.register_forward_hook(lambda module, args, output: output * 2)
    return unet


def with_replaced_forward(unets: Any) -> Any:
    unet = unets.with_config()
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    theirs = type(layer).forward
    layer.forward = lambda x: theirs(layer, x) * 2
    return unet


def with_foreign_base(unets: Any) -> Any:
    class Quantised(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    unet = unets.with_config()
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.base_layer.__class__ = Quantised
    return unet


@pytest.mark.parametrize("path", [None, "split"])
@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda unets: unets.with_config(lora_dropout=0.5),
            "16 of 16 LoRA layers run peft's own forward: dropout in training (16)",
        ),
        (
            lambda unets: unets.with_config(use_dora=True),
            "16 of 16 LoRA layers run peft's own forward: DoraLinearVariant (8), DoraConv2dVariant (8)",
        ),
        (
            lambda unets: unets.with_config(lora_bias=True, target_modules=["to_out.0"]),
            "8 of 8 LoRA layers run peft's own forward: bias on B (8)",
        ),
        (with_hook, "1 of 16 LoRA layers run peft's own forward: hooked layer (1)"),
        (with_replaced_forward, "1 of 16 LoRA layers run peft's own forward: replaced forward (1)"),
        (with_foreign_base, "1 of 16 LoRA layers run peft's own forward: Quantised base layer (1)"),
    ],
    ids=["dropout", "DoRA", "bias", "hook", "replaced", "quantised"],
)
def test_unknown_layers_run_pefts_forward_and_are_reported_once(
    unets: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    make: Callable[[Any], Any],
    sentence: str,
    path: str | None,
) -> None:
    unet = make(unets).train()
    torch.manual_seed(5)
    want = unets.step(unet)
    if path:
        monkeypatch.setenv(PATH_VARIABLE, path)
    with caplog.at_level(logging.WARNING, "d2f_fast"), use_fused_lora(unet):
        torch.manual_seed(5)
        got = unets.step(unet)
        unets.step(unet)
    assert caplog.messages == [sentence]
    assert unets.largest_error(got, want) <= (2e-5 if path else 0)


def test_dropout_in_evaluation_mode_takes_the_fused_path(unets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = unets.with_config(lora_dropout=0.5).eval()
    want = unets.step(unet)
    monkeypatch.setenv(PATH_VARIABLE, "split")
    with use_fused_lora(unet):
        assert 0 < unets.largest_error(unets.step(unet), want) <= 2e-5
