"""Write the whole few-step sampler as one graph: an ONNX Loop around the network, sharing the network's weight file.

    sample' = A_k * sample + B_k * output,   output = uncond + guidance_scale * (cond - uncond)

The three vectors of K numbers that say where the steps lie (`step_tables`) are inputs of the graph: the timesteps that
the network is fed, A and B. A network that sees images takes their latents, the input `image_latents`, beside the state
in every step. With guidance by image, whose network evaluation `neither` has the negative text and zeros as images,

    output = uncond + guidance_scale * (cond - uncond) + (image_guidance_scale - 1) * (uncond - neither).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import onnx
from onnx import NodeProto, TensorProto, ValueInfoProto, helper

from d2f_fast.export.exported_files import TABLE_INPUTS

IMAGE_LATENTS = "image_latents"  # as diffusers' pipeline of InstructPix2Pix calls them

# Configuration of an autoencoder; only its numbers scaling_factor and shift_factor are read.
Scaling: TypeAlias = Mapping[str, float]


@dataclass(frozen=True)
class Guidance:
    """Guidance that is built into a sampler, and how its network takes images.

    Args:
        text: Take a negative condition and a guidance_scale, and evaluate the network on both conditions at once.
        image: Take an image_guidance_scale, too, and evaluate the network on a third condition, without text and image.
        context_first: whether the latents of images come before the network's own along the channels.
    """

    text: bool = True
    image: bool = False
    context_first: bool = True

    @property
    def copies(self) -> int:
        """Return the number of conditions on which the network is evaluated at once."""
        return 1 + self.text + self.image

    def scales(self, text: float, image: float) -> dict[str, float]:
        """Return the scales of both kinds of guidance, by the names of the sampler's inputs for them."""
        given = {"guidance_scale": (self.text, text), "image_guidance_scale": (self.image, image)}
        return {name: scale for name, (taken, scale) in given.items() if taken}


def write_sampler(
    path: Path, unet: Path, *, guidance: Guidance, unroll: int = 0, vae: Path | None = None, scaling: Scaling
) -> None:
    """Write the sampler of an exported network.

    Args:
        path: path of the sampler, in the network's own folder, so that it can share the weight file.
        unet: path of the network's graph, with its weights in `NAME.data` beside it.
        guidance: guidance to build in, and how the network takes images.
        unroll: Number of steps to write out one after the other; 0 writes a Loop, for any number of steps.
        vae: path of the decoder's graph, to return `image` in [0, 1]; None returns `out_latents`.
        scaling: configuration of the autoencoder; scaling_factor and shift_factor are read where `vae` is given.

    Raises:
        ValueError: the network takes other channels than those of its own latents and of whole images, or the decoder
            has another opset.
    """
    network = onnx.load(str(unet), load_external_data=False)
    ports = {value.name: value for value in network.graph.input}
    in_channels, out_channels = _channels(ports["sample"]), _channels(network.graph.output[0])
    if in_channels % out_channels:
        raise ValueError(
            f"the network takes {in_channels} channels and returns {out_channels}: it needs another sampler"
        )
    conditions = [name for name in ports if name not in ("sample", "timestep")]
    sees_images = in_channels > out_channels
    parts = _Parts(_sampler_inputs(ports, conditions, guidance, unroll, out_channels))
    parts.nodes += _conditions(conditions, guidance, sees_images)
    given = {name: f"d2f/{name}" for name in [*conditions, *[IMAGE_LATENTS] * sees_images]}
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
    ports: Mapping[str, ValueInfoProto], conditions: list[str], guidance: Guidance, unroll: int, channels: int
) -> list[ValueInfoProto]:
    """Return the inputs of the sampler: noise of some channels, conditions, images, scales and the step table."""
    copies = guidance.copies
    inputs = [_like(ports["sample"], "latents", copies)]
    inputs[0].type.tensor_type.shape.dim[1].dim_value = channels
    inputs += [_like(ports[name], name, copies) for name in conditions]
    of_images = _channels(ports["sample"]) - channels
    if of_images:
        inputs.append(_like(ports["sample"], IMAGE_LATENTS, copies))
        inputs[-1].type.tensor_type.shape.dim[1].dim_value = of_images
    if guidance.text:
        inputs += [_like(ports[name], f"negative_{name}", copies) for name in conditions]
    inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, []) for name in guidance.scales(1, 1)]
    inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, [unroll or "steps"]) for name in TABLE_INPUTS]
    return inputs


def _conditions(names: list[str], guidance: Guidance, sees_images: bool) -> list[NodeProto]:
    """Return the nodes that put the conditions of all evaluations of a step into one batch, under `d2f/NAME`."""
    parts = {name: [f"negative_{name}"] * (guidance.copies - 1) + [name] for name in names}
    nodes = []
    if sees_images:
        parts[IMAGE_LATENTS] = [IMAGE_LATENTS] * guidance.copies
        if guidance.image:
            parts[IMAGE_LATENTS][0] = "d2f/no_image"
            nodes.append(helper.make_node("Sub", [IMAGE_LATENTS, IMAGE_LATENTS], ["d2f/no_image"]))
    for name, joined in parts.items():
        if len(joined) > 1:
            nodes.append(helper.make_node("Concat", joined, [f"d2f/{name}"], axis=0))
        else:
            nodes.append(helper.make_node("Identity", joined, [f"d2f/{name}"]))
    return nodes


