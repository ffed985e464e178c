"""Tests of the errors that the verification finds, and of its messages."""

import math

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from d2f_fast.export.step_tables import StepTable
from d2f_fast.export.verify import (
    Case,
    VerificationError,
    check_rows,
    check_structure,
    compare,
    error_amplification,
    relative_errors,
    table_of,
)


@pytest.fixture
def doubling(tmp_path):
    """Write a graph that doubles its input to a folder of its own, and return its path."""
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "g", value[:1], value[1:])
    (tmp_path / "toy").mkdir()
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "toy/model.onnx")
    return tmp_path / "toy/model.onnx"


def _case(factor, **names):
    x = np.random.default_rng(0).standard_normal((3, 2), np.float32)
    return Case({names.get("x", "x"): x}, {names.get("y", "y"): factor * x})


def test_equal_outputs_pass_and_different_ones_fail(doubling):
    (row,) = compare(doubling, [_case(2)])
    assert (row["graph"], row["rms"], row["max"], row["sizes"]) == ("toy/model.onnx", 0, 0, {"x": [3, 2]})
    check_rows([row], 1e-5)
    rows = compare(doubling, [_case(2), _case(2.5)])
    assert rows[1]["rms"] == pytest.approx(0.2)
    with pytest.raises(
        VerificationError, match=r"toy/model\.onnx differs from torch by 2\.0e-01 .*allowed is 1\.0e-05"
    ):
        check_rows(rows, 1e-5)
    assert "2.0e-01" in table_of(rows).splitlines()[2]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_never_pass(bad):
    good, broken = np.ones(4, np.float32), np.asarray([1, 1, 1, bad], np.float32)
    assert relative_errors(broken, good) == relative_errors(good, broken) == (math.inf, math.inf)
    with pytest.raises(VerificationError):
        check_rows([{"graph": "g", "sizes": {}, "rms": math.inf, "max": math.inf, "amplification": 1.0}], 0.9)


def test_sampler_is_allowed_the_error_that_its_steps_amplify():
    row = {"graph": "unet/sampler.onnx", "sizes": {}, "rms": 2e-5, "max": 2e-5, "amplification": 4.0}
    check_rows([row], 1e-5)
    with pytest.raises(VerificationError, match=r"allowed is 4\.0e-06"):
        check_rows([row], 1e-6)


def test_amplification_equals_that_of_a_perturbed_network():
    table = StepTable([], [], coef_x=[2.0, -0.5], coef_out=[-3.0, 0.25], alphas=[], noise_scales=[], sigmas=[])
    # An error of 1 in each output, with the worst signs, gives 0.5 * 3 + 0.25. Guidance at 2 weighs its halves by 2, 1.
    assert error_amplification(table, 1.0) == 1.75
    assert error_amplification(table, 2.0) == pytest.approx(1.75 * 5**0.5)
    assert error_amplification(StepTable([], [], [1.0], [0.1], [], [], []), 1.0) == 1.0


def test_output_of_another_shape_fails():
    assert relative_errors(np.ones((2, 1)), np.ones((1, 2))) == (math.inf, math.inf)


def test_graph_with_other_input_names_is_refused(doubling):
    with pytest.raises(VerificationError, match=r"has inputs \['x'\] and outputs \['y'\], expected \['sample'\]"):
        compare(doubling, [_case(2, x="sample")])


def test_invalid_model_is_refused(doubling):
    model = onnx.load(doubling)
    model.graph.node[0].input[0] = "nothing"
    onnx.save(model, doubling)
    with pytest.raises(VerificationError, match=r"toy/model\.onnx is not a valid ONNX model"):
        check_structure(doubling)


def test_operator_of_an_unsupported_type_is_refused(tmp_path):
    # Before opset 22 there is no convolution of bfloat16.
    value = [helper.make_tensor_value_info(name, TensorProto.BFLOAT16, [1, 1, 4, 4]) for name in ("x", "w", "y")]
    graph = helper.make_graph([helper.make_node("Conv", ["x", "w"], ["y"], kernel_shape=[4, 4])], "g", value[:2], [])
    graph.output.append(helper.make_tensor_value_info("y", TensorProto.BFLOAT16, [1, 1, 1, 1]))
    for opset in (20, 22):
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
        onnx.save(model, tmp_path / "model.onnx")
        if opset == 22:
            check_structure(tmp_path / "model.onnx")
            continue
        with pytest.raises(VerificationError, match=r"model\.onnx is not a valid ONNX model: .*bfloat16"):
            check_structure(tmp_path / "model.onnx")
