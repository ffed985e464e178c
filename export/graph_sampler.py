"""Take the steps of a table with the graphs of an export, in one call or one at a time. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnxruntime

from d2f_fast.errors import RefusedInputError
from d2f_fast.export.exported_files import TABLE_INPUTS
from d2f_fast.export.sessions import Array, GraphSessions

Form = Literal["loop", "folder", "unrolled"]


@dataclass(frozen=True)
class Conditions:
    """Conditions of the network, and how strongly guidance compares them.

    Args:
        positive: text condition of B images, by the network's names.
        negative: text condition to steer away from; None where the network is evaluated on the positive one alone.
        guidance_scale: scale of the guidance by text, at least 1.
        image_latents: latents of the image that the network sees, [B, C, h, w]; None for a network that sees none.
        image_guidance_scale: scale of the guidance by image, at least 1.
    """

    positive: Mapping[str, Array]
    negative: Mapping[str, Array] | None = None
    guidance_scale: float = 1.0
    image_latents: Array | None = None
    image_guidance_scale: float = 1.0


class GraphSampler:
    """Sample latents with the graphs of an export.

    Args:
        graphs: sessions of the graphs.
        report: content of export.json.
        form: "loop", "folder" or "unrolled"; see `ExportedPipeline`.
        context_first: whether the latents of an image come before the network's own along the channels.
    """

    def __init__(self, graphs: GraphSessions, report: Mapping[str, Any], form: Form, context_first: bool) -> None:
        self.graphs, self.form, self.context_first = graphs, form, context_first
        self._static, self._unroll = report["static"], report["unroll"]
        # Reports of earlier versions have no entry for the guidance by image.
        self.built = 1 + bool(report["guidance"]) + bool(report.get("image_guidance"))

    def copies(self, guidance_scale: float, image_guidance_scale: float) -> int:
        """Return the number of conditions on which the network is evaluated at once for two scales.

        Raises:
            RefusedInputError: the graphs were exported without this guidance.
        """
        needed = 3 if image_guidance_scale > 1 else 2 if guidance_scale > 1 else 1
        if needed > self.built and (self.form != "folder" or self._static):
            if needed == 3:
                other = "" if self._static else ", or choose the form folder"
                raise RefusedInputError(
                    "this sampler was exported without guidance by image: image_guidance_scale must be 1, got"
                    f" {image_guidance_scale}; export with --image_guidance{other}"
                )
            raise RefusedInputError(
                f"this sampler was exported without guidance: guidance_scale must be 1, got {guidance_scale}"
            )
        # A network of fixed sizes takes all copies, whatever the scales; so does a sampler written out.
        return self.built if self._static or self.form == "unrolled" else needed

    def run(self, state: Array, given: Conditions, table: Mapping[str, Array], copies: int) -> dict[str, Array]:
        """Take all steps of a table, and return the last state, "out_latents", or its "image" in [0, 1].

        Args:
            state: diffusion state before the first step, [B, C, h, w] float32.
            given: conditions of the network.
            table: timesteps, coef_x and coef_out of the steps.
            copies: number of conditions on which the network is evaluated at once; see `copies`.

        Raises:
            RefusedInputError: the graph takes another number of steps.
        """
        if self.form == "folder" or copies != self.built:
            return {"out_latents": self.step_by_step(state, given, table, copies)}
        feed = {"latents": state, **given.positive, **table}
        if given.image_latents is not None:
            feed["image_latents"] = given.image_latents
        if given.negative is not None:
            feed |= {f"negative_{name}": value for name, value in given.negative.items()}
            feed["guidance_scale"] = np.asarray(given.guidance_scale, np.float32)
        if copies > 2:
            feed["image_guidance_scale"] = np.asarray(given.image_guidance_scale, np.float32)
        graph, steps = "unet/sampler.onnx", len(table["timesteps"])
        if self.form == "unrolled":
            graph = f"unet/sampler_{self._unroll}.onnx"
            if steps != self._unroll:
                raise RefusedInputError(
                    f"{graph} takes {self._unroll} steps, got {steps}: choose the form loop for other numbers"
                )
        (name,) = [output.name for output in self.graphs.session(graph).get_outputs()]
        return {name: self.graphs.run(graph, feed)[0]}

    def step_by_step(self, state: Array, given: Conditions, table: Mapping[str, Array], copies: int) -> Array:
        """Take the steps of a table one by one; the text stays on the device from the first to the last.

        Args:
            state, given, table, copies: as for `run`.
        """
        graph = "unet/model.onnx"
        session = self.graphs.session(graph)
        binding = session.io_binding()
        device = "cuda" if session.get_providers()[0] != "CPUExecutionProvider" else "cpu"
        for name, value in given.positive.items():
            texts = [value] if given.negative is None else [given.negative[name]] * (copies - 1) + [value]
            binding.bind_ortvalue_input(
                name, onnxruntime.OrtValue.ortvalue_from_numpy(np.concatenate(texts), device, 0)
            )
        images = None
        if given.image_latents is not None:
            seen = [given.image_latents] * min(copies, 2)
            images = np.concatenate([np.zeros_like(given.image_latents)] * (copies - len(seen)) + seen)
        for timestep, coef_x, coef_out in zip(*(table[name] for name in TABLE_INPUTS), strict=True):
            sample = np.concatenate([state] * copies)
            if images is not None:
                sample = np.concatenate([images, sample] if self.context_first else [sample, images], 1)
            binding.bind_cpu_input("sample", sample)
            binding.bind_cpu_input("timestep", np.asarray(timestep))
            binding.bind_output("out_sample", "cpu")
            with self.graphs.named(graph):
                session.run_with_iobinding(binding)
            outputs = np.split(binding.copy_outputs_to_cpu()[0], copies)
            output = outputs[-1]
            if copies > 1:
                output = outputs[-2] + np.float32(given.guidance_scale) * (outputs[-1] - outputs[-2])
            if copies > 2:
                output = output + np.float32(given.image_guidance_scale - 1) * (outputs[1] - outputs[0])
            state = coef_x * state + coef_out * output
        return state
