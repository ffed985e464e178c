"""Write the whole few-step sampler as one graph: an ONNX Loop around the network, sharing the network's weight file.

    sample' = A_k * sample + B_k * output,   output = uncond + guidance_scale * (cond - uncond)

An Euler step in flow time is linear in the diffusion state (`euler_coefficients`). A schedule, a number of steps and a
prediction type therefore come down to three vectors of K numbers: the timesteps that the network is fed, A and B. They
are inputs of the graph, computed here in float64 and rounded once. The state starts as N(0, 1) noise at t = 0.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto, ValueInfoProto, helper

from d2f_fast.flow.flow import Flow

TABLE_INPUTS = ("timesteps", "coef_x", "coef_out")

# Configuration of an autoencoder; only its numbers scaling_factor and shift_factor are read.
Scaling: TypeAlias = Mapping[str, float]


@dataclass(frozen=True)
class StepTable:
    """Everything that a sampler of K steps takes from the flow.

    Args:
        times: flow times of the nodes between steps, [K + 1], from 0 to 1.
        timesteps: fractional timesteps that the network is fed, [K].
        coef_x: factor A of the state in each step, [K].
        coef_out: factor B of the network's output in each step, [K].
        alphas: weight of the latents in the network's state at the nodes, [K + 1].
        noise_scales: weight of the noise in the network's state at the nodes, [K + 1].
        sigmas: sigmas of a stock scheduler at the nodes, [K + 1], ending in 0.
    """

    times: list[float]
    timesteps: list[float]
    coef_x: list[float]
    coef_out: list[float]
    alphas: list[float]
    noise_scales: list[float]
    sigmas: list[float]

    def feed(self) -> dict[str, npt.NDArray[np.float32]]:
        """Return the inputs of the sampler graph that hold the table."""
        return {name: np.asarray(getattr(self, name), np.float32) for name in TABLE_INPUTS}


def step_table(flow: Flow, steps: int, shift: float = 1.0) -> StepTable:
    """Return the table of an Euler sampler with uniform nodes in flow time, computed in float64.

    Args:
        flow: flow that reads the network's output as a velocity.
        steps: number of steps, at least 1.
        shift: positive factor on (1 - t) / t at each node; 1 leaves the nodes uniform.
    """
    nodes = flow.times(steps, shift=shift).double()
    a, b = flow.euler_coefficients(nodes[:-1], nodes[1:])
    n = flow.state_scale(nodes)
    return StepTable(
        times=nodes.tolist(),
        timesteps=flow.timestep(nodes[:-1]).tolist(),
        coef_x=a.tolist(),
        coef_out=b.tolist(),
        alphas=(nodes / n).tolist(),
        noise_scales=((1 - nodes) / n).tolist(),
        sigmas=flow.sigmas(steps, shift),
    )


def write_tables(path: Path, tables: Mapping[int, StepTable]) -> None:
    """Write `steps.json`, which holds step tables by number of steps."""
    path.write_text(json.dumps({str(steps): asdict(table) for steps, table in tables.items()}, indent=1) + "\n")


def write_sampler(
    path: Path, unet: Path, *, guidance: bool, unroll: int = 0, vae: Path | None = None, scaling: Scaling
) -> None:
    """Write the sampler of an exported network.

    Args:
        path: path of the sampler, in the network's own folder, so that it can share the weight file.
        unet: path of the network's graph, with its weights in `NAME.data` beside it.
        guidance: Take a negative condition and a guidance_scale, and call the network on both conditions at once.
        unroll: Number of steps to write out one after the other; 0 writes a Loop, for any number of steps.
        vae: path of the decoder's graph, to return `image` in [0, 1]; None returns `out_latents`.
        scaling: configuration of the autoencoder; scaling_factor and shift_factor are read where `vae` is given.

    Raises:
        ValueError: the network's input and output have different channels, or the decoder has another opset.
    """
    network = onnx.load(str(unet), load_external_data=False)
    ports = {value.name: value for value in network.graph.input}
    in_channels, out_channels = _channels(ports["sample"]), _channels(network.graph.output[0])
    if in_channels != out_channels:
        raise ValueError(
            f"the network takes {in_channels} channels and returns {out_channels}: it needs another sampler"
        )
    conditions = [name for name in ports if name not in ("sample", "timestep")]
    parts = _Parts(_sampler_inputs(ports, conditions, guidance, unroll))
    parts.nodes += [
        helper.make_node("Concat", [f"negative_{name}", name], [f"d2f/{name}"], axis=0)
        if guidance
        else helper.make_node("Identity", [name], [f"d2f/{name}"])
        for name in conditions
    ]
    given = {name: f"d2f/{name}" for name in conditions}
    if unroll:
        state = _append_steps(parts, network.graph, given, guidance, unroll)
    else:
        state = _append_loop(parts, network.graph, given, guidance)
    parts.initializers[:0] = network.graph.initializer
    if vae is None:
        parts.nodes.append(helper.make_node("Identity", [state], ["out_latents"]))
        output = _renamed(parts.latents, "out_latents")
    else:
        output = _append_decoder(parts, onnx.load(str(vae)), state, scaling, network.opset_import[0].version)
    for i, node in enumerate(parts.nodes):
        node.name = node.name or f"d2f/{node.op_type}_{i}"
    graph = helper.make_graph(
        parts.nodes, "sampler", parts.inputs, [output], parts.initializers, value_info=parts.known
    )
    model = helper.make_model(
        graph,
        opset_imports=list(network.opset_import),
        ir_version=network.ir_version,
        producer_name=network.producer_name,
    )
    # onnx.save would look for data to move; external data must stay where it is, in the network's file.
    path.write_bytes(model.SerializeToString())


@dataclass
class _Parts:
    """Parts of the sampler graph while it is put together.

    Args:
        inputs: inputs of the graph, the noise first.
        nodes: nodes in order.
        initializers: constants and weights.
        known: types of values that shape inference cannot find by itself.
    """

    inputs: list[ValueInfoProto]
    nodes: list[NodeProto] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)
    known: list[ValueInfoProto] = field(default_factory=list)

    @property
    def latents(self) -> ValueInfoProto:
        """Return the input that holds the noise; the state has its type and shape."""
        return self.inputs[0]


def _sampler_inputs(
    ports: Mapping[str, ValueInfoProto], conditions: list[str], guidance: bool, unroll: int
) -> list[ValueInfoProto]:
    """Return the inputs of the sampler: noise, conditions, guidance_scale and the step table."""
    inputs = [_like(ports["sample"], "latents", guidance)]
    inputs += [_like(ports[name], name, guidance) for name in conditions]
    if guidance:
        inputs += [_like(ports[name], f"negative_{name}", guidance) for name in conditions]
        inputs.append(helper.make_tensor_value_info("guidance_scale", TensorProto.FLOAT, []))
    inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, [unroll or "steps"]) for name in TABLE_INPUTS]
    return inputs


def _append_steps(parts: _Parts, network: onnx.GraphProto, given: Mapping[str, str], guidance: bool, count: int) -> str:
    """Append a number of steps one after the other, and return the name of the last state."""
    state = "latents"
    for k in range(count):
        prefix = f"d2f/step{k}/"
        parts.initializers.append(helper.make_tensor(f"{prefix}index", TensorProto.INT64, [], [k]))
        parts.nodes += _step(network, given, state, f"{prefix}index", guidance, prefix)
        parts.known += [_renamed(value, f"{prefix}net/{value.name}") for value in network.value_info]
        state = f"{prefix}next"
    return state


def _append_loop(parts: _Parts, network: onnx.GraphProto, given: Mapping[str, str], guidance: bool) -> str:
    """Append a Loop over the steps of the table, and return the name of the last state."""
    body = helper.make_graph(
        [
            *_step(network, given, "d2f/state", "d2f/index", guidance, "d2f/body/"),
            helper.make_node("Identity", ["d2f/continue"], ["d2f/continue_out"]),
        ],
        "step",
        [
            helper.make_tensor_value_info("d2f/index", TensorProto.INT64, []),
            helper.make_tensor_value_info("d2f/continue", TensorProto.BOOL, []),
            _renamed(parts.latents, "d2f/state"),
        ],
        [
            helper.make_tensor_value_info("d2f/continue_out", TensorProto.BOOL, []),
            _renamed(parts.latents, "d2f/body/next"),
        ],
        value_info=[_renamed(value, f"d2f/body/net/{value.name}") for value in network.value_info],
    )
    parts.nodes += [
        helper.make_node("Shape", ["timesteps"], ["d2f/count_1d"]),
        helper.make_node("Squeeze", ["d2f/count_1d"], ["d2f/count"]),
        helper.make_node("Loop", ["d2f/count", "", "latents"], ["d2f/final"], body=body),
    ]
    # A Loop may change the shape of its state, so that inference finds no shape; this one does not change it.
    parts.known.append(_renamed(parts.latents, "d2f/final"))
    return "d2f/final"


def _append_decoder(
    parts: _Parts, decoder: onnx.ModelProto, state: str, scaling: Scaling, opset: int
) -> ValueInfoProto:
    """Append the decoder after the last state, and return the output `image` of the graph."""
    if decoder.opset_import[0].version != opset:
        raise ValueError(f"the decoder has opset {decoder.opset_import[0].version}, the network {opset}")
    parts.nodes += _decode(decoder.graph, state, scaling, parts.initializers)
    parts.initializers += [_prefixed_tensor(tensor, "d2f/vae/") for tensor in decoder.graph.initializer]
    parts.known += [_renamed(value, f"d2f/vae/{value.name}") for value in decoder.graph.value_info]
    output = _like(decoder.graph.output[0], "image", False)
    dims, own = output.type.tensor_type.shape.dim, parts.latents.type.tensor_type.shape.dim
    dims[0].CopyFrom(own[0])
    for side, latent in zip(dims[2:], own[2:], strict=True):
        if not side.dim_value:  # The decoder says "latent_height * 8" of its input, which is called "height" here.
            _, times, factor = side.dim_param.partition(" * ")
            side.dim_param = f"{latent.dim_param or latent.dim_value}{times}{factor}"
    return output


def _step(
    network: onnx.GraphProto, given: Mapping[str, str], state: str, index: str, guidance: bool, prefix: str
) -> list[NodeProto]:
    """Return the nodes of one step, from the value `state` to the value `{prefix}next`.

    Args:
        network: the network's graph.
        given: names of the conditions outside, by the network's names for them.
        state: name of the state before the step.
        index: name of the scalar that holds the step's number, which selects its coefficients.
        guidance: Whether the network is called on the negative and the positive condition at once.
        prefix: prefix of the names of all values in the step.
    """

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


def _decode(decoder: onnx.GraphProto, state: str, scaling: Scaling, constants: list[TensorProto]) -> list[NodeProto]:
    """Return the nodes from scaled latents, the value `state`, to `image` in [0, 1]; append their constants."""
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
    """Return copies of a graph's nodes with a prefix on the names of all values that they compute.

    Args:
        graph: graph whose nodes are copied.
        renamed: names of the graph's inputs outside, by their names inside.
        prefix: prefix of the other names.

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
            raise ValueError(f"{node.op_type} {node.name} holds a graph of its own, which cannot be copied")
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.name = f"{prefix}{node.name}"
        copy.input[:] = [names.get(value, value) for value in node.input]
        copy.output[:] = [names.get(value, value) for value in node.output]
        copies.append(copy)
    return copies


def count_nodes(nodes: Iterable[NodeProto]) -> int:
    """Return the number of nodes, including those inside Loops and Ifs."""
    return sum(1 + sum(count_nodes(attribute.g.node) for attribute in node.attribute) for node in nodes)


def _channels(value: ValueInfoProto) -> int:
    return int(value.type.tensor_type.shape.dim[1].dim_value)


def _renamed(value: ValueInfoProto, name: str) -> ValueInfoProto:
    copy = ValueInfoProto()
    copy.CopyFrom(value)
    copy.name = name
    return copy


def _like(value: ValueInfoProto, name: str, guidance: bool) -> ValueInfoProto:
    """Return a value under another name; with guidance a fixed batch is halved, as the network takes both halves."""
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
