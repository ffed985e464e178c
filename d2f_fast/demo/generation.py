"""Generate images of prompts with one network, in several threads on a CPU."""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from d2f_fast.demo.samplers import Sampler, sample_latents
from d2f_fast.flow.flow import Flow
from d2f_fast.miniature import emoji
from d2f_fast.models.base_model import BaseModel
from d2f_fast.sampling.integrate import unet_velocity


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
    side = emoji.SIZE // model.downsampling
    shape = (count, model.unet.config.in_channels, side, side)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class ImageGenerator:
    """Generator of images from prompts with one network.

    Args:
        model: model whose text encoder, UNet and autoencoder are used.
        flow: how the UNet's time and output relate to the flow: an `Alignment` or `NaiveFlow`.
        guidance_scale: scale of classifier-free guidance for every image; 1 turns it off.
        batch_size: largest number of images in one call of the UNet, before guidance doubles it. On a CPU several
            calls run side by side.
        on_batch: called after each batch with its number of UNet evaluations, counted in images.
    """

    def __init__(
        self,
        model: BaseModel,
        flow: Flow,
        guidance_scale: float,
        batch_size: int = 64,
        on_batch: Callable[[int], object] = lambda evaluations: None,
    ) -> None:
        self.model, self.flow, self.guidance_scale = model, flow.to(model.device), guidance_scale
        self._batch_size, self._on_batch = batch_size, on_batch

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], noise: Tensor, sampler: Sampler, steps: int) -> Tensor:
        """Generate one image for each prompt.

        Args:
            prompts: B prompts.
            noise: start noise [B, C, h, w].
            sampler: sampler to use.
            steps: network evaluations for each image.

        Returns:
            Images [B, 3, H, W] float32 in [-1, 1], on the CPU.
        """
        model = self.model
        unconditional = model.encode_prompts([""])["encoder_hidden_states"]
        # On a CPU as many batches run side by side as torch would use threads for one operation.
        workers = torch.get_num_threads() if model.device.type == "cpu" else 1
        parts = self._equal_parts(len(prompts), workers)
        conditions = [model.encode_prompts(prompts[part])["encoder_hidden_states"] for part in parts]

        @torch.no_grad()  # A new thread starts with gradients enabled.
        def generate_part(part: slice, condition: Tensor) -> Tensor:
            velocity = unet_velocity(
                model.unet, self.flow, condition, unconditional.expand_as(condition), self.guidance_scale
            )
            start = noise[part].to(model.device)
            latents = sample_latents(velocity, start, sampler, steps, self.flow, model.pipeline.scheduler)
            return model.decode(latents).clamp(-1, 1).cpu()

        images = []
        with single_threaded_operations(), ThreadPoolExecutor(workers) as pool:
            for condition, part in zip(conditions, pool.map(generate_part, parts, conditions), strict=True):
                images.append(part)
                self._on_batch(len(condition) * steps)
        return torch.cat(images)

    def _equal_parts(self, count: int, workers: int) -> list[slice]:
        """Divide `count` prompts into batches of equal sizes, so that no worker waits for another."""
        batches = min(count, workers * math.ceil(count / (workers * self._batch_size)))
        return [slice(count * i // batches, count * (i + 1) // batches) for i in range(batches)]
