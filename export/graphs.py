"""From a module to an ONNX file: trace, convert, name the dimensions, and strip what only the tracer needs."""

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from torch.export import ExportedProgram

from d2f_fast.errors import RefusedInputError
from d2f_fast.export.wrappers import Component, example_sizes

# Below this a graph and its weights stay in one file; protobuf itself ends at 2 GiB.
INLINE_LIMIT_BYTES = 1_500_000_000
DATA_SUFFIX = ".data"
# ONNX infers no type of what these give: it stays in the file, sizes that are free left open.
_WITHOUT_INFERENCE = {"GroupNormalization", "Attention"}
OWN_NAMESPACE = "d2f_fast"


def convert(component: Component, opset: int, sizes: dict[str, int] | None = None) -> onnx_ir.Model:
    """ONNX model of a component.

    Args:
        component: its module in evaluation mode, on the CPU.
        opset: 20, or 23 for nodes that TensorRT fuses itself (GroupNormalization, Attention).
        sizes: fixed size of every named dimension; None leaves them to the run time.

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
    """Exported program of a component, with every named dimension free unless `sizes` fixes it."""
    example = component.make_inputs(sizes or example_sizes(component), seed=0)
    with torch.no_grad():
        return torch.export.export(
            component.module, tuple(example.values()), dynamic_shapes=None if sizes else _dynamic_shapes(component)
        )


def save(model: onnx_ir.Model, path: Path, external: bool) -> None:
    """Write the model, its weights beside it in one `NAME.data` file where asked or where they are large."""
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    data = f"{path.name}{DATA_SUFFIX}" if external or weights > INLINE_LIMIT_BYTES else None
    onnx_ir.save(model, path, external_data=data)


def _dynamic_shapes(component: Component) -> tuple[Any, ...]:
    named: dict[str, Any] = {}
    for port in component.inputs:
        for name in port.dims:
            if not isinstance(name, str) or name in named:
                continue
            step, limit = component.multiples.get(name, 1), component.limits.get(name)
            # A multiple of a symbol, so that the sizes going in and coming out are the same expression.
            dim = torch.export.Dim(f"{name}_steps" if step > 1 else name, max=limit)
            named[name] = step * dim if step > 1 else dim
    return tuple(
        {i: named[d] for i, d in enumerate(port.dims) if isinstance(d, str)} or None for port in component.inputs
    )


def _tidy(model: onnx_ir.Model, component: Component, sizes: dict[str, int] | None) -> None:
    """Name the free dimensions, and drop the tracer's symbols, source paths and stack traces."""
    for values, ports in ((model.graph.inputs, component.inputs), (model.graph.outputs, component.outputs)):
        for value, port in zip(values, ports, strict=True):
            traced = value.shape
            assert traced is not None and len(traced) == len(port.dims), f"{port.name}: {traced}"
            # A size that the tracer found fixed (a static export, or one implied by another) stays a number.
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
    for node in program.graph.nodes:
        if node.op == "call_function" and getattr(node.target, "namespace", "") == OWN_NAMESPACE:
            raise RefusedInputError(_no_form(f"{node.target}", node))


def _without_onnx_form(program: ExportedProgram, error: BaseException) -> RefusedInputError:
    """The refusal for a conversion that failed: the operator and its module, as far as the exception tells."""
    cause: BaseException | None = error
    while cause is not None:
        found = re.search(r"node %(\S+) .*?target=torch\.ops\.([\w.]+)", str(cause))
        if found:
            name, target = found.groups()
            operator = target.split(".")[1]
            for node in program.graph.nodes:
                if node.name == name or operator in str(node.target):
                    return RefusedInputError(_no_form(str(node.target), node))
            return RefusedInputError(f"operator {target} has no ONNX form")
        cause = cause.__cause__
    return RefusedInputError(f"the model cannot be converted: {str(error).splitlines()[0]}")


def _no_form(target: str, node: Any) -> str:
    modules = list(node.meta.get("nn_module_stack", {}).values())
    module = modules[-1][0] if modules else "?"
    name, _, overload = target.rpartition(".")
    return (
        f"operator {(name if overload == 'default' else target).replace('.', '::', 1)} has no ONNX form (module"
        f" {module or 'the model itself'}): call plain torch there when torch.compiler.is_exporting()"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the tracer says of itself; errors are exceptions."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
