"""Generate images of prompts with one network, in several threads on a CPU."""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from d2f_fast.flow.flow import Flow
from d2f_fast.miniature import emoji
from d2f_fast.models.base_model import BaseModel
from d2f_fast.models.prompt_velocity import prompt_velocity
from d2f_fast.sampling.integrate import Velocity, sample_flow


@contextmanager
def single_threaded_operations() -> Iterator[None]:
    """Keep torch from dividing one operation among threads, whose waiting costs more than they save at this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def start_noise(count: int, model: BaseModel, seed: int) -> Tensor:
    """Sample the start noise [count, C, h, w] on the CPU; it is the same for every network and sampler."""
    shape = (count, *model.latents_shape(emoji.SIZE, emoji.SIZE))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class ImageGenerator:
    """Generator of images from prompts with one network, by Euler's method along the flow.

    Args:
        model: model whose text encoder, UNet and autoencoder are used.
        flow: how the UNet's time and output relate to the flow: an `Alignment` or `NaiveFlow`.
        batch_size: largest number of images in one call of the UNet, before guidance doubles it. On a CPU several
            calls run side by side.
        on_batch: called after each batch with its number of UNet evaluations, counted in images.
    """

    def __init__(
        self,
        model: BaseModel,
        flow: Flow,
        batch_size: int = 64,
        on_batch: Callable[[int], object] = lambda evaluations: None,
    ) -> None:
        self.model, self.flow = model, flow.to(model.device)
        self._batch_size, self._on_batch = batch_size, on_batch

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[str], noise: Tensor, times: Tensor | int, guidance_scale: float = 1.0
    ) -> Tensor:
        """Generate one image for each prompt.

        Args:
            prompts: B prompts.
            noise: start noise [B, C, h, w].
            times: rising flow times between which Euler's method steps. Where they do not begin at 0, the noise is
                taken for the network's own noisy input at the first of them, and its input at the last one is decoded,
                as diffusion samplers do. A whole number stands for as many even steps from 0 to 1.
            guidance_scale: scale of classifier-free guidance; 1 turns it off.

        Returns:
            Images [B, 3, H, W] float32 in [-1, 1], on the CPU.
        """
        nodes = self.flow.times(times) if isinstance(times, int) else times
        evaluations = (len(nodes) - 1) * (2 if guidance_scale > 1 else 1)
        # On a CPU as many batches run side by side as torch would use threads for one operation.
        workers = torch.get_num_threads() if self.model.device.type == "cpu" else 1
        parts = self._equal_parts(len(prompts), workers)
        velocities = [self._velocity(prompts[part], guidance_scale) for part in parts]

        @torch.no_grad()  # A new thread starts with gradients enabled.
        def generate_part(part: slice, velocity: Velocity) -> Tensor:
            start, first, last = noise[part].to(self.model.device), nodes[0], nodes[-1]
            end = sample_flow(velocity, start if first == 0 else self.flow.to_flow(start, first), times=nodes)
            assert isinstance(end, Tensor)
            return self.model.decode(end if last == 1 else self.flow.to_sample(end, last)).clamp(-1, 1).cpu()

        images = []
        with single_threaded_operations(), ThreadPoolExecutor(workers) as pool:
            for image in pool.map(generate_part, parts, velocities):
                images.append(image)
                self._on_batch(len(image) * evaluations)
        return torch.cat(images)

    def _velocity(self, prompts: Sequence[str], guidance_scale: float) -> Velocity:
        """Return the velocity of the network for a batch of prompts."""
        return prompt_velocity(self.model, self.flow, prompts, emoji.SIZE, emoji.SIZE, guidance_scale)

    def _equal_parts(self, count: int, workers: int) -> list[slice]:
        """Divide `count` prompts into batches of equal sizes, so that no worker waits for another."""
        batches = min(count, workers * math.ceil(count / (workers * self._batch_size)))
        return [slice(count * i // batches, count * (i + 1) // batches) for i in range(batches)]
