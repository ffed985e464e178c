"""The static TensorRT check: what passes, what is named, and the minimum version."""

import numpy as np
import onnx
import pytest
from diffusers import StableDiffusionPipeline
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from d2f_fast.export.readiness import check_readiness, trtexec_line


def test_every_graph_of_an_export_is_ready(exported):
    _, report = exported
    assert len(report["tensorrt"]) == 6
    for name, found in report["tensorrt"].items():
        assert found["problems"] == [], name
        assert (found["ready"], found["opset"], found["minimum_tensorrt"]) == (True, 20, "10.0")
    loops = {name: found["operators"].get("Loop", 0) for name, found in report["tensorrt"].items()}
    assert loops["unet/sampler.onnx"] == 1 and sum(loops.values()) == 1


def test_opset_23_has_one_node_for_each_normalisation_and_attention(exported_unet, tiny_folder):
    _, report = exported_unet(target="tensorrt", components="unet,sampler", steps="2")
    found = report["tensorrt"]["unet/model.onnx"]
    unet = StableDiffusionPipeline.from_pretrained(tiny_folder).unet
    attentions = sum(type(module).__name__ == "Attention" for module in unet.modules())
    norms = sum(isinstance(module, nn.GroupNorm) for module in unet.modules())
    assert (found["operators"]["Attention"], found["operators"]["GroupNormalization"]) == (attentions, norms)
    assert (found["ready"], found["opset"], found["minimum_tensorrt"]) == (True, 23, "10.14")
    assert report["tensorrt"]["unet/sampler.onnx"]["ready"]
    assert max(row["rms"] for row in report["parity"]) <= 1e-5


def _save(tmp_path, nodes, initializers=(), **options):
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(initializers))
    options = {"opset_imports": [helper.make_opsetid("", 20)], "ir_version": 10} | options
    onnx.save(helper.make_model(graph, **options), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


@pytest.mark.parametrize(
    ("nodes", "initializers", "options", "problem"),
    [
        (
            [helper.make_node("NonZero", ["x"], ["i"]), helper.make_node("Cast", ["i"], ["y"], to=1)],
            [],
            {},
            "operator NonZero (1 times)",
        ),
        (
            [helper.make_node("Foo", ["x"], ["y"], domain="com.microsoft")],
            [],
            {"opset_imports": [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]},
            "operators of the domain com.microsoft",
        ),
        ([helper.make_node("Neg", ["x"], ["y"])], [], {"ir_version": 11}, "IR version 11 above 10"),
        (
            [helper.make_node("Cast", ["x"], ["d"], to=11), helper.make_node("Cast", ["d"], ["y"], to=1)],
            [],
            {},
            "computes in float64",
        ),
        (
            [helper.make_node("Neg", ["x"], ["y"])],
            [numpy_helper.from_array(np.ones(2), "w")],
            {},
            "initializer w in float64",
        ),
        (
            [helper.make_node("MatMul", ["x", "w"], ["y"])],
            [numpy_helper.from_array(np.ones((3, 3), np.float32), "w")],
            {},
            "shape inference fails",
        ),
    ],
    ids=["operator", "domain", "ir", "float64", "float64 weight", "shapes"],
)
def test_problem_is_named(nodes, initializers, options, problem, tmp_path):
    found = check_readiness(_save(tmp_path, nodes, initializers, **options))
    assert not found["ready"]
    assert any(problem in line for line in found["problems"]), found["problems"]


def test_data_file_must_lie_beside_the_graph(tmp_path):
    weight = numpy_helper.from_array(np.ones((2, 2), np.float32), "w")
    onnx.external_data_helper.set_external_data(weight, location="other.data", length=16)
    weight.ClearField("raw_data")
    found = check_readiness(_save(tmp_path, [helper.make_node("MatMul", ["x", "w"], ["y"])], [weight]))
    assert "data file other.data is not beside the graph" in found["problems"]


def test_trtexec_line_has_the_three_shapes_of_each_input():
    line = trtexec_line("unet/model.onnx", {"sample": [(2, 4, 32, 32), (2, 4, 64, 64), (8, 4, 96, 96)]})
    assert line == (
        "trtexec --onnx=unet/model.onnx --stronglyTyped --minShapes=sample:2x4x32x32 --optShapes=sample:2x4x64x64"
        " --maxShapes=sample:8x4x96x96 --saveEngine=unet/model.engine"
    )
    assert "Shapes" not in trtexec_line("a.onnx", {})


@pytest.mark.gpu
def test_engine_builds_where_tensorrt_is_installed(exported):
    tensorrt = pytest.importorskip("tensorrt")
    logger = tensorrt.Logger(tensorrt.Logger.WARNING)
    network = tensorrt.Builder(logger).create_network()
    parser = tensorrt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(exported[0] / "unet/model.onnx")), parser.get_error(0)
