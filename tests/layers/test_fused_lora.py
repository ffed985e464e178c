"""The fused path of peft's LoRA layers, with peft itself as the oracle on a small UNet of Stable Diffusion's layers."""

import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from d2f_fast.kernels.lora_dispatch import PATH_VARIABLE
from d2f_fast.layers import packed_attention
from d2f_fast.layers.fused_lora import use_fused_lora
from d2f_fast.lora.inject import CONVOLUTION_TARGETS, LINEAR_TARGETS, inject_lora
from d2f_fast.lora.write import save_lora

Results = dict[str, Tensor]
EVERYWHERE = (*LINEAR_TARGETS, *CONVOLUTION_TARGETS, "conv_in", "conv_out")


def new_unet(**options: Any) -> Any:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=8,
        **options,
    )


def randomize(unet: nn.Module) -> None:
    """Make every B as random as training does."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def adapted(unet: Any = None, *, convolutions: bool = True, alpha: float = 3.0) -> Any:
    unet = new_unet() if unet is None else unet
    inject_lora(unet, 4, alpha=alpha, conv_rank=3 if convolutions else 0, first_last_layers=convolutions)
    randomize(unet)
    return unet


def inputs(unet: Any, batch: int = 2, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator, like = torch.Generator().manual_seed(seed), unet.conv_in.weight
    sample = torch.randn(batch, 4, 8, 8, generator=generator).to(like.dtype)
    timestep = torch.linspace(20, 673.16, batch)
    return sample, timestep, torch.randn(batch, 8, 16, generator=generator).to(like.dtype)


def step(unet: Any, call: Callable[..., Any] | None = None, *, batch: int = 2, seed: int = 1, **kwargs: Any) -> Results:
    """Output of one forward, and the gradient of every parameter that trains."""
    unet.zero_grad()
    output = (unet if call is None else call)(*inputs(unet, batch, seed), **kwargs, return_dict=False)[0]
    output.float().square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}
    return {"output": output.detach().clone(), **gradients}


def largest_error(got: Results, want: Results) -> float:
    assert got.keys() == want.keys() and len(want) > 20
    errors = [(got[name].double() - want[name].double()).norm() / want[name].double().norm() for name in want]
    return max(error.item() for error in errors)


def assert_equal(got: Results, want: Results) -> None:
    assert got.keys() == want.keys()
    assert not [name for name in want if not torch.equal(got[name], want[name])]


# What is the same as peft


@pytest.mark.parametrize("convolutions", [False, True], ids=["attention and feed-forward", "convolutions too"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_float32_is_bit_for_bit_peft(convolutions: bool, layout: torch.memory_format) -> None:
    unet = adapted(convolutions=convolutions).to(memory_format=layout)
    want = step(unet)
    with use_fused_lora(unet):
        assert_equal(step(unet), want)
    assert_equal(step(unet), want)


@pytest.mark.parametrize("path", [None, "addmm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_lora_changes_nothing(monkeypatch: pytest.MonkeyPatch, path: str | None, dtype: torch.dtype) -> None:
    unet = new_unet().to(dtype)
    want = unet(*inputs(unet)).sample
    inject_lora(unet, 4, conv_rank=3, first_last_layers=True)
    if path:
        monkeypatch.setenv(PATH_VARIABLE, path)
    for layout in (torch.contiguous_format, torch.channels_last):
        with use_fused_lora(unet.to(memory_format=layout)):
            got = unet(*inputs(unet)).sample
        assert layout == torch.channels_last or torch.equal(got, want)
        assert torch.equal(got, unet(*inputs(unet)).sample)


def test_a_strided_1x1_convolution_is_no_product_of_every_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = new_unet()
    unet.down_blocks[0].downsamplers[0].conv = nn.Conv2d(16, 16, 1, stride=2)
    unet = adapted(unet).to(memory_format=torch.channels_last)
    want = step(unet)
    monkeypatch.setenv(PATH_VARIABLE, "split")
    with use_fused_lora(unet):
        assert 0 < largest_error(step(unet), want) <= 2e-5


@pytest.mark.parametrize("path", ["addmm", "split"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_kernels_path_is_peft_up_to_rounding(
    monkeypatch: pytest.MonkeyPatch, path: str, layout: torch.memory_format
) -> None:
    # float64 has no kernel: "split" is measured in float32, against the same sums in another order
    dtype, tolerance = (torch.float64, 1e-12) if path == "addmm" else (torch.float32, 2e-5)
    unet = adapted().to(dtype).to(memory_format=layout)
    want = step(unet)
    monkeypatch.setenv(PATH_VARIABLE, path)
    with use_fused_lora(unet):
        got = step(unet)
    assert 0 < largest_error(got, want) <= tolerance


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("path", [None, "addmm", "split"])
def test_bfloat16_is_as_near_the_truth_as_peft(
    monkeypatch: pytest.MonkeyPatch, path: str | None, autocast: bool
) -> None:
    unet = adapted()
    for name, parameter in unet.named_parameters():
        parameter.data = parameter.data if "lora_" in name else parameter.data.bfloat16().float()
    truth = step(unet)
    if not autocast:  # float32 adapters in a bfloat16 base
        for name, parameter in unet.named_parameters():
            parameter.data = parameter.data if "lora_" in name else parameter.data.bfloat16()

    def error() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results = step(unet)
        distance = [(results[name].float() - truth[name]).square().sum() for name in truth]
        return (sum(distance) / sum(value.square().sum() for value in truth.values())).sqrt().item()

    want = error()
    if path:
        monkeypatch.setenv(PATH_VARIABLE, path)
    with use_fused_lora(unet):
        assert error() <= 1.2 * want


@pytest.mark.parametrize("path", [None, "split"])
def test_what_peft_does_to_the_layers_it_does_to_ours(monkeypatch: pytest.MonkeyPatch, path: str | None) -> None:
    unet = adapted()
    unet.add_adapter(LoraConfig(r=2, lora_alpha=1, target_modules=[*LINEAR_TARGETS, "conv1"]), adapter_name="second")
    randomize(unet)
    tolerance = 0.0 if path is None else 2e-5

    def second_only(unet: Any) -> None:
        unet.set_adapters(["second"], [0.3])

    def both(unet: Any) -> None:
        unet.set_adapters(["default", "second"], [0.7, -1.3])

    def scaled(unet: Any) -> None:
        for layer in unet.modules():
            if hasattr(layer, "scale_layer"):
                layer.scale_layer(0.25)

    def gone(unet: Any) -> None:
        unet.delete_adapters("second")
        unet.set_adapter("default")

    changes: list[Callable[[Any], None]] = [
        second_only,
        both,
        scaled,
        lambda unet: unet.disable_adapters(),
        lambda unet: unet.enable_adapters(),
        lambda unet: unet.fuse_lora(),
        lambda unet: unet.unfuse_lora(),
        lambda unet: unet.eval(),
        gone,
        lambda unet: unet.unload_lora(),
    ]
    theirs, ours = copy.deepcopy(unet), unet
    handle = use_fused_lora(ours)
    for change in changes:
        change(theirs)
        change(ours)
        outputs = []
        for model in (theirs, ours):
            with monkeypatch.context() as context:
                if path:
                    context.setenv(PATH_VARIABLE, path)
                with torch.no_grad():
                    outputs.append(model(*inputs(model)).sample)
        assert (outputs[0] - outputs[1]).norm() <= tolerance * outputs[0].norm()
        assert theirs.state_dict().keys() == ours.state_dict().keys()
    handle.remove()
    assert {type(module) for module in ours.modules()} == {type(module) for module in theirs.modules()}


def test_names_parameters_and_files_stay(tmp_path: Path) -> None:
    unet = adapted()
    parameters, state = dict(unet.named_parameters()), unet.state_dict()
    with use_fused_lora(unet):
        assert {name: id(p) for name, p in unet.named_parameters()} == {name: id(p) for name, p in parameters.items()}
        assert unet.state_dict().keys() == state.keys()
        save_lora(unet, tmp_path / "lora")
        unet.load_state_dict({name: value * 0.5 for name, value in state.items()})
        got = step(unet)
        unet.save_config(tmp_path / "config")
    assert_equal(got, step(unet))
    assert '"UNet2DConditionModel"' in (tmp_path / "config/config.json").read_text()


def test_weights_loaded_later_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = adapted(convolutions=False)
    monkeypatch.setenv(PATH_VARIABLE, "split")
    with use_fused_lora(unet):
        step(unet)
        unet.load_state_dict({name: value * 0.5 for name, value in unet.state_dict().items()})
        got = step(unet)
    monkeypatch.delenv(PATH_VARIABLE)
    assert largest_error(got, step(unet)) <= 2e-5


def test_merge_and_unload_gives_pefts_weights() -> None:
    config = LoraConfig(r=4, lora_alpha=3, target_modules=list(EVERYWHERE))
    merged = []
    for fused in (False, True):
        model = get_peft_model(new_unet(), config)
        randomize(model)
        handle = use_fused_lora(model.get_base_model()) if fused else None
        merged.append(model.merge_and_unload())
        if handle:
            handle.remove()
    assert_equal(merged[1].state_dict(), merged[0].state_dict())
    assert [type(module) for module in merged[1].modules()] == [type(module) for module in merged[0].modules()]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda unet: pickle.loads(pickle.dumps(unet))])
def test_a_copy_computes_the_same_with_its_own_weights(duplicate: Callable[[Any], Any]) -> None:
    unet = adapted()
    with use_fused_lora(unet):
        step(unet)
        other = duplicate(unet)
        want = step(unet)
        assert_equal(step(other), want)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert_equal(step(unet), want)


def test_trainable_base_weights_get_their_gradients() -> None:
    unet = adapted()
    for name, parameter in unet.named_parameters():
        if "to_q" in name or "conv1" in name:
            parameter.requires_grad_(True)
    want = step(unet)
    with use_fused_lora(unet):
        assert_equal(step(unet), want)
    assert any("conv1.base_layer.weight" in name for name in want)


def test_gradient_checkpointing_gives_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = adapted().train()
    want = step(unet)
    unet.enable_gradient_checkpointing()
    with use_fused_lora(unet):
        assert_equal(step(unet), want)
        monkeypatch.setenv(PATH_VARIABLE, "split")
        assert largest_error(step(unet), want) <= 2e-5


# Where peft's own forward runs


def with_config(**options: Any) -> Any:
    unet = new_unet()
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(**{"r": 4, "target_modules": ["to_q", "conv1"], **options}))
    randomize(unet)
    return unet


def with_hook() -> Any:
    unet = with_config()
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    layer.base_layer.register_forward_hook(lambda module, args, output: output * 2)
    return unet


def with_replaced_forward() -> Any:
    unet = with_config()
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    theirs = type(layer).forward
    layer.forward = lambda x: theirs(layer, x) * 2
    return unet


def with_foreign_base() -> Any:
    class Quantised(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    unet = with_config()
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.base_layer.__class__ = Quantised
    return unet


@pytest.mark.parametrize("path", [None, "split"])
@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: with_config(lora_dropout=0.5),
            "16 of 16 LoRA layers run peft's own forward: dropout in training (16)",
        ),
        (
            lambda: with_config(use_dora=True),
            "16 of 16 LoRA layers run peft's own forward: DoraLinearVariant (8), DoraConv2dVariant (8)",
        ),
        (
            lambda: with_config(lora_bias=True, target_modules=["to_out.0"]),
            "8 of 8 LoRA layers run peft's own forward: bias on B (8)",
        ),
        (with_hook, "1 of 16 LoRA layers run peft's own forward: hooked layer (1)"),
        (with_replaced_forward, "1 of 16 LoRA layers run peft's own forward: replaced forward (1)"),
        (with_foreign_base, "1 of 16 LoRA layers run peft's own forward: Quantised base layer (1)"),
    ],
    ids=["dropout", "DoRA", "bias", "hook", "replaced", "quantised"],
)
def test_what_is_unknown_runs_pefts_forward_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    make: Callable[[], Any],
    sentence: str,
    path: str | None,
) -> None:
    unet = make().train()
    torch.manual_seed(5)
    want = step(unet)
    if path:
        monkeypatch.setenv(PATH_VARIABLE, path)
    with caplog.at_level(logging.WARNING, "d2f_fast"), use_fused_lora(unet):
        torch.manual_seed(5)
        got = step(unet)
        step(unet)
    assert caplog.messages == [sentence]
    assert largest_error(got, want) <= (2e-5 if path else 0)


def test_dropout_in_evaluation_takes_the_fused_path(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = with_config(lora_dropout=0.5).eval()
    want = step(unet)
    monkeypatch.setenv(PATH_VARIABLE, "split")
    with use_fused_lora(unet):
        assert 0 < largest_error(step(unet), want) <= 2e-5


def test_nothing_is_said_where_all_layers_are_known(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "d2f_fast"), use_fused_lora(adapted()):
        assert not caplog.messages


# Packed products


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each packed product stood for."""
    counts: list[int] = []
    theirs = packed_attention._packed

    def count(x: Tensor, layers: Any) -> tuple[Tensor, ...]:
        counts.append(len(layers))
        return theirs(x, layers)

    monkeypatch.setattr(packed_attention, "_packed", count)
    return counts


