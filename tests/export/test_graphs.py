"""Tests of the conversion of one module: names, dimensions, this package's operators, and what is removed."""

import onnx
import onnxruntime
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from d2f_fast.errors import RefusedInputError
from d2f_fast.export import graphs
from d2f_fast.export.verify import relative_errors
from d2f_fast.export.wrappers import Component, Port, unet_component
from d2f_fast.kernels.lora_linear import lora_linear
from d2f_fast.layers.fused_lora import use_fused_lora
from d2f_fast.lora.inject import inject_lora


def _normal(shape, generator):
    return torch.randn(*shape, generator=generator)


def _component(module: nn.Module) -> Component:
    return Component(
        name="toy",
        module=module.eval(),
        inputs=(Port("x", ("batch", "width", 4), _normal),),
        outputs=(Port("y", ("batch", "width", 3)),),
        config=None,
        multiples={"width": 2},
    )


class AdaptedLinear(nn.Module):
    """A linear layer whose forward is the fused LoRA operation of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.lora_a, self.lora_b = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(3, 2))

    def forward(self, x):
        return lora_linear(x, self.linear.weight, self.lora_a, self.lora_b, self.linear.bias, 0.7)


def test_fused_operations_of_this_package_become_standard_nodes(tmp_path):
    component = _component(AdaptedLinear())
    graphs.save(graphs.convert(component, 20), tmp_path / "toy.onnx", external=False)
    model = onnx.load(tmp_path / "toy.onnx")
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]
    assert {node.domain for node in model.graph.node} == {""}
    x = torch.randn(3, 6, 4)
    (got,) = onnxruntime.InferenceSession(tmp_path / "toy.onnx").run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), component.module(x).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_network_on_the_fused_path_becomes_standard_nodes(one_level_folder, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(one_level_folder / "unet")
    inject_lora(unet, 2, alpha=4, first_last_layers=True)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    unet.requires_grad_(False).eval()
    component = unet_component(unet)
    given = component.make_inputs({"batch": 1, "height": 8, "width": 12, "sequence": 5}, seed=1)
    with torch.no_grad():
        want = component.module(*given.values())
    with use_fused_lora(unet):
        assert {type(module).__module__ for module in unet.modules()} & {"d2f_fast.layers.fused_layers"}
        graphs.save(graphs.convert(component, 20), tmp_path / "unet.onnx", external=False)
    model = onnx.load(tmp_path / "unet.onnx")
    assert {entry.domain for entry in model.opset_import} | {node.domain for node in model.graph.node} == {""}
    feed = {name: value.numpy() for name, value in given.items()}
    (got,) = onnxruntime.InferenceSession(tmp_path / "unet.onnx").run(None, feed)
    assert relative_errors(got, want.numpy())[0] <= 5e-6


def test_raw_operator_of_this_package_is_refused_with_its_module():
    class Raw(nn.Module):
        def forward(self, x):
            return torch.ops.d2f_fast.lora_shrink(x.flatten(0, 1), torch.ones(3, 4)).view(*x.shape[:2], 3)

    with pytest.raises(RefusedInputError, match=r"operator d2f_fast::lora_shrink has no ONNX form \(module 0\)"):
        graphs.convert(_component(nn.Sequential(Raw())), 20)


def test_aten_operator_without_onnx_form_is_named():
    class Bessel(nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x)[..., :3]

    with pytest.raises(RefusedInputError, match=r"bessel_j0 has no ONNX form \(module 1\): call plain torch there"):
        graphs.convert(_component(nn.Sequential(nn.Linear(4, 4), Bessel())), 20)


def test_dimensions_are_named_and_tracer_metadata_is_removed(tmp_path):
    graphs.save(graphs.convert(_component(nn.Linear(4, 3)), 20), tmp_path / "toy.onnx", external=True)
    model = onnx.load(tmp_path / "toy.onnx", load_external_data=False)
    for value, last in ((model.graph.input[0], 4), (model.graph.output[0], 3)):
        dims = value.type.tensor_type.shape.dim
        assert [d.dim_param or d.dim_value for d in dims] == ["batch", "width", last]
    assert not model.metadata_props and not any(node.metadata_props for node in model.graph.node)


def test_fixed_sizes_are_numbers(tmp_path):
    model = graphs.convert(_component(nn.Linear(4, 3)), 20, {"batch": 1, "width": 6})
    assert [list(value.shape) for value in (*model.graph.inputs, *model.graph.outputs)] == [[1, 6, 4], [1, 6, 3]]


def test_large_weights_go_beside_the_graph(tmp_path, monkeypatch):
    monkeypatch.setattr(graphs, "INLINE_LIMIT_BYTES", 1000)
    model = graphs.convert(_component(nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 3))), 20)
    graphs.save(model, tmp_path / "toy.onnx", external=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy.onnx", "toy.onnx.data"]
    (located,) = {
        entry.value
        for tensor in onnx.load(tmp_path / "toy.onnx", load_external_data=False).graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert located == "toy.onnx.data"
