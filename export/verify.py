"""Compare exported graphs in ONNX Runtime with torch, at sizes and times at which they were not traced."""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from torch import Tensor

from d2f_fast.export.sampler_graph import IMAGE_LATENTS, Guidance
from d2f_fast.export.step_tables import StepTable
from d2f_fast.export.wrappers import Component, check_sizes
from d2f_fast.flow.flow import Flow
from d2f_fast.sampling.integrate import Velocity, sample_flow, unet_velocity

GUIDANCE_SCALE, IMAGE_GUIDANCE_SCALE = 1.5, 1.25
# One timestep between two training timesteps, one on a training timestep, and the last.
TIMESTEPS = (673.16, 21.0, 999.0)

Array = npt.NDArray[np.float32]
Arrays = dict[str, Array]  # token ids alone are int64


class VerificationError(RuntimeError):
    """A graph does not compute what torch computes. The command line exits with 1."""

    exit_code = 1


@dataclass(frozen=True)
class Case:
    """Inputs of a graph, and torch's outputs for them in float32.

    Args:
        inputs: inputs by name.
        outputs: outputs by name.
        amplification: how many times larger the error of the outputs may be than that of one network evaluation.
    """

    inputs: Arrays
    outputs: Arrays
    amplification: float = 1.0


class Row(TypedDict):
    """Errors of a graph in one case.

    graph: path of the graph in the export folder.
    sizes: shape of each input of two or more dimensions.
    rms: relative RMS error of the worst output.
    max: largest error of the worst output, relative to the output's RMS.
    amplification: that of the case.
    timestep: timestep of a network evaluation; absent elsewhere.
    steps: number of steps of a sampler; absent elsewhere.
    """

    graph: str
    sizes: dict[str, list[int]]
    rms: float
    max: float
    amplification: float
    timestep: NotRequired[float]
    steps: NotRequired[int]


@torch.no_grad()
def component_cases(component: Component, sizes: dict[str, int] | None = None) -> list[Case]:
    """Return a component's cases at three sizes and timesteps.

    Args:
        component: component in float32.
        sizes: fixed sizes of a static export; None takes three different ones.
    """
    cases = []
    for i, at in enumerate([sizes] * len(TIMESTEPS) if sizes else check_sizes(component)):
        inputs = component.make_inputs(at, seed=i + 1)
        if "timestep" in inputs:
            inputs["timestep"] = torch.tensor(TIMESTEPS[i])
        with exact_convolutions():
            found = component.module(*inputs.values())
        found = found if isinstance(found, tuple) else (found,)
        outputs = {port.name: value for port, value in zip(component.outputs, found, strict=True)}
        cases.append(Case(_arrays(inputs), _arrays(outputs)))
    return cases