def test_text_and_self_attention_are_packed(monkeypatch: pytest.MonkeyPatch, packed: list[int]) -> None:
    unet = adapted()
    with use_fused_lora(unet):
        step(unet)
        assert packed == []  # plain torch off the GPU
        monkeypatch.setenv(PATH_VARIABLE, "addmm")
        step(unet)
        assert packed == [8]  # keys and values of 4 layers: the table has nothing to fuse in q, k, v
        packed.clear()
        monkeypatch.setenv(PATH_VARIABLE, "split")
        step(unet)
        assert packed == [8, 3, 3, 3, 3]
        assert unet.text_products.text is None and not unet.text_products.projected


@pytest.mark.parametrize(("ranks", "products"), [(12, [3, 3, 2]), (31, [7, 1]), (7, [])])
def test_text_is_packed_up_to_a_number_of_ranks(
    monkeypatch: pytest.MonkeyPatch, packed: list[int], ranks: int, products: list[int]
) -> None:
    unet = adapted()
    want = step(unet)
    monkeypatch.setenv(PATH_VARIABLE, "addmm")
    monkeypatch.setattr(packed_attention, "MOST_PACKED_RANKS", ranks)
    with use_fused_lora(unet):
        got = step(unet)
    assert packed == products
    assert largest_error(got, want) <= 2e-5


