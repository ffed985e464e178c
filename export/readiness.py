"""Whether TensorRT's parser can take a graph, as far as the graph alone tells: no GPU and no TensorRT are needed.

The operators, versions and limits are those of onnx-tensorrt's operator list and TensorRT's release notes, not tried on
an engine here.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

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
    version = max([(10, 0), *(SINCE[name] for name in counts if name in SINCE)])
    if opset > 20:
        version = max(version, (10, 9))
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


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _nodes(attribute.g)


def _data_problems(path: Path, model: onnx.ModelProto) -> list[str]:
    """External data must be one file beside the graph; every tensor below 2 GiB and of a type that TensorRT has."""
    problems, locations = [], set()
    for tensor in model.graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if tensor.data_location == TensorProto.EXTERNAL:
            locations.add(entries["location"])
            if int(entries.get("length", 0)) >= _DATA_LIMIT_BYTES:
                problems.append(f"initializer {tensor.name} of 2 GiB or more")
        if tensor.data_type == TensorProto.DOUBLE:
            problems.append(f"initializer {tensor.name} in float64")
    if len(locations) > 1:
        problems.append(f"{len(locations)} data files")
    for location in locations:
        if Path(location).name != location or not (path.parent / location).is_file():
            problems.append(f"data file {location} is not beside the graph")
    return problems


def _shape_problems(model: onnx.ModelProto) -> list[str]:
    """Shape inference must pass and leave no value without a rank, and none in float64."""
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) > _SHAPE_BYTES:
            # Inference reads no weights, but copies them several times.
            onnx.external_data_helper.set_external_data(tensor, "weights")
            tensor.ClearField("raw_data")
    try:
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        return [f"shape inference fails: {str(error).splitlines()[0]}"]
    known = {value.name: value.type.tensor_type for value in (*inferred.graph.value_info, *inferred.graph.output)}
    problems = []
    for node in inferred.graph.node:
        for name in node.output:
            if name and (name not in known or not known[name].HasField("shape")):
                problems.append(f"{node.op_type} {node.name}: the rank of {name} is unknown")
            elif name and known[name].elem_type == TensorProto.DOUBLE:
                problems.append(f"{node.op_type} {node.name} computes in float64")
    free = {d.dim_param for value in model.graph.input for d in value.type.tensor_type.shape.dim if d.dim_param}
    for value in model.graph.output:
        if value.name in ("out_sample", "out_latents"):
            problems += [
                f"{value.name}: dimension {d.dim_param} is none of the inputs'"
                for d in value.type.tensor_type.shape.dim
                if d.dim_param and d.dim_param not in free
            ]
    return problems
