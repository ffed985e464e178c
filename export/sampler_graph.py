"""The whole few-step sampler as one graph: an ONNX Loop around the network, sharing the network's weight file.

    sample' = A_k * sample + B_k * output,   output = uncond + guidance_scale * (cond - uncond)

An Euler step in flow time is linear on the diffusion state (`euler_coefficients`), so a schedule, a number of steps and
a prediction type are three vectors of K numbers: the times that the network is fed, A and B. They are inputs of the
graph, computed in float64 here and rounded once. The state starts as plain N(0, 1) noise at t = 0.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, ValueInfoProto, helper

from d2f_fast.flow.alignment import Alignment

TABLE_INPUTS = ("timesteps", "coef_x", "coef_out")


@dataclass(frozen=True)
class StepTable:
    """Everything that a sampler of K steps needs to know of the alignment.

    Args:
        times: flow times of the nodes, [K + 1], 0 … 1.
        timesteps: diffusion times that the network is fed, [K], fractional.
        coef_x, coef_out: A and B of the steps, [K].
        alphas, noise_scales: weights of latents and noise in the state at the nodes, [K + 1].
        sigmas: for a stock scheduler's `set_timesteps(sigmas=…)`, [K + 1], ending in 0.
    """

    times: list[float]
    timesteps: list[float]
    coef_x: list[float]
    coef_out: list[float]
    alphas: list[float]
    noise_scales: list[float]
    sigmas: list[float]

    def feed(self) -> dict[str, np.ndarray[Any, Any]]:
        """The sampler's table inputs."""
        return {name: np.asarray(getattr(self, name), np.float32) for name in TABLE_INPUTS}


def step_table(alignment: Alignment, steps: int) -> StepTable:
    """Table of an Euler sampler with uniform nodes in flow time, computed in float64."""
    nodes = alignment.times(steps).double()
    a, b = alignment.euler_coefficients(nodes[:-1], nodes[1:])
    n = alignment.state_scale(nodes)
    return StepTable(
        times=nodes.tolist(),
        timesteps=alignment.timestep(nodes[:-1]).tolist(),
        coef_x=a.tolist(),
        coef_out=b.tolist(),
        alphas=(nodes / n).tolist(),
        noise_scales=((1 - nodes) / n).tolist(),
        sigmas=alignment.sigmas(steps),
    )


def write_tables(path: Path, tables: Mapping[int, StepTable]) -> None:
    """Write `steps.json`: the tables by number of steps."""
    path.write_text(json.dumps({str(steps): asdict(table) for steps, table in tables.items()}, indent=1) + "\n")


