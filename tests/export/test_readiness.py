"""Tests of the static TensorRT check: graphs that pass, problems that it reports, and the minimum version."""

import numpy as np
import onnx
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from d2f_fast.export import graphs, verify
from d2f_fast.export.readiness import check_readiness
from d2f_fast.export.sampler_graph import Guidance, write_sampler
from d2f_fast.export.wrappers import unet_component


def test_every_graph_of_an_export_is_ready(exported):
    _, report = exported
    assert len(report["tensorrt"]) == 6
    for name, found in report["tensorrt"].items():
        assert found["problems"] == [], name
        assert (found["ready"], found["opset"], found["minimum_tensorrt"]) == (True, 20, "10.0")
    loops = {name: found["operators"].get("Loop", 0) for name, found in report["tensorrt"].items()}
    assert loops["unet/sampler.onnx"] == 1 and sum(loops.values()) == 1


@pytest.mark.slow
def test_opset_23_has_one_node_for_each_normalisation_and_attention(exported_unet, one_level_folder):
    _, report = exported_unet(target="tensorrt", components="unet,sampler", steps="2", static="1x16x24")
    found = report["tensorrt"]["unet/model.onnx"]
    unet = StableDiffusionPipeline.from_pretrained(one_level_folder).unet
    attentions = sum(type(module).__name__ == "Attention" for module in unet.modules())
    norms = sum(isinstance(module, nn.GroupNorm) for module in unet.modules())
    assert (found["operators"]["Attention"], found["operators"]["GroupNormalization"]) == (attentions, norms)
    assert (found["ready"], found["opset"], found["minimum_tensorrt"]) == (True, 23, "10.14")
    assert report["tensorrt"]["unet/sampler.onnx"]["ready"]
    assert max(row["rms"] for row in report["parity"]) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("opset", "counts"), [(20, (0, 0)), (23, (32, 61))])
def test_network_with_the_blocks_of_stable_diffusion_15_is_ready(opset, counts, tmp_path):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(block_out_channels=(32, 64, 64, 64), cross_attention_dim=64).eval()
    graphs.save(graphs.convert(unet_component(unet), opset), tmp_path / "model.onnx", external=True)
    found = check_readiness(tmp_path / "model.onnx")
    assert found["problems"] == []
    assert (found["operators"].get("Attention", 0), found["operators"].get("GroupNormalization", 0)) == counts
    rows = verify.compare(tmp_path / "model.onnx", verify.component_cases(unet_component(unet)))
    print(f"\nopset {opset}: {sum(found['operators'].values())} nodes, rms {max(row['rms'] for row in rows):.1e}")
    assert max(row["rms"] for row in rows) <= 5e-6
    # The Loop adds 17 nodes, of 1900 or 1200.
    write_sampler(tmp_path / "sampler.onnx", tmp_path / "model.onnx", guidance=Guidance(), scaling={})
    operators = check_readiness(tmp_path / "sampler.onnx")["operators"]
    assert sum(operators.values()) <= 1.05 * sum(found["operators"].values())


_node = helper.make_node


