"""Check whether TensorRT's parser can read a graph, as far as the graph alone shows. Needs no GPU and no TensorRT.

The operators, versions and limits come from onnx-tensorrt's operator list and TensorRT's release notes. They were not
tried on an engine here.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypedDict

import onnx
from onnx import TensorProto, helper

# fmt: off
ALLOWED = {
    # arithmetic
    "Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Reciprocal", "Neg", "Erf", "Sin", "Cos", "Exp", "Sigmoid", "Tanh",
    "Gelu", "Softmax", "Clip", "Min", "Max", "ReduceMean", "ReduceMax",
    # layers
    "MatMul", "Gemm", "Conv", "Resize", "InstanceNormalization", "GroupNormalization", "LayerNormalization",
    "Attention",
    # shapes
    "Reshape", "Transpose", "Concat", "Split", "Slice", "Gather", "GatherND", "Unsqueeze", "Squeeze", "Expand",
    "Shape", "Pad", "Cast", "Identity", "Constant", "ConstantOfShape", "Range",
    # logic
    "Where", "Loop", "ArgMax", "Trilu", "Greater", "Less", "GreaterOrEqual", "LessOrEqual", "Equal", "And", "Or",
    "Not",
}
# fmt: on
# First TensorRT version whose parser reads an operator that opset 21 or later brought; 10.0 reads all the others.
SINCE = {"GroupNormalization": (10, 9), "Attention": (10, 14)}
# First TensorRT version for each last opset that a version reads. The operator lists of 10.0 and 10.15 end at opsets 20
# and 24; the versions between follow from the operators above.
OPSETS = {20: (10, 0), 22: (10, 9), 23: (10, 14), 24: (10, 15)}
_TYPES = {
    TensorProto.DataType.Value(name)
    for name in ("FLOAT", "FLOAT16", "BFLOAT16", "INT32", "INT64", "INT8", "UINT8", "BOOL")
}
# Attributes of Resize, with their defaults and the values that TensorRT supports.
_RESIZE: dict[str, tuple[int | bytes, set[int | bytes]]] = {
    "antialias": (0, {0}),
    "mode": (b"nearest", {b"nearest", b"linear"}),
    "coordinate_transformation_mode": (
        b"half_pixel",
        {b"half_pixel", b"pytorch_half_pixel", b"tf_half_pixel_for_nn", b"asymmetric", b"align_corners"},
    ),
    "keep_aspect_ratio_policy": (b"stretch", {b"stretch"}),
}
_DATA_LIMIT_BYTES = 2**31
_SHAPE_BYTES = 1024  # a tensor that holds a shape is far smaller


class Readiness(TypedDict):
    """Result of the static TensorRT check of one graph.

    ready: True where there is no problem.
    problems: one line each.
    opset: version of the standard ONNX operators.
    minimum_tensorrt: first TensorRT version that reads the graph.
    operators: how often each operator occurs, bodies of Loops included.
    """

    ready: bool
    problems: list[str]
    opset: int
    minimum_tensorrt: str
    operators: dict[str, int]


def check_readiness(path: Path) -> Readiness:
    """Check a graph for TensorRT without running it.

    Args:
        path: path of the graph; its data file lies beside it and is not read.
    """
    model = onnx.load(str(path), load_external_data=False)
    problems = []
    opset = 0
    for domain in model.opset_import:
        if domain.domain not in ("", "ai.onnx"):
            problems.append(f"operators of the domain {domain.domain}")
        else:
            opset = domain.version
    if model.functions:
        problems.append(f"{len(model.functions)} local functions")
    if model.ir_version > 10:
        problems.append(f"IR version {model.ir_version} above 10")
    counts: dict[str, int] = {}
    for node in _nodes(model.graph):
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    problems += [f"operator {name} ({counts[name]} times)" for name in sorted(counts.keys() - ALLOWED)]
    listed = next((since for last, since in OPSETS.items() if opset <= last), None)
    if listed is None:
        problems.append(f"opset {opset} above {max(OPSETS)}")
    version = max([listed or max(OPSETS.values()), *(SINCE[name] for name in counts if name in SINCE)])
    problems += _attribute_problems(model)
    problems += _data_problems(path, model)
    problems += _shape_problems(model)
    return {
        "ready": not problems,
        "problems": problems,
        "opset": opset,
        "minimum_tensorrt": ".".join(str(part) for part in version),
        "operators": dict(sorted(counts.items())),
    }


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield a graph and the graphs inside it: bodies of Loops, branches of Ifs."""
    yield graph
    for node in graph.node:
        for body in _bodies(node):
            yield from _graphs(body)


def _bodies(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH]


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for one in _graphs(graph):
        yield from one.node