@torch.no_grad()
def sampler_cases(
    component: Component,
    flow: Flow,
    tables: Mapping[int, StepTable],
    guidance: Guidance,
    decode: Callable[[Tensor], Tensor] | None = None,
    sizes: dict[str, int] | None = None,
) -> dict[int, Case]:
    """Return a case of the sampler for each number of steps.

    The expected output is that of `sample_flow`, which integrates x_t over flow time and knows no step table.

    Args:
        component: component of the UNet, in float32.
        flow: flow that reads the network's output as a velocity.
        tables: step tables by number of steps.
        guidance: guidance of the sampler, and how its network takes images.
        decode: function from scaled latents to pixels in [-1, 1]; None where the sampler returns latents.
        sizes: sizes of the network's inputs in a static export, with the sampler's own batch; None elsewhere.
    """
    cases: dict[int, Case] = {}
    free = sorted(check_sizes(component), key=lambda at: at["batch"])
    for i, (steps, table) in enumerate(sorted(tables.items(), reverse=True)):
        # The largest number of steps is checked at the smallest batch, to save time.
        given = component.make_inputs(sizes or free[i % len(free)], seed=100 + i)
        negative = component.make_inputs(sizes or free[i % len(free)], seed=200 + i)
        channels: int = component.outputs[0].dims[1]  # type: ignore[assignment]
        latents = torch.randn(
            *(len(given["sample"]), channels, *given["sample"].shape[2:]),
            generator=torch.Generator().manual_seed(300 + i),
        )
        text = given["encoder_hidden_states"]
        images = given["sample"][:, channels:] if given["sample"].shape[1] > channels else None
        extra: dict[str, Tensor] = {name: given[name] for name in ("text_embeds", "time_ids") if name in given}
        inputs = {"latents": latents, "encoder_hidden_states": text, **extra}
        if images is not None:
            inputs[IMAGE_LATENTS] = images
        scales = guidance.scales(GUIDANCE_SCALE, IMAGE_GUIDANCE_SCALE)
        if guidance.text:
            inputs["negative_encoder_hidden_states"] = negative["encoder_hidden_states"]
            inputs |= {f"negative_{name}": negative[name] for name in extra}
        inputs |= {name: torch.tensor(scale) for name, scale in scales.items()}
        added: dict[str, Tensor] = {
            name: torch.cat([negative[name], value]) if guidance.text else value for name, value in extra.items()
        }
        velocity = unet_velocity(
            *(component.module.unet, flow, text, negative["encoder_hidden_states"]),
            added_cond_kwargs=added or None,
            context=images,
            context_first=guidance.context_first,
            **scales,  # type: ignore[arg-type]
        )

        # Times are float64, as in the tables: in float32 a timestep between two training timesteps has three digits.
        def exactly_timed(x_t: Tensor, t: Tensor, velocity: Velocity = velocity) -> Tensor:
            return velocity(x_t, t.double())

        # At the end of the flow, the flow state and the diffusion state are equal: n(1) = 1.
        start = flow.to_flow(latents, torch.tensor(table.times[0], dtype=torch.float64))
        with exact_convolutions():
            final = sample_flow(exactly_timed, start, times=torch.tensor(table.times))
            assert isinstance(final, Tensor)
            outputs = {"out_latents": final} if decode is None else {"image": (decode(final) / 2 + 0.5).clamp(0, 1)}
        amplification = error_amplification(table, **scales)
        cases[steps] = Case(_arrays(inputs) | table.feed(), _arrays(outputs), amplification)
    return cases


def error_amplification(table: StepTable, guidance_scale: float = 1.0, image_guidance_scale: float = 1.0) -> float:
    """Return the factor from a relative error of each network evaluation to that of the final latents, at least 1.

        sum_k |B_k| prod_{j > k} |A_j| * sqrt(g² + (g - h)² + (h - 1)²)

    The first step of an epsilon-prediction divides by alpha, 0.07 in Stable Diffusion, so that one step from pure noise
    multiplies the rounding of any network by 15. How a network responds to a changed state is left out.

    Args:
        table: step table of the sampler.
        guidance_scale: guidance scale g; 1 for none.
        image_guidance_scale: scale h of the guidance by image; 1 for none.
    """
    total = 0.0
    for a, b in zip(table.coef_x, table.coef_out, strict=True):
        total = abs(a) * total + abs(b)
    scales = guidance_scale, guidance_scale - image_guidance_scale, image_guidance_scale - 1
    return max(1.0, total * math.hypot(*scales))


@contextlib.contextmanager
def exact_convolutions() -> Iterator[None]:
    """Make torch compute convolutions as matrix products instead of by oneDNN.

    oneDNN chooses an algorithm by shape, and some round several times as much. The reference would then be further from
    float64 than the graph is: 6e-6 against 1.6e-6 for a decoder of Stable Diffusion 1.5's size at a batch of 3.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the switch warns about settings of other devices
        with torch.backends.mkldnn.flags(enabled=False):
            yield


def check_structure(path: Path) -> None:
    """Check that a file is a valid ONNX model, the types of its operators included.

    Args:
        path: path of the graph. ONNX reads it itself, because a model above 2 GiB cannot be passed in memory.

    Raises:
        VerificationError: the file is not a valid model.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        name = f"{path.parent.name}/{path.name}"
        raise VerificationError(f"{name} is not a valid ONNX model: {str(error).splitlines()[0]}") from error