def _save(tmp_path, nodes, initializers=(), **options):
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, options.pop("shape", None))]
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(initializers))
    options = {"opset_imports": [helper.make_opsetid("", 20)], "ir_version": 10} | options
    onnx.save(helper.make_model(graph, **options), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def _loop(nodes, trips, collected=()):
    """Return a Loop of `trips` from x to y with a body from s to o; `collected` are its scan outputs."""
    values = [
        helper.make_tensor_value_info(name, kind, shape)
        for name, kind, shape in (
            ("i", TensorProto.INT64, []),
            ("c", TensorProto.BOOL, []),
            ("s", TensorProto.FLOAT, ["n", 2]),
            ("c2", TensorProto.BOOL, []),
            ("o", TensorProto.FLOAT, ["n", 2]),
        )
    ]
    outputs = [*values[3:], *(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in collected)]
    body = helper.make_graph([*nodes, _node("Identity", ["c"], ["c2"])], "body", values[:3], outputs)
    return _node("Loop", [trips, "", "x"], ["y", *(f"all_{name}" for name in collected)], body=body)


THREE = numpy_helper.from_array(np.asarray(3), "three")
SIZES = [numpy_helper.from_array(np.ones(4, np.float32), "scales"), numpy_helper.from_array(np.asarray([0, 1]), "axes")]
TO_4D = _node("Unsqueeze", ["x", "axes"], ["z"])


@pytest.mark.parametrize(
    ("nodes", "initializers", "options", "problem"),
    [
        (
            [_node("NonZero", ["x"], ["i"]), _node("Cast", ["i"], ["y"], to=1)],
            [],
            {},
            "operator NonZero (1 times)",
        ),
        (
            [_node("Foo", ["x"], ["y"], domain="com.microsoft")],
            [],
            {"opset_imports": [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]},
            "operators of the domain com.microsoft",
        ),
        ([_node("Neg", ["x"], ["y"])], [], {"ir_version": 11}, "IR version 11 above 10"),
        (
            [_node("Cast", ["x"], ["d"], to=11), _node("Cast", ["d"], ["y"], to=1)],
            [],
            {},
            "computes in float64",
        ),
        (
            [_node("Neg", ["x"], ["y"])],
            [numpy_helper.from_array(np.ones(2), "w")],
            {},
            "initializer w in float64",
        ),
        (
            [_node("MatMul", ["x", "w"], ["y"])],
            [numpy_helper.from_array(np.ones((3, 3), np.float32), "w")],
            {},
            "shape inference fails",
        ),
        ([_node("Cast", ["x"], ["u"], to=4), _node("Cast", ["u"], ["y"], to=1)], [], {}, "computes in uint16"),
        (
            [_loop([_node("Cast", ["s"], ["d"], to=11), _node("Cast", ["d"], ["o"], to=1)], "three")],
            [THREE],
            {},
            "Cast  computes in float64",
        ),
        (
            [_loop([_node("MatMul", ["s", "w"], ["p"]), _node("Add", ["p", "s"], ["o"])], "three")],
            [THREE, numpy_helper.from_array(np.ones((3, 3), np.float32), "w")],
            {},
            "shape inference fails",
        ),
        (
            [_node("Size", ["x"], ["count"]), _loop([_node("Neg", ["s"], ["o"])], "count", ["o"])],
            [],
            {},
            "scan output all_o of dynamic length",
        ),
        (
            [TO_4D, _node("Resize", ["z", "", "scales"], ["y"], mode="linear", antialias=1)],
            SIZES,
            {},
            "Resize : antialias 1",
        ),
        (
            [TO_4D, _node("Resize", ["z", "", "scales"], ["y"], mode="cubic")],
            SIZES,
            {},
            "Resize : mode cubic",
        ),
        (
            [
                TO_4D,
                _node(
                    "Resize",
                    ["z", "roi", "scales"],
                    ["y"],
                    mode="linear",
                    coordinate_transformation_mode="tf_crop_and_resize",
                ),
            ],
            [*SIZES, numpy_helper.from_array(np.ones(8, np.float32), "roi")],
            {},
            "Resize : coordinate_transformation_mode tf_crop_and_resize",
        ),
        ([_node("Neg", ["x"], ["y"])], [], {"opset_imports": [helper.make_opsetid("", 25)]}, "opset 25 above 24"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_problem_is_reported(nodes, initializers, options, problem, tmp_path):
    found = check_readiness(_save(tmp_path, nodes, initializers, **options))
    assert not found["ready"]
    assert any(problem in line for line in found["problems"]), found["problems"]


@pytest.mark.parametrize(
    ("nodes", "options", "minimum"),
    [
        (
            [
                _node("Shape", ["x"], ["sizes"]),
                _loop([_node("Reshape", ["s", "sizes"], ["r"]), _node("Identity", ["s"], ["o"])], "three"),
            ],
            {},
            "10.0",
        ),
        ([_loop([_node("Neg", ["s"], ["o"])], "three", ["o"])], {}, "10.0"),
        ([_node("Neg", ["x"], ["y"])], {"opset_imports": [helper.make_opsetid("", 24)]}, "10.15"),
    ],
    ids=["body that reads a shape around it", "scan output of known length", "last opset"],
)
def test_graph_that_the_parser_reads_is_ready(nodes, options, minimum, tmp_path):
    found = check_readiness(_save(tmp_path, nodes, [THREE], shape=["n", 2], **options))
    assert (found["problems"], found["ready"], found["minimum_tensorrt"]) == ([], True, minimum)


def test_data_file_must_lie_beside_the_graph(tmp_path):
    weight = numpy_helper.from_array(np.ones((2, 2), np.float32), "w")
    onnx.external_data_helper.set_external_data(weight, location="other.data", length=16)
    weight.ClearField("raw_data")
    found = check_readiness(_save(tmp_path, [_node("MatMul", ["x", "w"], ["y"])], [weight]))
    assert "data file other.data is not beside the graph" in found["problems"]


@pytest.mark.parametrize(("rows", "problems"), [(2**28 - 1, []), (2**28, ["initializer w of 2 GiB or more"])])
def test_tensors_must_be_below_2_gib(rows, problems, tmp_path):
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2, rows], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "m.onnx.data", "length": str(8 * rows)}.items():
        weight.external_data.add(key=key, value=value)
    (tmp_path / "m.onnx.data").touch()
    found = check_readiness(_save(tmp_path, [helper.make_node("MatMul", ["x", "w"], ["y"])], [weight]))
    assert found["problems"] == problems
