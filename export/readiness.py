"""Whether TensorRT's parser can take a graph, as far as the graph alone tells: no GPU and no TensorRT are needed.

The operators, versions and limits are those of onnx-tensorrt's operator list and TensorRT's release notes, not tried on
an engine here.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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
# First TensorRT whose parser has the operator of opset 21 and above; everything else here is in 10.0.
SINCE = {"GroupNormalization": (10, 9), "Attention": (10, 14)}
# First TensorRT by the last opset that it takes: the operator lists of 10.0 and 10.15 end at 20 and 24; those between
# are told by the operators above.
OPSETS = {20: (10, 0), 22: (10, 9), 23: (10, 14), 24: (10, 15)}
_TYPES = {
    TensorProto.DataType.Value(name)
    for name in ("FLOAT", "FLOAT16", "BFLOAT16", "INT32", "INT64", "INT8", "UINT8", "BOOL")
}
# Attributes of Resize, with their defaults and what TensorRT has of them.
_RESIZE: dict[str, tuple[Any, set[Any]]] = {
    "antialias": (0, {0}),
    "mode": (b"nearest", {b"nearest", b"linear"}),
    "coordinate_transformation_mode": (
        b"half_pixel",
        {b"half_pixel", b"pytorch_half_pixel", b"tf_half_pixel_for_nn", b"asymmetric", b"align_corners"},
    ),
    "keep_aspect_ratio_policy": (b"stretch", {b"stretch"}),
}
_DATA_LIMIT_BYTES = 2**31
_SHAPE_BYTES = 1024  # a tensor that says a shape is smaller by far


def check_readiness(path: Path) -> dict[str, Any]:
    """Static TensorRT check of a graph: {"ready", "problems", "opset", "minimum_tensorrt", "operators"}."""
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


def trtexec_line(graph: str, profiles: Mapping[str, Sequence[Sequence[int]]]) -> str:
    """The command that builds an engine of a graph.

    Args:
        graph: path of the file, relative to the export folder.
        profiles: smallest, usual and largest shape of each input that varies; none for a graph of fixed sizes.
    """
    line = f"trtexec --onnx={graph} --stronglyTyped"
    for i, option in enumerate(("minShapes", "optShapes", "maxShapes")):
        if profiles:
            shapes = (f"{name}:{'x'.join(map(str, shape[i]))}" for name, shape in profiles.items())
            line += f" --{option}={','.join(shapes)}"
    return f"{line} --saveEngine={graph.removesuffix('.onnx')}.engine"


def profiles_of(path: Path, sizes: Mapping[str, Sequence[int]]) -> dict[str, list[list[int]]]:
    """Smallest, usual and largest shape of each input of a graph that has free dimensions.

    Args:
        path: of the graph.
        sizes: the three sizes of each named dimension.
    """
    profiles = {}
    for value in onnx.load(str(path), load_external_data=False).graph.input:
        dims = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        if any(isinstance(d, str) for d in dims):
            profiles[value.name] = [[sizes[d][i] if isinstance(d, str) else d for d in dims] for i in range(3)]
    return profiles


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph, and those within it: bodies of Loops, branches of Ifs."""
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
    """Forms of allowed operators that TensorRT has not."""
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
        # Outputs beyond the states, which come in after the trip count and the condition, are collected over the trips.
        if node.op_type == "Loop" and len(node.output) > len(node.input) - 2 and node.input[0] not in constants:
            problems.append(f"Loop {node.name}: scan output {node.output[-1]} of dynamic length")
    return problems


def _data_problems(path: Path, model: onnx.ModelProto) -> list[str]:
    """External data must be one file beside the graph; every tensor below 2 GiB and of a type that TensorRT has."""
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
    """Shape inference must pass and leave no value without a rank, and none of a type that TensorRT has not."""
    for tensor in (tensor for graph in _graphs(model.graph) for tensor in graph.initializer):
        if len(tensor.raw_data) > _SHAPE_BYTES:
            # Inference reads no weights, but copies them several times.
            onnx.external_data_helper.set_external_data(tensor, "weights")
            tensor.ClearField("raw_data")
    problems = _value_problems(model, model.graph, {}, {})
    free = {d.dim_param for value in model.graph.input for d in value.type.tensor_type.shape.dim if d.dim_param}
    for value in model.graph.output:
        if value.name in ("out_sample", "out_latents"):
            problems += [
                f"{value.name}: dimension {d.dim_param} is none of the inputs'"
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
    """Problems of the values of a graph and of those within it.

    Args:
        model: that the graph is of.
        graph: the model's own, or a body; by itself, as inference in place sees no constants around a body.
        values, constants: around a body.
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
