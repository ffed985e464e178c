"""Generate pairs: the noise that a model starts from, and the latents at the end of its path.

Pair i is a function of (seed, i), its prompt and the options. Its noise comes from a generator of its own. A batch
always holds the same pairs, so that neither the number of processes nor a restart changes a bit of them.
"""

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from d2f_fast.config import Method
from d2f_fast.data.pair_shards import PairRecord
from d2f_fast.flow.flow import Flow
from d2f_fast.models.base_model import BaseModel, to_pil
from d2f_fast.models.prompt_velocity import prompt_velocity
from d2f_fast.sampling.integrate import Velocity, sample_flow
from d2f_fast.sampling.multistep import sample_multistep

Solver = Literal["dpmsolver++", "euler", "midpoint", "heun"]
JPEG_QUALITY = 95


@dataclass(frozen=True)
class PairPlan:
    """What pairs are made, and how.

    Args:
        prompts: Prompts; pair i has prompt i modulo their number.
        num_pairs: Number of pairs.
        pairs_per_shard: Number of pairs in each shard; the last one may have fewer.
        batch_size: Number of pairs in a batch, which begins anew with each shard.
        seed: Seed of all noise and guidance scales.
        times: Flow times between which the solver steps, [steps + 1] float32 from 0 to 1.
        solver: How it steps.
        guidance_scale: Guidance scale, or the lowest one of a range.
        guidance_scale_max: Highest guidance scale of the range, from which each pair gets its own; equal to
            `guidance_scale` for one value.
        negative_prompt: Prompt to steer away from; "" for the model's own empty prompt.
        height: Height of the images in pixels.
        width: Width of the images in pixels.
        dtype: Type of the numbers in the shards.
        precision: Type of autocast in which the network runs; "no" runs it in its own type.
        save_images: Whether the decoded images are stored, too.
    """

    prompts: Sequence[str]
    num_pairs: int
    pairs_per_shard: int
    batch_size: int
    seed: int
    times: Tensor
    solver: Solver
    guidance_scale: float
    guidance_scale_max: float
    negative_prompt: str
    height: int
    width: int
    dtype: Literal["float16", "float32"]
    precision: Literal["no", "fp16", "bf16"] = "no"
    save_images: bool = False

    @property
    def num_shards(self) -> int:
        """Return the number of shards."""
        return -(-self.num_pairs // self.pairs_per_shard)

    def shard(self, number: int) -> range:
        """Return the pairs of a shard."""
        first = number * self.pairs_per_shard
        return range(first, min(first + self.pairs_per_shard, self.num_pairs))

    def prompt(self, index: int) -> str:
        """Return the prompt of a pair."""
        return self.prompts[index % len(self.prompts)]

    def pair_seed(self, index: int) -> int:
        """Return the seed of a pair's noise, which has 63 bits."""
        return _hashed("noise", self.seed, index) >> 1

    def guidance(self, index: int) -> float:
        """Return the guidance scale of a pair, with three decimals where it is sampled from a range."""
        low, high = self.guidance_scale, self.guidance_scale_max
        return low if low == high else round(low + (high - low) * _hashed("guidance", self.seed, index) / 2**64, 3)

    def meta(self, index: int) -> dict[str, object]:
        """Return the meta.json of a pair, without the entries about the model."""
        return {
            "index": index,
            "seed": self.pair_seed(index),
            "guidance_scale": self.guidance(index),
            "guidance_scale_range": [self.guidance_scale, self.guidance_scale_max],
            "steps": len(self.times) - 1,
            "solver": self.solver,
            "height": self.height,
            "width": self.width,
        }

    def noise(self, index: int, shape: tuple[int, ...]) -> Tensor:
        """Return the noise of a pair in the numbers that the shard stores, in float32.

        `torch.randn` gives it before the rounding, from a generator on the CPU that has the pair's seed.
        """
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(self.pair_seed(index)))
        return noise.to(getattr(torch, self.dtype)).float()


