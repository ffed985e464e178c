"""Measure the demo's networks, one row for each measurement."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from d2f_fast.demo.evaluation_set import EvaluationSet
from d2f_fast.demo.generation import ImageGenerator, start_noise
from d2f_fast.demo.networks import NETWORKS
from d2f_fast.demo.rows import Measured, Row, sampling_row
from d2f_fast.demo.samplers import DDIM, FLOW, SAMPLERS, Sampler, equal_sampler
from d2f_fast.demo.settings import DemoSettings
from d2f_fast.evaluation.brightness import gaussian_grey_bias, grey_bias
from d2f_fast.flow.alignment import Alignment
from d2f_fast.flow.flow import Flow
from d2f_fast.flow.formulas import interpolate
from d2f_fast.flow.naive_flow import NaiveFlow
from d2f_fast.miniature import emoji
from d2f_fast.models.base_model import BaseModel
from d2f_fast.sampling.integrate import unet_velocity

BLACK_AND_WHITE = tuple(tuple(emoji.BACKGROUNDS).index(name) for name in ("black", "white"))


@torch.no_grad()
def flow_loss(model: BaseModel, flow: Flow, images: Tensor, prompts: Sequence[str], noise: Tensor) -> float:
    """Compute the mean of ‖velocity - (latents - noise)‖² over real images at evenly spread flow times.

    Args:
        model: model whose UNet is measured, without guidance.
        flow: how the UNet's time and output relate to the flow: an `Alignment` or `NaiveFlow`.
        images: real images [B, 3, H, W] in [-1, 1].
        prompts: B captions.
        noise: noise [B, C, h, w].
    """
    latents = model.scale_latents(model.encode_images(images)["mean"].float())
    noise = noise.to(latents.device)
    t = (torch.arange(len(latents), device=latents.device) + 0.5) / len(latents)
    condition = model.encode_prompts(prompts)["encoder_hidden_states"]
    velocity = unet_velocity(model.unet, flow.to(model.device), condition)(interpolate(latents, noise, t), t)
    return (velocity - (latents - noise)).square().mean().item()


def brightness_entries(
    generator: ImageGenerator, sampler: Sampler, steps: int, names: Sequence[int], style: str, count: int, seed: int
) -> list[Row]:
    """Measure the spread of brightness for captions without a colour, and for black and white backgrounds.

    Args:
        generator: generator of the images.
        sampler: sampler to use.
        steps: network evaluations for each image.
        names: names that the captions are chosen from at random.
        style: style of the real images.
        count: number of images for each of the two groups of captions.
        seed: seed of the names, the noise and the bootstrap.

    Returns:
        Entries of one row for each group of captions.
    """
    entries: list[Row] = []
    rng = np.random.default_rng(seed)
    all_colours = tuple(range(len(emoji.BACKGROUNDS)))
    for captions, colours in (("no colour", all_colours), ("black and white", BLACK_AND_WHITE)):
        chosen = rng.choice(np.asarray(sorted(names)), count)
        colour_of = [None if captions == "no colour" else colours[i % len(colours)] for i in range(count)]
        prompts = [emoji.caption(int(name), colour) for name, colour in zip(chosen, colour_of, strict=True)]
        images = generator.generate(prompts, start_noise(count, generator.model, seed), sampler, steps)
        real = [emoji.Emoji(name, colour) for name in sorted(names) for colour in colours]
        spread = grey_bias(images, emoji.render(real, style), seed=seed)
        entries.append(
            {
                "captions": captions,
                "samples": count,
                "grey_bias": spread.value,
                "grey_bias_low": spread.low,
                "grey_bias_high": spread.high,
            }
        )
    return entries


def ideal_brightness_rows(alignment: Alignment) -> list[Row]:
    """Compute the spread of brightness of a perfect network on Gaussian latents of two sizes, from both starts."""
    rows: list[Row] = []
    for side in (8, 64):
        for steps in (4, 25):
            for start in (0.0, alignment.t_min):
                times = torch.linspace(start, 1, steps + 1, dtype=torch.float64) if start else alignment.times(steps)
                rows.append(
                    {
                        "measure": "gaussian_grey_bias",
                        "objective": "ideal",
                        "adapter": "none",
                        "sampler": "flow",
                        "spacing": "uniform",
                        "steps": steps,
                        "start": start,
                        "latents": [4, side, side],
                        "channel_mean_variance": 1.0,
                        "grey_bias": gaussian_grey_bias(alignment, (4, side, side), 1.0, times),
                    }
                )
    return rows


@dataclass
class Measurements:
    """All measurements of one demo.

    Args:
        settings: sizes.
        evaluation_set: captions and real images.
        seed: seed of noise and bootstrap.
        shown_positions: positions of the captions whose images are kept for the grids of the report.
        progress: progress bar, which counts network evaluations in images.
        rows: rows measured so far.
        shown: images kept for the grids, [columns, 3, H, W] in [-1, 1], by network, sampler and evaluations.
    """

    settings: DemoSettings
    evaluation_set: EvaluationSet
    seed: int
    shown_positions: Sequence[int]
    progress: "tqdm[NoReturn]"
    rows: list[Row] = field(default_factory=list)
    shown: dict[tuple[str, Sampler, int], Tensor] = field(default_factory=dict)

    def measure_autoencoder(self, model: BaseModel) -> None:
        """Measure real images that went through the autoencoder; no network can be expected to do better."""
        with torch.no_grad():
            latents = model.scale_latents(model.encode_images(self.evaluation_set.real)["mean"])
            images = torch.cat([model.decode(part) for part in torch.split(latents, 64)]).clamp(-1, 1).cpu()
        repeats = self.settings.bootstrap_repeats
        head: Row = {"measure": "autoencoder", "objective": "real", "adapter": "none", "sampler": "none", "steps": 0}
        measured = self.evaluation_set.measure(images, repeats)
        imagenet = self.evaluation_set.measure_with_imagenet(images, repeats)
        self.rows.append({**head, **measured, **imagenet})

    def measure_quality(self, model: BaseModel, objective: str) -> None:
        """Measure the images that a network generates with every sampler and number of network evaluations."""
        only_curve = objective in NETWORKS and NETWORKS[objective].curve_evaluations_only
        for steps, count in self.settings.images.items():
            if only_curve and steps != self.settings.curve_evaluations:
                continue
            measured = self._measure_samplers(model, objective, steps, count)
            for sampler in SAMPLERS:
                start = 0.0 if sampler.name == "flow" else model.alignment.t_min
                head = sampling_row("quality", objective, sampler, steps)
                self.rows.append({**head, "start": start, **measured[sampler]})

    def _measure_samplers(self, model: BaseModel, objective: str, steps: int, count: int) -> dict[Sampler, Measured]:
        """Measure every sampler at one number of evaluations, and keep the images of the grids."""
        generator, repeats = self._generator(model, objective), self.settings.bootstrap_repeats
        prompts, noise = self.evaluation_set.prompts[:count], self._noise(model)[:count]
        measured: dict[Sampler, Measured] = {}
        generated: dict[Sampler, Tensor] = {}
        for sampler in SAMPLERS:
            same = equal_sampler(sampler, steps, generator.flow)
            if same is not None:
                measured[sampler] = {**measured[same], "equal_to": same.name}
                self.shown[objective, sampler, steps] = self.shown[objective, same, steps]
                continue
            images = generator.generate(prompts, noise, sampler, steps)
            measured[sampler], generated[sampler] = self.evaluation_set.measure(images, repeats), images
            self.shown[objective, sampler, steps] = images[[i for i in self.shown_positions if i < count]]
        if steps == self.settings.curve_evaluations:
            best = min(generated, key=lambda sampler: measured[sampler]["frechet_distance"])
            imagenet = self.evaluation_set.measure_with_imagenet(generated[best], repeats)
            measured[best] = {**measured[best], **imagenet}
        return measured

    def measure_training(self, model: BaseModel, objective: str, sampler: Sampler, step: int) -> None:
        """Measure loss and distance of a network after `step` training steps."""
        count, steps = self.settings.curve_images, self.settings.curve_evaluations
        generator, noise = self._generator(model, objective), self._noise(model)[:count]
        prompts = self.evaluation_set.prompts[:count]
        images = generator.generate(prompts, noise, sampler, steps)
        loss = flow_loss(model, generator.flow, self.evaluation_set.real[:count], prompts, noise)
        head = sampling_row("training", objective, sampler, steps)
        measured = self.evaluation_set.measure(images, self.settings.bootstrap_repeats)
        self.rows.append({**head, "training_steps": step, "flow_loss": loss, **measured})

    def measure_brightness(self, model: BaseModel, objective: str) -> None:
        """Measure the spread of brightness from DDIM's start, where stock pipelines start, and from t = 0."""
        generator, steps = self._generator(model, objective), self.settings.curve_evaluations
        style = "noto" if objective == "base" else "fluent"
        # Every pipeline that knows naive-flow networks starts them at t = 0.
        for sampler in (FLOW,) if objective == "fm" else (DDIM, FLOW):
            start = 0.0 if sampler == FLOW else model.alignment.t_min
            head = sampling_row("grey_bias", objective, sampler, steps)
            names, count = self.evaluation_set.names, self.settings.brightness_images
            for entries in brightness_entries(generator, sampler, steps, names, style, count, self.seed):
                self.rows.append({**head, "start": start, **entries})

    def _generator(self, model: BaseModel, objective: str) -> ImageGenerator:
        """Return a generator that reports to the progress bar."""
        self.progress.set_description(f"generate {objective}")
        naive = objective in NETWORKS and NETWORKS[objective].objective == "fm"
        flow: Flow = NaiveFlow(model.alignment.num_train_timesteps) if naive else model.alignment
        return ImageGenerator(model, flow, self.settings.guidance_scale, on_batch=self.progress.update)

    def _noise(self, model: BaseModel) -> Tensor:
        """Return the start noise of all captions of the evaluation set."""
        return start_noise(self.evaluation_set.count, model, self.seed)