def write_sampler(
    path: Path, unet: Path, *, guidance: bool, unroll: int = 0, vae: Path | None = None, scaling: Mapping[str, Any]
) -> None:
    """Write the sampler of an exported network.

    Args:
        path: in the network's own folder, so that it can share the weight file.
        unet: the network's graph, with its weights in `NAME.data` beside it.
        guidance: take a negative condition and a guidance_scale, and call the network on both at once.
        unroll: number of steps to write out in place of the Loop.
        vae: the decoder's graph, to give `image` in [0, 1] in place of `out_latents`.
        scaling: the autoencoder's configuration: scaling_factor, shift_factor.
    """
    network = onnx.load(str(unet), load_external_data=False)
    ports = {value.name: value for value in network.graph.input}
    in_channels, out_channels = _channels(ports["sample"]), _channels(network.graph.output[0])
    if in_channels != out_channels:
        raise ValueError(f"the network takes {in_channels} channels and gives {out_channels}: it needs another sampler")
    conditions = [name for name in ports if name not in ("sample", "timestep")]
    inputs = [_like(ports["sample"], "latents", guidance)]
    inputs += [_like(ports[name], name, guidance) for name in conditions]
    if guidance:
        inputs += [_like(ports[name], f"negative_{name}", guidance) for name in conditions]
        inputs.append(helper.make_tensor_value_info("guidance_scale", TensorProto.FLOAT, []))
    inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, [unroll or "steps"]) for name in TABLE_INPUTS]
    nodes = [
        helper.make_node("Concat", [f"negative_{name}", name], [f"d2f/{name}"], axis=0)
        if guidance
        else helper.make_node("Identity", [name], [f"d2f/{name}"])
        for name in conditions
    ]
    constants: list[TensorProto] = []
    given = {name: f"d2f/{name}" for name in conditions}
    if unroll:
        state = "latents"
        for k in range(unroll):
            prefix = f"d2f/step{k}/"
            constants.append(helper.make_tensor(f"{prefix}index", TensorProto.INT64, [], [k]))
            nodes += _step(network.graph, given, state, f"{prefix}index", guidance, prefix)
            state = f"{prefix}next"
    else:
        nodes += [
            helper.make_node("Shape", ["timesteps"], ["d2f/count_1d"]),
            helper.make_node("Squeeze", ["d2f/count_1d"], ["d2f/count"]),
        ]
        body = helper.make_graph(
            [
                *_step(network.graph, given, "d2f/state", "d2f/index", guidance, "d2f/body/"),
                helper.make_node("Identity", ["d2f/continue"], ["d2f/continue_out"]),
            ],
            "step",
            [
                helper.make_tensor_value_info("d2f/index", TensorProto.INT64, []),
                helper.make_tensor_value_info("d2f/continue", TensorProto.BOOL, []),
                _renamed(inputs[0], "d2f/state"),
            ],
            [
                helper.make_tensor_value_info("d2f/continue_out", TensorProto.BOOL, []),
                _renamed(inputs[0], "d2f/body/next"),
            ],
            value_info=[_renamed(value, f"d2f/body/net/{value.name}") for value in network.graph.value_info],
        )
        nodes.append(helper.make_node("Loop", ["d2f/count", "", "latents"], ["d2f/final"], body=body))
        state = "d2f/final"
    opsets, initializers = list(network.opset_import), list(network.graph.initializer)
    decoded: list[ValueInfoProto] = []
    if vae is None:
        nodes.append(helper.make_node("Identity", [state], ["out_latents"]))
        output = _renamed(inputs[0], "out_latents")
    else:
        decoder = onnx.load(str(vae))
        if decoder.opset_import[0].version != opsets[0].version:
            raise ValueError("the decoder and the network are of different opsets")
        nodes += _decode(decoder.graph, state, scaling, constants)
        initializers += [_prefixed_tensor(tensor, "d2f/vae/") for tensor in decoder.graph.initializer]
        decoded = [_renamed(value, f"d2f/vae/{value.name}") for value in decoder.graph.value_info]
        output = _like(decoder.graph.output[0], "image", False)
        output.type.tensor_type.shape.dim[0].CopyFrom(inputs[0].type.tensor_type.shape.dim[0])
        if not output.type.tensor_type.shape.dim[2].dim_value:
            for axis, name in ((2, "image_height"), (3, "image_width")):
                output.type.tensor_type.shape.dim[axis].dim_param = name
    for i, node in enumerate(nodes):
        node.name = node.name or f"d2f/{node.op_type}_{i}"
    # A Loop may change its state's shape, so inference says nothing of it: said here, for it does not.
    known = [_renamed(inputs[0], "d2f/final")] if not unroll else []
    known += decoded
    for k in range(unroll):
        known += [_renamed(value, f"d2f/step{k}/net/{value.name}") for value in network.graph.value_info]
    graph = helper.make_graph(nodes, "sampler", inputs, [output], [*initializers, *constants], value_info=known)
    model = helper.make_model(
        graph, opset_imports=opsets, ir_version=network.ir_version, producer_name=network.producer_name
    )
    # Not onnx.save: it would look for data to move. What is external stays where it is, in the network's file.
    path.write_bytes(model.SerializeToString())


def _step(
    network: onnx.GraphProto, given: Mapping[str, str], state: str, index: str, guidance: bool, prefix: str
) -> list[NodeProto]:
    """Nodes of one step: from `state` to `{prefix}next`, its coefficients at `index`."""

    def name(word: str) -> str:
        return f"{prefix}{word}"

    gathered = [helper.make_node("Gather", [table, index], [name(table)], axis=0) for table in TABLE_INPUTS]
    sample = name("sample") if guidance else state
    renamed = {**given, "sample": sample, "timestep": name("timesteps")}
    evaluation = prefixed_nodes(network, renamed, name("net/"))
    output = name(f"net/{network.output[0].name}")
    nodes = [*gathered]
    if guidance:
        nodes.append(helper.make_node("Concat", [state, state], [sample], axis=0))
    nodes += evaluation
    if guidance:
        nodes += [
            helper.make_node("Split", [output], [name("uncond"), name("cond")], axis=0, num_outputs=2),
            helper.make_node("Sub", [name("cond"), name("uncond")], [name("direction")]),
            helper.make_node("Mul", ["guidance_scale", name("direction")], [name("scaled")]),
            helper.make_node("Add", [name("uncond"), name("scaled")], [name("guided")]),
        ]
        output = name("guided")
    nodes += [
        helper.make_node("Mul", [name("coef_x"), state], [name("kept")]),
        helper.make_node("Mul", [name("coef_out"), output], [name("moved")]),
        helper.make_node("Add", [name("kept"), name("moved")], [name("next")]),
    ]
    return nodes