def test_a_scale_given_to_the_call_counts(monkeypatch: pytest.MonkeyPatch, packed: list[int]) -> None:
    unet = adapted()
    want = step(unet, cross_attention_kwargs={"scale": 0.5})
    monkeypatch.setenv(PATH_VARIABLE, "split")
    with use_fused_lora(unet):
        got = step(unet, cross_attention_kwargs={"scale": 0.5})
    assert 8 not in packed
    assert largest_error(got, want) <= 2e-5


def test_another_processor_or_adapter_is_not_packed(monkeypatch: pytest.MonkeyPatch, packed: list[int]) -> None:
    monkeypatch.setenv(PATH_VARIABLE, "split")
    unet = adapted()
    unet.set_attn_processor(AttnProcessor())
    with use_fused_lora(unet):
        step(unet)
    with use_fused_lora(with_config(target_modules=["to_q", "to_v"])) as handle:
        step(handle._unet)
    assert packed == []


def with_projected_text() -> Any:
    return new_unet(encoder_hid_dim=16, encoder_hid_dim_type="text_proj")


def with_attention(name: str, **options: Any) -> Any:
    unet = new_unet()
    text = {"cross_attention_dim": 16} if name == "attn2" else {}
    attention = Attention(32, heads=4, dim_head=8, **text, **options)
    setattr(unet.mid_block.attentions[0].transformer_blocks[0], name, attention)
    return unet