def open_session(path: Path, threads: int = 0) -> onnxruntime.InferenceSession:
    """Open a graph in ONNX Runtime on the CPU, which every machine has.

    Args:
        path: path of the graph.
        threads: threads of one operator; 0 for one per core.

    Raises:
        VerificationError: the graph does not load.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions share no base class
        raise VerificationError(
            f"{path.parent.name}/{path.name} does not load: {str(error).splitlines()[0]}"
        ) from error


def compare(path: Path, cases: Sequence[Case]) -> list[Row]:
    """Run a graph on its cases, and return a row of errors for each.

    Args:
        path: path of the graph, which `check_structure` has checked.
        cases: inputs and expected outputs.

    Raises:
        VerificationError: the graph does not load, or lacks an input or output.
    """
    session = open_session(path)
    names = [value.name for value in session.get_outputs()]
    taken = {value.name for value in session.get_inputs()}
    rows: list[Row] = []
    for case in cases:
        if taken != set(case.inputs) or set(names) != set(case.outputs):
            raise VerificationError(
                f"{path.parent.name}/{path.name} has inputs {sorted(taken)} and outputs {names}, expected"
                f" {sorted(case.inputs)} and {sorted(case.outputs)}"
            )
        got = dict(zip(names, session.run(None, case.inputs), strict=True))
        errors = [relative_errors(got[name], want) for name, want in case.outputs.items()]
        rows.append(
            {
                "graph": f"{path.parent.name}/{path.name}",
                "sizes": {name: list(value.shape) for name, value in case.inputs.items() if value.ndim > 1},
                "rms": max(rms for rms, _ in errors),
                "max": max(largest for _, largest in errors),
                "amplification": case.amplification,
            }
        )
        if "timestep" in case.inputs:
            rows[-1]["timestep"] = float(case.inputs["timestep"])
        if "timesteps" in case.inputs:
            rows[-1]["steps"] = len(case.inputs["timesteps"])
    return rows


def relative_errors(got: Array, want: Array) -> tuple[float, float]:
    """Return the relative RMS error, and the largest error over the RMS of `want`.

    Both are infinite where the shapes differ or a value is not finite.
    """
    if got.shape != want.shape or not np.isfinite(got).all() or not np.isfinite(want).all():
        return math.inf, math.inf
    difference = got.astype(np.float64) - want.astype(np.float64)
    scale = max(float(np.sqrt(np.mean(want.astype(np.float64) ** 2))), 1e-30)
    return float(np.sqrt(np.mean(difference**2))) / scale, float(np.abs(difference).max()) / scale


def check_rows(rows: Sequence[Row], tolerance: float) -> None:
    """Refuse an export if the RMS error of a row is above the tolerance times the row's amplification.

    Args:
        rows: rows of all graphs.
        tolerance: largest relative RMS error of one network evaluation.

    Raises:
        VerificationError: a row is above; the message has the worst graph, its error and the allowed one.
    """
    worst = max(rows, key=lambda row: row["rms"] / row["amplification"], default=None)
    if worst is not None and not worst["rms"] <= tolerance * worst["amplification"]:
        raise VerificationError(
            f"{worst['graph']} differs from torch by {worst['rms']:.1e} (relative RMS at {worst['sizes']}), allowed is"
            f" {tolerance * worst['amplification']:.1e}: do not use this export; see --tolerance and --precision"
        )


def table_of(rows: Sequence[Row]) -> str:
    """Format rows as a table, one line for each."""
    lines = [f"{'graph':32} {'time or steps':>13} {'rms':>9} {'max':>9}"]
    for row in rows:
        when = f"t={row['timestep']:.2f}" if "timestep" in row else f"{row['steps']} steps" if "steps" in row else ""
        lines.append(f"{row['graph']:32} {when:>13} {row['rms']:9.1e} {row['max']:9.1e}")
    return "\n".join(lines)


def _arrays(tensors: Mapping[str, Tensor]) -> Arrays:
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}
