"""Measure the demo's networks, one row for each measurement."""

import time
from dataclasses import dataclass, field
from typing import NoReturn

from diffusers import DDIMScheduler
from torch import Tensor
from tqdm import tqdm

from d2f_fast.demo.evaluation_set import EvaluationSet
from d2f_fast.demo.generation import ImageGenerator, start_noise
from d2f_fast.demo.networks import NETWORKS
from d2f_fast.demo.rows import Row, Section
from d2f_fast.demo.samplers import times_of_ddim
from d2f_fast.demo.settings import DemoSettings
from d2f_fast.flow.flow import Flow
from d2f_fast.models.base_model import BaseModel

# Section, row and number of evaluations or training steps of one row of images.
ShownKey = tuple[Section, str, int]
BASE, REFLOW = "base", "reflow"


@dataclass
class Measurements:
    """All measurements of one demo.

    Args:
        settings: sizes.
        domain: captions and real images of the style that the base knows.
        trained, held_out: captions and real images of the second style, of names in training and of held-out names.
        seed: seed of noise and bootstrap.
        progress: progress bar, which counts network evaluations in images.
        rows: rows measured so far.
        shown: images kept for the report, [columns, 3, H, W] in [-1, 1], by section, row and number.
    """

    settings: DemoSettings
    domain: EvaluationSet
    trained: EvaluationSet
    held_out: EvaluationSet
    seed: int
    progress: "tqdm[NoReturn]"
    rows: list[Row] = field(default_factory=list)
    shown: dict[ShownKey, Tensor] = field(default_factory=dict)

    def measure_same_images(self, model: BaseModel) -> None:
        """Compare the images of the stock pipeline's DDIM with those of the flow, from the same weights and noise."""
        count, steps, scale = self.settings.own_images, self.settings.own_steps, self.settings.guidance_scale
        shown = self._positions()
        chosen = (shown + [i for i in range(self.domain.count) if i not in shown])[:count]
        prompts = [self.domain.prompts[i] for i in chosen]
        noise = start_noise(self.domain.count, model, self.seed)[chosen]
        generator = self._generator(model, model.flow, "same images")
        pipeline = model.pipeline
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": steps, "guidance_scale": scale, "output_type": "pt"}
        own = pipeline(prompts, latents=noise.to(model.device), **options).images.cpu() * 2 - 1
        self.progress.update(count * steps * 2)
        times = times_of_ddim(pipeline.scheduler, model.alignment, steps)
        images = {
            "ddim": own,
            "same times": generator.generate(prompts, noise, times, scale),
            "even times": generator.generate(prompts, noise, steps, scale),
        }
        for name, of_name in images.items():
            self.shown["same_images", name, steps] = of_name[: len(shown)]
        difference = (images["same times"] - own).abs().max().item() * 127.5
        head = self._head("same_images", BASE, steps, scale)
        self.rows.append({**head, "samples": count, "largest_difference": difference})

    def measure_training(self, model: BaseModel, flow: Flow, network: str, step: int, learning_rate: float) -> None:
        """Measure a network after `step` steps of continued training, without guidance."""
        steps = self.settings.curve_evaluations
        generator, noise = self._generator(model, flow, network), start_noise(self.domain.count, model, self.seed)
        images = generator.generate(self.domain.prompts, noise, steps)
        self.shown["continued", network, step] = images[self._positions()]
        head = self._head("continued", network, steps, 1.0)
        measured = self.domain.measure(images)
        self.rows.append({**head, "training_steps": step, "learning_rate": learning_rate, **measured})

    def measure_few_steps(self, model: BaseModel, network: str) -> None:
        """Measure a network at each number of evaluations; the base without guidance, and with it where they allow."""
        noise = start_noise(self.domain.count, model, self.seed)
        generator = self._generator(model, model.flow, network)
        for evaluations in self.settings.evaluations:
            ways = [(evaluations, 1.0)]
            if network == BASE and evaluations > 1:
                ways.append((evaluations // 2, self.settings.guidance_scale))
            found = []
            for steps, scale in ways:
                started = time.monotonic()
                images = generator.generate(self.domain.prompts, noise, steps, scale)
                seconds = (time.monotonic() - started) / len(images)
                head = self._head("few_steps", network, steps, scale)
                row: Row = {**head, "allowed": evaluations, "seconds_per_image": seconds, **self.domain.measure(images)}
                self.rows.append(row)
                found.append((row["frechet_distance"], images))
            _, images = min(found, key=lambda pair: pair[0])
            self.shown["few_steps", network, evaluations] = images[self._positions()]

    def measure_style(self, model: BaseModel, network: str) -> None:
        """Measure the second style on names in training and on held-out names, with guidance."""
        steps, scale = self.settings.style_evaluations // 2, self.settings.guidance_scale
        generator = self._generator(model, model.flow, network)
        for names, images_of in (("trained", self.trained), ("held out", self.held_out)):
            noise = start_noise(images_of.count, model, self.seed)
            images = generator.generate(images_of.prompts, noise, steps, scale)
            self.shown["style", f"{network} {names}", steps] = images[images_of.one_of_each_colour()]
            head: Row = {**self._head("style", network, steps, scale), "names": names}  # type: ignore[typeddict-item]
            self.rows.append({**head, **images_of.measure(images)})

    def _positions(self) -> list[int]:
        """Return the positions of the shown captions."""
        return self.domain.one_of_each_colour()

    def _generator(self, model: BaseModel, flow: Flow, name: str) -> ImageGenerator:
        """Return a generator that reports to the progress bar."""
        self.progress.set_description(f"generate {name}")
        return ImageGenerator(model, flow, on_batch=self.progress.update)

    def _head(self, section: Section, network: str, steps: int, guidance_scale: float) -> Row:
        """Return the first entries of a row."""
        trained = NETWORKS.get(network)
        objective = {BASE: BASE, REFLOW: "diff2flow"}.get(network) or NETWORKS[network].objective
        row: Row = {
            "section": section,
            "network": network,
            "objective": objective,
            "adapter": "none" if network == BASE else "lora",
            "sampler": "flow",
            "steps": steps,
            "guidance_scale": guidance_scale,
            "evaluations": steps * (2 if guidance_scale > 1 else 1),
        }
        if trained is not None and trained.fm_form is not None:
            row["fm_form"] = trained.fm_form
        return row
