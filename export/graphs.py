"""Turn a module into an ONNX file: trace, convert, name the dimensions, and remove what only the tracer needs."""

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import onnx_ir
import torch
from torch.export import Dim, ExportedProgram
from torch.fx import Node

from d2f_fast.errors import RefusedInputError
from d2f_fast.export.wrappers import Component, example_sizes

# A graph with fewer bytes of weights is one file together with them; protobuf itself allows 2 GiB.
INLINE_LIMIT_BYTES = 1_500_000_000
DATA_SUFFIX = ".data"
# ONNX cannot infer the output types of these operators, so that they stay in the file, without sizes that are free.
_WITHOUT_INFERENCE = {"GroupNormalization", "Attention"}
OWN_NAMESPACE = "d2f_fast"


def convert(component: Component, opset: int, sizes: dict[str, int] | None = None) -> onnx_ir.Model:
    """Convert a component to an ONNX model.

    Args:
        component: component whose module is in evaluation mode and on the CPU.
        opset: ONNX opset: 20, or 23 for GroupNormalization and Attention as single nodes, which TensorRT fuses.
        sizes: fixed size of every named dimension; None leaves all of them free.

    Raises:
        RefusedInputError: an operator has no ONNX form; the message names it and the module that calls it.
    """
    with _quiet():
        program = trace(component, sizes)
        _refuse_own_operators(program)
        try:
            converted = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=[port.name for port in component.inputs],
                output_names=[port.name for port in component.outputs],
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise _without_onnx_form(program, error) from error
    assert converted is not None
    model = converted.model
    _tidy(model, component, sizes)
    return model


def trace(component: Component, sizes: dict[str, int] | None = None) -> ExportedProgram:
    """Trace a component with torch.export.

    Args:
        component: component whose module is in evaluation mode and on the CPU.
        sizes: fixed size of every named dimension; None leaves all of them free.
    """
    example = component.make_inputs(sizes or example_sizes(component), seed=0)
    with torch.no_grad():
        return torch.export.export(
            component.module, tuple(example.values()), dynamic_shapes=None if sizes else _dynamic_shapes(component)
        )


def save(model: onnx_ir.Model, path: Path, external: bool) -> None:
    """Write a model to a file.

    Args:
        model: model to write.
        path: path of the graph.
        external: Write the weights to `<path>.data` beside the graph. Weights above 1.5 GB go there in any case.
    """
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    data = f"{path.name}{DATA_SUFFIX}" if external or weights > INLINE_LIMIT_BYTES else None
    onnx_ir.save(model, path, external_data=data)


_DynamicShapes: TypeAlias = "tuple[dict[int, Dim] | None, ...]"


def _dynamic_shapes(component: Component) -> _DynamicShapes:
    """Return the free dimensions of each input, as torch.export takes them."""
    named: dict[str, Dim] = {}
    for port in component.inputs:
        for name in port.dims:
            if not isinstance(name, str) or name in named:
                continue
            step, limit = component.multiples.get(name, 1), component.limits.get(name)
            # A multiple of a symbol makes the sizes of inputs and outputs the same expression.
            dim = torch.export.Dim(f"{name}_steps" if step > 1 else name, max=limit)
            named[name] = step * dim if step > 1 else dim
    return tuple(
        {i: named[d] for i, d in enumerate(port.dims) if isinstance(d, str)} or None for port in component.inputs
    )


def _tidy(model: onnx_ir.Model, component: Component, sizes: dict[str, int] | None) -> None:
    """Name the free dimensions, and remove the tracer's symbols, source paths and stack traces."""
    for values, ports in ((model.graph.inputs, component.inputs), (model.graph.outputs, component.outputs)):
        for value, port in zip(values, ports, strict=True):
            traced = value.shape
            assert traced is not None and len(traced) == len(port.dims), f"{port.name}: {traced}"
            # A size that the tracer found to be fixed, by a static export or by another size, stays a number.
            value.shape = onnx_ir.Shape(
                [size if isinstance(size, int) else name for size, name in zip(traced, port.dims, strict=True)]
            )
    named = {id(value) for value in (*model.graph.inputs, *model.graph.outputs)}
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if id(value) in named:
                continue
            if node.op_type in _WITHOUT_INFERENCE and value.shape is not None:
                value.shape = onnx_ir.Shape([size if isinstance(size, int) else None for size in value.shape])
            else:
                value.shape, value.type = None, None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.doc_string = model.doc_string = None
    model.graph.name = component.name
    model.producer_name = "d2f_fast"


def _refuse_own_operators(program: ExportedProgram) -> None:
    """Refuse this package's custom operators, which no ONNX runtime knows."""
    for node in program.graph.nodes:
        if node.op == "call_function" and getattr(node.target, "namespace", "") == OWN_NAMESPACE:
            raise RefusedInputError(_no_form(f"{node.target}", node))


def _without_onnx_form(program: ExportedProgram, error: BaseException) -> RefusedInputError:
    """Make the refusal of a failed conversion, with the operator and its module where the exception names them."""
    cause: BaseException | None = error
    while cause is not None:
        found = re.search(r"node %(\S+) .*?target=torch\.ops\.([\w.]+)", str(cause))
        if found:
            name, target = found.groups()
            operator = target.split(".")[1]
            for node in program.graph.nodes:
                if node.name == name or operator in str(node.target):
                    return RefusedInputError(_no_form(str(node.target), node))
            return RefusedInputError(f"operator {target} has no ONNX form: leave its component out")
        cause = cause.__cause__
    reason = str(error).splitlines()[0]
    return RefusedInputError(f"the model cannot be converted ({reason}): leave its component out")


def _no_form(target: str, node: Node) -> str:
    """Write the message for an operator without an ONNX form, with the module that calls it."""
    modules = list(node.meta.get("nn_module_stack", {}).values())
    module = modules[-1][0] if modules else "?"
    name, _, overload = target.rpartition(".")
    return (
        f"operator {(name if overload == 'default' else target).replace('.', '::', 1)} has no ONNX form (module"
        f" {module or 'the model itself'}): call plain torch there when torch.compiler.is_exporting()"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the tracer's log and warnings; errors are exceptions and pass."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