class PairGenerator:
    """Generate the pairs of a plan with one model.

    Args:
        model: Model, on its device.
        flow: Flow of its network, on the same device.
        plan: What is made, and how.
        origin: Entries about the model for the meta.json of each pair.
    """

    def __init__(self, model: BaseModel, flow: Flow, plan: PairPlan, origin: Mapping[str, object]) -> None:
        self._model, self._flow, self._plan, self._origin = model, flow, plan, dict(origin)
        self.shape = model.latents_shape(plan.height, plan.width)
        self._negative: dict[str, Tensor] | None = None

    def shard(self, number: int) -> Iterator[PairRecord]:
        """Yield the pairs of a shard."""
        pairs = self._plan.shard(number)
        for first in range(pairs.start, pairs.stop, self._plan.batch_size):
            yield from self._batch(range(first, min(first + self._plan.batch_size, pairs.stop)))

    def decode(self, latents: Tensor) -> Tensor:
        """Return the images [B, 3, H, W] in [-1, 1] of latents [B, C, h, w], both on the CPU and in float32."""
        return self._model.decode(latents.to(self._model.device)).cpu()

    @torch.no_grad()
    def _batch(self, pairs: range) -> Iterator[PairRecord]:
        """Yield the pairs of a batch."""
        plan = self._plan
        noise = torch.stack([plan.noise(i, self.shape) for i in pairs])
        prompts = [plan.prompt(i) for i in pairs]
        with self._autocast():
            velocity = self._velocity(prompts, [plan.guidance(i) for i in pairs])
            latents = solve(plan.solver, velocity, noise.to(self._model.device), plan.times)
        stored = latents.to("cpu", getattr(torch, plan.dtype))
        for position, i in enumerate(pairs):
            image = self._jpeg(stored[position]) if plan.save_images else None
            start, end = noise[position].numpy().astype(plan.dtype), stored[position].numpy()
            yield PairRecord(f"{i:09d}", end, start, prompts[position], plan.meta(i) | self._origin, image)

    def _autocast(self) -> AbstractContextManager[object]:
        """Return the context in which the network runs."""
        if self._plan.precision == "no":
            return nullcontext()
        dtype = torch.float16 if self._plan.precision == "fp16" else torch.bfloat16
        return torch.autocast(self._model.device.type, dtype)

    def _velocity(self, prompts: Sequence[str], guidance: Sequence[float]) -> Velocity:
        """Return the velocity of the network for prompts, each guided with its own scale."""
        model, plan = self._model, self._plan
        scales: Tensor | float = 1.0
        if plan.guidance_scale_max > 1:
            scales = torch.tensor(guidance, device=model.device).reshape(-1, 1, 1, 1)
            if plan.negative_prompt and self._negative is None:
                self._negative = model.encode_prompts([plan.negative_prompt])
        return prompt_velocity(model, self._flow, prompts, plan.height, plan.width, scales, self._negative)

    def _jpeg(self, latents: Tensor) -> bytes:
        """Return the image of latents as a JPEG file; each is decoded alone."""
        stream = io.BytesIO()
        (image,) = to_pil(self.decode(latents[None].float()))
        image.save(stream, "JPEG", quality=JPEG_QUALITY)
        return stream.getvalue()


def solve(solver: Solver, velocity: Velocity, noise: Tensor, times: Tensor) -> Tensor:
    """Return the latents at the end of the path that begins at a noise.

    Args:
        solver: Name of the solver.
        velocity: Velocity of the network.
        noise: Flow state at t = 0, [B, C, h, w] float32.
        times: Flow times from 0 to 1, [steps + 1].
    """
    if solver == "dpmsolver++":
        return sample_multistep(velocity, noise, times)
    method: Method = solver
    end = sample_flow(velocity, noise, times=times, method=method)
    assert isinstance(end, Tensor)
    return end


def evaluations(solver: Solver, steps: int, guided: bool) -> int:
    """Return how often the network is evaluated for one pair; guidance counts twice."""
    return steps * (2 if solver in ("midpoint", "heun") else 1) * (2 if guided else 1)


def _hashed(purpose: str, seed: int, index: int) -> int:
    """Return 64 bits that differ, in practice, for every purpose, seed and pair."""
    digest = hashlib.sha256(f"d2f pairs {purpose} {seed} {index}".encode()).digest()
    return int.from_bytes(digest[:8], "little")