def with_spatial_norm() -> Any:
    class Halved(nn.Module):
        def forward(self, x: Tensor, zq: Tensor | None) -> Tensor:
            return x / 2

    unet = new_unet()
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.spatial_norm = Halved()
    return unet


def with_changed_text() -> Any:
    def change(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"encoder_hidden_states": kwargs["encoder_hidden_states"] * 2}

    unet = new_unet()
    unet.mid_block.attentions[0].transformer_blocks[0].register_forward_pre_hook(change, with_kwargs=True)
    return unet


@pytest.mark.parametrize(("make", "products"), [
    (with_projected_text, [3, 3, 3, 3]),
    (lambda: with_attention("attn2", cross_attention_norm="layer_norm"), [6, 3, 3, 3, 3]),
    (lambda: with_attention("attn2", added_kv_proj_dim=16), [6, 3, 3, 3, 3]),
    (lambda: with_attention("attn1", norm_num_groups=8), [8, 3, 3, 3]),
    (with_spatial_norm, [8, 3, 3, 3]),
    (with_changed_text, [8, 3, 3, 3, 3]),
], ids=["text projected", "text normed", "text added", "group norm", "spatial norm", "text changed"])  # fmt: skip
def test_what_comes_between_a_layer_and_its_input_counts(
    monkeypatch: pytest.MonkeyPatch, packed: list[int], make: Callable[[], Any], products: list[int]
) -> None:
    unet = adapted(make())
    want = step(unet)
    monkeypatch.setenv(PATH_VARIABLE, "split")
    with use_fused_lora(unet):
        got = step(unet)
    assert packed == products
    assert largest_error(got, want) <= 2e-5


