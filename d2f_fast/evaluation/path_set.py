"""Measure the straightness of a model's paths for prompts, a batch of them at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from d2f_fast.evaluation.image_set import noise_generator
from d2f_fast.evaluation.straightness import Straightness, measure_straightness
from d2f_fast.flow.flow import Flow
from d2f_fast.models.base_model import BaseModel
from d2f_fast.models.prompt_velocity import prompt_velocity
from d2f_fast.sampling.integrate import Velocity

SEGMENTS, STEPS_PER_SEGMENT = 8, 8
# Four evaluations for each step of the Runge-Kutta method, and one at each of its nodes.
EVALUATIONS = 5 * SEGMENTS * STEPS_PER_SEGMENT + 1


def measure_paths(
    model: BaseModel,
    flow: Flow,
    prompts: Sequence[str],
    size: tuple[int, int],
    *,
    seed: int = 0,
    batch_size: int = 8,
    guidance_scale: float = 1.0,
    negative_prompt: str = "",
) -> Straightness:
    """Measure one path for each prompt, in 8 segments of flow time, and show a progress bar.

    The states of all paths are held in memory at once, 65 times the latents of an image for each path.

    Args:
        model: base model on its device.
        flow: flow of its network, on the same device.
        prompts: prompts, one for each path.
        size: height and width of the images in pixels, multiples of the model's downsampling.
        seed: seed of the noise at which the paths begin; the batch size does not change it.
        batch_size: number of paths that the network is given at once, before guidance doubles it.
        guidance_scale: scale of classifier-free guidance; 1 and 0 turn it off.
        negative_prompt: prompt to steer away from; "" for the model's own empty prompt.
    """
    height, width = size
    shape = model.latents_shape(height, width)
    noise = torch.stack([torch.randn(shape, generator=noise_generator(seed, i)) for i in range(len(prompts))])
    negative = model.encode_prompts([negative_prompt]) if negative_prompt else None
    velocities = [
        prompt_velocity(model, flow, prompts[i : i + batch_size], height, width, guidance_scale, negative)
        for i in range(0, len(prompts), batch_size)
    ]
    with tqdm(total=EVALUATIONS * len(velocities), desc="paths", unit="batch", dynamic_ncols=True) as bar:
        velocity = in_batches(velocities, batch_size, bar)
        return measure_straightness(velocity, noise.to(model.device), SEGMENTS, STEPS_PER_SEGMENT)


def in_batches(velocities: Sequence[Velocity], batch_size: int, bar: "tqdm[object]") -> Velocity:
    """Return the velocity of a large batch, which is computed in parts.

    Args:
        velocities: velocity of each part.
        batch_size: size of each part but the last one.
        bar: progress bar that counts the evaluated parts.
    """

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        found = []
        for of_part, part in zip(velocities, x_t.split(batch_size), strict=True):
            found.append(of_part(part, t))
            bar.update()
        return torch.cat(found)

    return velocity
