"""`use_fused_lora` on a whole UNet: peft and diffusers keep working on it, it compiles, and it can be undone."""

import copy
import gc
import logging
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from d2f_fast.kernels.lora_dispatch import PATH_VARIABLE
from d2f_fast.layers.fused_lora import use_fused_lora
from d2f_fast.lora.targets import CONVOLUTION_TARGETS, LINEAR_TARGETS
from d2f_fast.lora.write import save_lora

EVERYWHERE = (*LINEAR_TARGETS, *CONVOLUTION_TARGETS, "conv_in", "conv_out")


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")  # a second one is meant
@pytest.mark.parametrize("path", [None, "split"])
def test_changes_by_peft_act_on_fused_layers_as_on_its_own(
    unets: Any, monkeypatch: pytest.MonkeyPatch, path: str | None
) -> None:
    unet = unets.adapted()
    unet.add_adapter(LoraConfig(r=2, lora_alpha=1, target_modules=[*LINEAR_TARGETS, "conv1"]), adapter_name="second")
    unets.randomize(unet)
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
        for network in (theirs, ours):
            with monkeypatch.context() as context:
                if path:
                    context.setenv(PATH_VARIABLE, path)
                with torch.no_grad():
                    outputs.append(network(*unets.inputs(network)).sample)
        assert (outputs[0] - outputs[1]).norm() <= tolerance * outputs[0].norm()
        assert theirs.state_dict().keys() == ours.state_dict().keys()
    handle.remove()
    assert {type(module) for module in ours.modules()} == {type(module) for module in theirs.modules()}


def test_names_parameters_and_files_are_unchanged(unets: Any, tmp_path: Path) -> None:
    unet = unets.adapted()
    parameters, state = dict(unet.named_parameters()), unet.state_dict()
    with use_fused_lora(unet):
        assert {name: id(p) for name, p in unet.named_parameters()} == {name: id(p) for name, p in parameters.items()}
        assert unet.state_dict().keys() == state.keys()
        save_lora(unet, tmp_path / "lora")
        unet.load_state_dict({name: value * 0.5 for name, value in state.items()})
        got = unets.step(unet)
        unet.save_config(tmp_path / "config")
    unets.assert_equal(got, unets.step(unet))
    assert '"UNet2DConditionModel"' in (tmp_path / "config/config.json").read_text()


def test_weights_loaded_later_are_used(unets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = unets.adapted(convolutions=False)
    monkeypatch.setenv(PATH_VARIABLE, "split")
    with use_fused_lora(unet):
        unets.step(unet)
        unet.load_state_dict({name: value * 0.5 for name, value in unet.state_dict().items()})
        got = unets.step(unet)
    monkeypatch.delenv(PATH_VARIABLE)
    assert unets.largest_error(got, unets.step(unet)) <= 2e-5


def test_merge_and_unload_gives_the_weights_that_peft_gives(unets: Any) -> None:
    config = LoraConfig(r=4, lora_alpha=3, target_modules=list(EVERYWHERE))
    merged = []
    for fused in (False, True):
        model = get_peft_model(unets.new_unet(), config)
        unets.randomize(model)
        handle = use_fused_lora(model.get_base_model()) if fused else None
        merged.append(model.merge_and_unload())
        if handle:
            handle.remove()
    unets.assert_equal(merged[1].state_dict(), merged[0].state_dict())
    assert [type(module) for module in merged[1].modules()] == [type(module) for module in merged[0].modules()]


@pytest.mark.parametrize("unload", ["merge_and_unload", "unload"])
def test_network_without_its_lora_layers_has_its_own_classes_and_no_hooks(unets: Any, unload: str) -> None:
    plain = unets.new_unet()
    model = get_peft_model(unets.new_unet(), LoraConfig(r=4, target_modules=list(EVERYWHERE)))
    use_fused_lora(model.get_base_model())
    unet = getattr(model, unload)()
    assert [type(module) for module in unet.modules()] == [type(module) for module in plain.modules()]
    assert not unet._forward_pre_hooks and not unet._forward_hooks and not hasattr(unet, "text_products")


def test_network_on_the_fused_path_is_freed_from_memory(unets: Any) -> None:
    unet = unets.adapted()
    use_fused_lora(unet)
    unets.step(unet)
    kept = weakref.ref(unet)
    del unet
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda unet: pickle.loads(pickle.dumps(unet))])
def test_copied_network_computes_the_same_with_its_own_weights(unets: Any, duplicate: Callable[[Any], Any]) -> None:
    unet = unets.adapted()
    with use_fused_lora(unet):
        unets.step(unet)
        other = duplicate(unet)
        want = unets.step(unet)
        unets.assert_equal(unets.step(other), want)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        unets.assert_equal(unets.step(unet), want)