def _decode(
    decoder: onnx.GraphProto, state: str, scaling: Mapping[str, Any], constants: list[TensorProto]
) -> list[NodeProto]:
    """Nodes from scaled latents to `image` in [0, 1]."""
    values = {
        "per_scale": 1 / scaling["scaling_factor"],
        "shift": scaling.get("shift_factor") or 0.0,
        "half": 0.5,
        "zero": 0.0,
        "one": 1.0,
    }
    constants += [helper.make_tensor(f"d2f/vae/c/{key}", TensorProto.FLOAT, [], [v]) for key, v in values.items()]

    def constant(key: str) -> str:
        return f"d2f/vae/c/{key}"

    renamed = {decoder.input[0].name: "d2f/vae/c/latents"}
    renamed |= {tensor.name: f"d2f/vae/{tensor.name}" for tensor in decoder.initializer}
    return [
        helper.make_node("Mul", [state, constant("per_scale")], ["d2f/vae/c/unscaled"]),
        helper.make_node("Add", ["d2f/vae/c/unscaled", constant("shift")], ["d2f/vae/c/latents"]),
        *prefixed_nodes(decoder, renamed, "d2f/vae/"),
        helper.make_node("Mul", [f"d2f/vae/{decoder.output[0].name}", constant("half")], ["d2f/vae/c/halved"]),
        helper.make_node("Add", ["d2f/vae/c/halved", constant("half")], ["d2f/vae/c/shifted"]),
        helper.make_node("Clip", ["d2f/vae/c/shifted", constant("zero"), constant("one")], ["image"]),
    ]


def prefixed_nodes(graph: onnx.GraphProto, renamed: Mapping[str, str], prefix: str) -> list[NodeProto]:
    """Copies of a graph's nodes whose own values carry a prefix; `renamed` says what its inputs are called outside.

    Raises:
        ValueError: a node holds a graph of its own, whose names would have to be changed too.
    """
    own = {output: f"{prefix}{output}" for node in graph.node for output in node.output if output}
    names = {**own, **renamed}
    copies = []
    for node in graph.node:
        if any(
            attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for attribute in node.attribute
        ):
            raise ValueError(f"{node.op_type} {node.name} holds a graph of its own")
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.name = f"{prefix}{node.name}"
        copy.input[:] = [names.get(value, value) for value in node.input]
        copy.output[:] = [names.get(value, value) for value in node.output]
        copies.append(copy)
    return copies


def count_nodes(nodes: Iterable[NodeProto]) -> int:
    """Nodes, those inside Loops and Ifs too."""
    return sum(1 + sum(count_nodes(attribute.g.node) for attribute in node.attribute) for node in nodes)


def _channels(value: ValueInfoProto) -> int:
    return int(value.type.tensor_type.shape.dim[1].dim_value)


def _renamed(value: ValueInfoProto, name: str) -> ValueInfoProto:
    copy = ValueInfoProto()
    copy.CopyFrom(value)
    copy.name = name
    return copy


def _like(value: ValueInfoProto, name: str, guidance: bool) -> ValueInfoProto:
    """The value under another name; where the network's fixed batch holds both halves, a half of it."""
    copy = _renamed(value, name)
    batch = copy.type.tensor_type.shape.dim[0] if copy.type.tensor_type.shape.dim else None
    if guidance and batch is not None and batch.dim_value:
        batch.dim_value //= 2
    return copy


def _prefixed_tensor(tensor: TensorProto, prefix: str) -> TensorProto:
    copy = TensorProto()
    copy.CopyFrom(tensor)
    copy.name = f"{prefix}{tensor.name}"
    return copy