def _append_steps(
    parts: _Parts, network: onnx.GraphProto, given: Mapping[str, str], guidance: Guidance, count: int
) -> str:
    """Append a number of steps one after the other, and return the name of the last state."""
    state = "latents"
    for k in range(count):
        prefix = f"d2f/step{k}/"
        parts.initializers.append(helper.make_tensor(f"{prefix}index", TensorProto.INT64, [], [k]))
        parts.nodes += _step(network, given, state, f"{prefix}index", guidance, prefix)
        parts.known += [_renamed(value, f"{prefix}net/{value.name}") for value in network.value_info]
        state = f"{prefix}next"
    return state


def _append_loop(parts: _Parts, network: onnx.GraphProto, given: Mapping[str, str], guidance: Guidance) -> str:
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
    output = _like(decoder.graph.output[0], "image", 1)
    dims, own = output.type.tensor_type.shape.dim, parts.latents.type.tensor_type.shape.dim
    dims[0].CopyFrom(own[0])
    for side, latent in zip(dims[2:], own[2:], strict=True):
        if not side.dim_value:  # The decoder says "latent_height * 8" of its input, which is called "height" here.
            _, times, factor = side.dim_param.partition(" * ")
            side.dim_param = f"{latent.dim_param or latent.dim_value}{times}{factor}"
    return output


def _step(
    network: onnx.GraphProto, given: Mapping[str, str], state: str, index: str, guidance: Guidance, prefix: str
) -> list[NodeProto]:
    """Return the nodes of one step, from the value `state` to the value `{prefix}next`.

    Args:
        network: the network's graph.
        given: names of the conditions outside, by the network's names for them, and of the latents of images.
        state: name of the state before the step.
        index: name of the scalar that holds the step's number, which selects its coefficients.
        guidance: guidance of the sampler.
        prefix: prefix of the names of all values in the step.
    """

    def name(word: str) -> str:
        return f"{prefix}{word}"

    nodes = [helper.make_node("Gather", [table, index], [name(table)], axis=0) for table in TABLE_INPUTS]
    sample = state
    if guidance.copies > 1:
        nodes.append(helper.make_node("Concat", [state] * guidance.copies, [name("states")], axis=0))
        sample = name("states")
    conditions = dict(given)
    if (images := conditions.pop(IMAGE_LATENTS, None)) is not None:
        channels = [images, sample] if guidance.context_first else [sample, images]
        nodes.append(helper.make_node("Concat", channels, [name("sample")], axis=1))
        sample = name("sample")
    renamed = {**conditions, "sample": sample, "timestep": name("timesteps")}
    nodes += prefixed_nodes(network, renamed, name("net/"))
    output = name(f"net/{network.output[0].name}")
    if guidance.copies > 1:
        nodes += _guide(output, guidance, prefix)
        output = name("guided")
    nodes += [
        helper.make_node("Mul", [name("coef_x"), state], [name("kept")]),
        helper.make_node("Mul", [name("coef_out"), output], [name("moved")]),
        helper.make_node("Add", [name("kept"), name("moved")], [name("next")]),
    ]
    return nodes


def _guide(output: str, guidance: Guidance, prefix: str) -> list[NodeProto]:
    """Return the nodes from the network's output on all conditions to the value `{prefix}guided`."""

    def name(word: str) -> str:
        return f"{prefix}{word}"

    halves = [name("neither")] * guidance.image + [name("uncond"), name("cond")]
    by_text = name("by_text") if guidance.image else name("guided")
    nodes = [
        helper.make_node("Split", [output], halves, axis=0, num_outputs=guidance.copies),
        helper.make_node("Sub", [name("cond"), name("uncond")], [name("direction")]),
        helper.make_node("Mul", ["guidance_scale", name("direction")], [name("scaled")]),
        helper.make_node("Add", [name("uncond"), name("scaled")], [by_text]),
    ]
    if guidance.image:
        nodes += [
            helper.make_node("Sub", [name("uncond"), name("neither")], [name("to_image")]),
            helper.make_node("Mul", ["image_guidance_scale", name("to_image")], [name("to_image_scaled")]),
            helper.make_node("Sub", [name("to_image_scaled"), name("to_image")], [name("further")]),
            helper.make_node("Add", [by_text, name("further")], [name("guided")]),
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


def _like(value: ValueInfoProto, name: str, copies: int) -> ValueInfoProto:
    """Return a value under another name; a fixed batch is divided by the copies of it that the network takes."""
    copy = _renamed(value, name)
    batch = copy.type.tensor_type.shape.dim[0] if copy.type.tensor_type.shape.dim else None
    if batch is not None and batch.dim_value:
        batch.dim_value //= copies
    return copy


def _prefixed_tensor(tensor: TensorProto, prefix: str) -> TensorProto:
    copy = TensorProto()
    copy.CopyFrom(tensor)
    copy.name = f"{prefix}{tensor.name}"
    return copy