def test_text_products_of_a_failed_forward_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PATH_VARIABLE, "split")
    unet = adapted()
    sample, timestep, text = inputs(unet)
    with use_fused_lora(unet):
        with pytest.raises(RuntimeError):
            unet(sample[:, :3], timestep, text)
        assert unet.text_products.text is None
    assert not hasattr(unet, "text_products") and not unet._forward_hooks and not unet._forward_pre_hooks


# Compiled


@pytest.mark.parametrize("path", [None, "split"])
def test_the_whole_network_is_one_graph(monkeypatch: pytest.MonkeyPatch, path: str | None) -> None:
    if path:
        monkeypatch.setenv(PATH_VARIABLE, path)
    unet = adapted()
    torch.compiler.reset()
    with use_fused_lora(unet):
        assert_equal(step(unet, torch.compile(unet, fullgraph=True, backend="eager")), step(unet))
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("path", [None, "split"])
def test_compiles_without_a_break_and_without_recompiling(monkeypatch: pytest.MonkeyPatch, path: str | None) -> None:
    if path:
        monkeypatch.setenv(PATH_VARIABLE, path)
    unet = adapted()
    torch.compiler.reset()
    with use_fused_lora(unet):
        compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
        for batch in (2, 3):
            step(unet, compiled, batch=batch)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for seed in range(3):
                for batch in (2, 3, 5):
                    got = step(unet, compiled, batch=batch, seed=seed)
                    assert largest_error(got, step(unet, batch=batch, seed=seed)) <= 1e-6
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("path", [None, "split"])
def test_inductor_gives_eagers_gradients(monkeypatch: pytest.MonkeyPatch, path: str | None) -> None:
    if path:
        monkeypatch.setenv(PATH_VARIABLE, path)
    unet = adapted().to(memory_format=torch.channels_last)
    torch.compiler.reset()
    with use_fused_lora(unet):
        want = step(unet)
        unet.compile(fullgraph=True)
        got = step(unet)
    assert largest_error(got, want) <= 1e-5
    torch.compiler.reset()


# What is kept for backward


def test_frozen_convolutions_and_casts_keep_nothing() -> None:
    unet = adapted(convolutions=False)
    for name, parameter in unet.named_parameters():
        parameter.data = parameter.data if "lora_" in name else parameter.data.bfloat16()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}

    def kept_bytes() -> int:
        kept: dict[int, Tensor] = {}  # the tensors too: an address is reused once its tensor is gone

        def keep(tensor: Tensor) -> Tensor:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            unet(*inputs(unet))
        return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in parameters)

    theirs = kept_bytes()
    with use_fused_lora(unet):
        assert kept_bytes() < 0.75 * theirs


# Refusals


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: nn.Linear(2, 2), "unet must be a diffusers UNet2DConditionModel, got Linear: pass the network itself"),
        (lambda: torch.compile(adapted()), "got OptimizedModule: pass the network itself, before torch.compile"),
        (new_unet, "unet has no LoRA layers: add an adapter first, with unet.add_adapter or load_lora_weights"),
    ],
)
def test_what_has_no_lora_is_refused(make: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        use_fused_lora(make())


def test_a_second_use_is_refused_and_removing_twice_is_not() -> None:
    unet = adapted()
    handle = use_fused_lora(unet)
    with pytest.raises(ValueError, match=r"this unet is on the fused path already: call \.remove\(\) of the handle"):
        use_fused_lora(unet)
    handle.remove()
    handle.remove()
    with use_fused_lora(unet):
        pass