def test_gradient_checkpointing_gives_the_same_gradients(unets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = unets.adapted().train()
    want = unets.step(unet)
    unet.enable_gradient_checkpointing()
    with use_fused_lora(unet):
        unets.assert_equal(unets.step(unet), want)
        monkeypatch.setenv(PATH_VARIABLE, "split")
        assert unets.largest_error(unets.step(unet), want) <= 2e-5


def test_no_message_is_logged_where_all_layers_are_fused(unets: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "d2f_fast"), use_fused_lora(unets.adapted()):
        assert not caplog.messages


@pytest.mark.parametrize("path", [None, pytest.param("split", marks=pytest.mark.slow)])
def test_whole_network_compiles_to_one_graph(unets: Any, monkeypatch: pytest.MonkeyPatch, path: str | None) -> None:
    if path:
        monkeypatch.setenv(PATH_VARIABLE, path)
    # The attention of the first block stands for that of all; the slow tests below compile the blocks of a usual UNet.
    unet = unets.adapted(unets.new_unet(up_block_types=("UpBlock2D", "UpBlock2D"), mid_block_type=None))
    torch.compiler.reset()
    with use_fused_lora(unet):
        unets.assert_equal(unets.step(unet, torch.compile(unet, fullgraph=True, backend="eager")), unets.step(unet))
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("path", [None, "split"])
def test_other_batch_sizes_neither_break_nor_recompile_the_graph(
    unets: Any, monkeypatch: pytest.MonkeyPatch, path: str | None
) -> None:
    if path:
        monkeypatch.setenv(PATH_VARIABLE, path)
    unet = unets.adapted()
    torch.compiler.reset()
    with use_fused_lora(unet):
        compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
        for batch in (2, 3):
            unets.step(unet, compiled, batch=batch)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for seed in range(3):
                for batch in (2, 3, 5):
                    got = unets.step(unet, compiled, batch=batch, seed=seed)
                    assert unets.largest_error(got, unets.step(unet, batch=batch, seed=seed)) <= 1e-6
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("path", [None, "split"])
def test_inductor_gives_the_gradients_of_eager_mode(
    unets: Any, monkeypatch: pytest.MonkeyPatch, path: str | None
) -> None:
    if path:
        monkeypatch.setenv(PATH_VARIABLE, path)
    unet = unets.adapted().to(memory_format=torch.channels_last)
    torch.compiler.reset()
    with use_fused_lora(unet):
        want = unets.step(unet)
        unet.compile(fullgraph=True)
        got = unets.step(unet)
    assert unets.largest_error(got, want) <= 1e-5
    torch.compiler.reset()


def test_frozen_convolutions_and_casts_are_not_kept_for_backward(unets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = unets.adapted(convolutions=False)
    for name, parameter in unet.named_parameters():
        parameter.data = parameter.data if "lora_" in name else parameter.data.bfloat16()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}

    def kept_bytes() -> int:
        kept: dict[int, Tensor] = {}  # it holds the tensors, since the address of a freed one is reused

        def keep(tensor: Tensor) -> Tensor:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            unet(*unets.inputs(unet))
        return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in parameters)

    theirs = kept_bytes()
    monkeypatch.setenv(PATH_VARIABLE, "addmm")
    with use_fused_lora(unet):
        assert kept_bytes() < 0.75 * theirs


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda unets: nn.Linear(2, 2),
            "unet must be a diffusers UNet2DConditionModel, got Linear: pass the network itself",
        ),
        (
            lambda unets: torch.compile(unets.adapted()),
            "got OptimizedModule: pass the network itself, before torch.compile",
        ),
        (
            lambda unets: unets.new_unet(),
            "unet has no LoRA layers: add an adapter first, with unet.add_adapter or load_lora_weights",
        ),
    ],
)
def test_networks_without_lora_layers_are_refused(unets: Any, make: Callable[[Any], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        use_fused_lora(make(unets))


def test_second_use_is_refused_and_second_removal_is_allowed(unets: Any) -> None:
    unet = unets.adapted()
    handle = use_fused_lora(unet)
    with pytest.raises(ValueError, match=r"this unet is on the fused path already: call \.remove\(\) of the handle"):
        use_fused_lora(unet)
    handle.remove()
    handle.remove()
    with use_fused_lora(unet):
        pass