def _attribute_problems(model: onnx.ModelProto) -> list[str]:
    """Return the uses of allowed operators that TensorRT does not support."""
    problems = []
    constants = {tensor.name for graph in _graphs(model.graph) for tensor in graph.initializer}
    constants |= {node.output[0] for node in _nodes(model.graph) if node.op_type == "Constant"}
    for node in _nodes(model.graph):
        if node.op_type == "Resize":
            found = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
            for name, (default, allowed) in _RESIZE.items():
                value = found.get(name, default)
                if value not in allowed:
                    shown = value.decode() if isinstance(value, bytes) else value
                    problems.append(f"Resize {node.name}: {name} {shown}")
        # A Loop's inputs are the trip count, the condition and its states. Outputs beyond the states are scan outputs,
        # which grow with every trip.
        if node.op_type == "Loop" and len(node.output) > len(node.input) - 2 and node.input[0] not in constants:
            problems.append(f"Loop {node.name}: scan output {node.output[-1]} of dynamic length")
    return problems


def _data_problems(path: Path, model: onnx.ModelProto) -> list[str]:
    """Return tensors of 2 GiB or more or of unsupported types, and external data not in one file beside the graph."""
    problems, locations = [], set()
    for tensor in (tensor for graph in _graphs(model.graph) for tensor in graph.initializer):
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if tensor.data_location == TensorProto.EXTERNAL:
            locations.add(entries["location"])
            if int(entries.get("length", 0)) >= _DATA_LIMIT_BYTES:
                problems.append(f"initializer {tensor.name} of 2 GiB or more")
        if tensor.data_type not in _TYPES:
            problems.append(f"initializer {tensor.name} in {_type_name(tensor.data_type)}")
    if len(locations) > 1:
        problems.append(f"{len(locations)} data files")
    for location in locations:
        if Path(location).name != location or not (path.parent / location).is_file():
            problems.append(f"data file {location} is not beside the graph")
    return problems


def _shape_problems(model: onnx.ModelProto) -> list[str]:
    """Return failures of shape inference, values of unknown rank or unsupported type, and unnamed output sizes."""
    for tensor in (tensor for graph in _graphs(model.graph) for tensor in graph.initializer):
        if len(tensor.raw_data) > _SHAPE_BYTES:
            # Shape inference reads no weights but would copy them several times.
            onnx.external_data_helper.set_external_data(tensor, "weights")
            tensor.ClearField("raw_data")
    problems = _value_problems(model, model.graph, {}, {})
    free = {d.dim_param for value in model.graph.input for d in value.type.tensor_type.shape.dim if d.dim_param}
    for value in model.graph.output:
        if value.name in ("out_sample", "out_latents"):
            problems += [
                f"{value.name}: dimension {d.dim_param} is not a dimension of an input"
                for d in value.type.tensor_type.shape.dim
                if d.dim_param and d.dim_param not in free
            ]
    return problems


def _value_problems(
    model: onnx.ModelProto,
    graph: onnx.GraphProto,
    values: Mapping[str, onnx.ValueInfoProto],
    constants: Mapping[str, TensorProto],
) -> list[str]:
    """Return the problems of the values of a graph and of the graphs inside it.

    Each graph is inferred by itself, because inference inside a model does not see the constants around a body.

    Args:
        model: model that holds the graph.
        graph: the model's own graph, or the body of one of its nodes.
        values: values outside a body, by name; empty for the model's own graph.
        constants: constants outside a body, by name; empty for the model's own graph.
    """
    taken = {name for node in _nodes(graph) for name in node.input}
    around = [value for name, value in values.items() if name in taken]
    lifted = onnx.GraphProto()
    lifted.CopyFrom(graph)
    lifted.input.extend(around)
    lifted.initializer.extend(tensor for name, tensor in constants.items() if name in taken)
    alone = helper.make_model(lifted, opset_imports=model.opset_import, ir_version=model.ir_version)
    try:
        inferred = onnx.shape_inference.infer_shapes(alone, strict_mode=True, data_prop=True).graph
    except onnx.shape_inference.InferenceError as error:
        return [f"shape inference fails: {str(error).splitlines()[0]}"]
    found = {value.name: value for value in (*inferred.input, *inferred.value_info, *inferred.output)}
    problems = []
    for node in inferred.node:
        for name in node.output:
            kind = found[name].type.tensor_type if name in found else None
            if name and (kind is None or not kind.HasField("shape")):
                problems.append(f"{node.op_type} {node.name}: the rank of {name} is unknown")
            elif name and kind is not None and kind.elem_type not in _TYPES:
                problems.append(f"{node.op_type} {node.name} computes in {_type_name(kind.elem_type)}")
        for body in _bodies(node):
            tensors = {**constants, **{tensor.name: tensor for tensor in graph.initializer}}
            problems += _value_problems(model, body, {**values, **found}, tensors)
    return problems


def _type_name(data_type: int) -> str:
    return "float64" if data_type == TensorProto.DOUBLE else TensorProto.DataType.Name(data_type).lower()
