"""`d2f demo`: the whole method on the embedded miniature, measured, in one folder.

The base model draws one style of its pictures; LoRA runs with the same budget, data order and seeds teach it a second
one: as aligned flow matching (diff2flow), as naive flow matching (fm), and by its own loss (diffusion). Each network,
and the untouched base, is then drawn from by every sampler of `sampling`, from the same noise, with the same guidance,
so that best can be compared with best.

Naive flow matching has two forms. `fm` teaches the network noise - latents, as diffusers' flow-matching models return:
the sign of the noise that it was trained to return. `fm_paper` teaches it latents - noise, the paper's baseline. It is
measured at one number of evaluations only.

The budget of the default settings, in forward passes of the network on one picture, guidance counted double:
training 4 x 160 steps x 32; quality 4 networks x 4 samplers x ((2 + 4) evaluations x 200 pictures + 8 x 128 + 25 x 48),
and 4 x 4 x 200 for `fm_paper`, 114,000; quality against training steps 4 x 7 x 4 x 128, 29,000; brightness 7 routes x 2
groups x 4 x 1000, 112,000. Each picture drawn is decoded once: 27,000.
"""

import copy
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from d2f_fast.config import ObjectiveName, TrainingConfig
from d2f_fast.demo.exam import Exam, flow_loss, measure_brightness, noise_of
from d2f_fast.demo.reading import comparisons
from d2f_fast.demo.report import write_report
from d2f_fast.demo.sampling import DDIM, FLOW, ROUTES, Painter, Route, equal_route, one_thread_an_operation
from d2f_fast.evaluation.brightness import gaussian_grey_bias
from d2f_fast.files.run_record import write_run_record
from d2f_fast.flow.alignment import Alignment
from d2f_fast.flow.naive_flow import NaiveFlow
from d2f_fast.lora.merge import merged_unet
from d2f_fast.miniature import load_miniature, pictures
from d2f_fast.miniature.classifier import Classifier, load_classifier
from d2f_fast.models.base_model import BaseModel, to_pil
from d2f_fast.training.trainer import AlignedTrainer


@dataclass(frozen=True)
class Network:
    """What is trained.

    Args:
        objective: the trainer's name for it.
        negated: the network is taught the negative of its target. Its LoRA belongs to no base that there is: nothing is
            saved of it, and its brightness is not measured.
        one_number: it is drawn at one number of evaluations only, that of the curves.
    """

    objective: ObjectiveName
    negated: bool = False
    one_number: bool = False


NETWORKS: Mapping[str, Network] = {
    "diff2flow": Network("diff2flow"),
    "fm": Network("fm"),
    "fm_paper": Network("fm", negated=True, one_number=True),
    "diffusion": Network("diffusion"),
}
CHOICES = Path(__file__).with_name("learning_rates.json")


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of a demo.

    Args:
        steps: training steps of each run; a multiple of 32 puts the points of the curves on whole steps.
        batch: pictures a training step.
        rank: of the LoRA layers: attention and feed-forward, as in the usual LoRA files.
        ema_decay: of the trained weights.
        guidance_scale: of every picture drawn.
        pictures: drawn of each network by each sampler at each number of evaluations, and how many at 25.
        curve_pictures: drawn at each point of the quality against training steps.
        brightness_pictures: of each group of captions and route.
        steps_of_curves: network evaluations of a picture there.
        repeats: of each bootstrap.
    """

    steps: int = 160
    batch: int = 32
    rank: int = 16
    ema_decay: float = 0.99
    guidance_scale: float = 2.0
    pictures: Mapping[int, int] = field(default_factory=lambda: {2: 200, 4: 200, 8: 128, 25: 48})
    curve_pictures: int = 128
    brightness_pictures: int = 1000
    steps_of_curves: int = 4
    repeats: int = 100

    def curve_points(self) -> list[int]:
        """Steps at which a run is measured: none, and the budget halved up to five times."""
        return sorted({0} | {max(1, self.steps >> k) for k in range(6)})


@dataclass(frozen=True)
class Choices:
    """What `benchmarks/tune_demo.py` chose on another seed and other names: learning rates, and curve samplers."""

    learning_rate: Mapping[str, float]
    route: Mapping[str, Route]

    @classmethod
    def read(cls, path: Path = CHOICES) -> "Choices":
        """Read the committed file."""
        chosen = json.loads(path.read_text(encoding="utf-8"))["chosen"]
        return cls(
            {name: row["learning_rate"] for name, row in chosen.items()},
            {name: Route(row["sampler"], row["spacing"]) for name, row in chosen.items()},
        )


class StylePictures:
    """The finetuning task, in memory: captioned pictures of some names in one style, on every background.

    Args:
        names: indices of the names.
        style: of the pictures.
    """

    def __init__(self, names: Sequence[int], style: str = "fluent") -> None:
        chosen = [pictures.Picture(name, colour) for name in names for colour in range(len(pictures.BACKGROUNDS))]
        self._images = to_pil(pictures.draw(chosen, style))
        self._texts = [pictures.caption(picture.name, picture.colour) for picture in chosen]

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self._images[index], "text": self._texts[index]}


def make_trainer(
    load_pipeline: Callable[[], Any],
    settings: DemoSettings,
    network: str,
    learning_rate: float,
    seed: int,
    folder: Path,
) -> AlignedTrainer:
    """Trainer of one of `NETWORKS`, which differ in the objective, the learning rate and, for one, the output's sign.

    Args:
        load_pipeline: gives the base model, anew at each call.
        settings: sizes.
        network: which.
        learning_rate: its own.
        seed: of the run.
        folder: of the run's files, and of the cache that runs share.
    """
    pipeline = load_pipeline()
    if NETWORKS[network].negated:
        # The trainer teaches noise - latents: to a network that returns the negative, that is latents - noise.
        with torch.no_grad():
            for parameter in pipeline.unet.conv_out.parameters():
                parameter.neg_()
    config = TrainingConfig(
        output_dir=str(folder / network),
        cache_dir=str(folder / "cache"),
        objective=NETWORKS[network].objective,
        rank=settings.rank,
        resolution=pictures.SIZE,
        random_flip=True,
        train_batch_size=settings.batch,
        max_train_steps=settings.steps,
        learning_rate=learning_rate,
        ema_decay=settings.ema_decay,
        checkpointing_steps=0,
        seed=seed,
    )
    return AlignedTrainer.from_pretrained(pipeline, config)


def train(trainer: AlignedTrainer, dataset: StylePictures, points: Sequence[int], at: Callable[[int], None]) -> None:
    """Train to each of some steps in turn, and call `at` there with the averaged weights in the network."""
    for point in points:
        if point > trainer.global_step:
            # The rate is constant: a run in parts takes the same steps as a whole one.
            trainer.config = dataclasses.replace(trainer.config, max_train_steps=point)
            with one_thread_an_operation():
                trainer.fit(dataset)
        with trainer.averaged():
            at(point)


def with_merged_unet(model: BaseModel) -> BaseModel:
    """The same model with its adapter merged into the weights of a UNet of its own: pictures take a fifth less time."""
    merged = copy.copy(model)
    merged.unet = merged_unet(model.unet).to(model.device)
    return merged


@dataclass
class Demo:
    """One run: what every measurement needs, and the rows that came out.

    Args:
        settings: sizes.
        exam: the measured captions.
        seed: of training, noise and bootstrap.
        prompts_shown: positions of the captions whose pictures are kept for the grids.
    """

    settings: DemoSettings
    exam: Exam
    seed: int
    prompts_shown: Sequence[int]
    progress: tqdm
    rows: list[dict[str, Any]] = field(default_factory=list)
    shown: dict[tuple[str, Route, int], Tensor] = field(default_factory=dict)

    def painter(self, model: BaseModel, objective: str) -> Painter:
        """Painter of one network, on the common progress bar."""
        self.progress.set_description(f"draw {objective}")
        naive = objective in NETWORKS and NETWORKS[objective].objective == "fm"
        reader = NaiveFlow(model.alignment.num_train_timesteps) if naive else model.alignment
        return Painter(model, reader, self.settings.guidance_scale, on_batch=self.progress.update)

    def row(self, measure: str, objective: str, route: Route, steps: int, **entries: Any) -> None:
        """Keep a row."""
        self.rows.append(
            {
                "measure": measure,
                "objective": objective,
                "adapter": "none" if objective == "base" else "lora",
                "sampler": route.sampler,
                "spacing": route.spacing,
                "steps": steps,
                **entries,
            }
        )

    def measure_quality(self, model: BaseModel, objective: str) -> None:
        """Every sampler at every number of evaluations, or at the only one of this network."""
        painter, alignment = self.painter(model, objective), model.alignment
        one_number = objective in NETWORKS and NETWORKS[objective].one_number
        for steps, count in self.settings.pictures.items():
            if one_number and steps != self.settings.steps_of_curves:
                continue
            measured: dict[Route, dict[str, Any]] = {}
            pixels: dict[Route, Tensor] = {}
            for route in ROUTES:
                same = equal_route(route, steps, painter.flow)
                if same is None:
                    drawn = painter.draw(self.exam.prompts[:count], self.noise(model)[:count], route, steps)
                    measured[route], pixels[route] = self.exam.measure(drawn, self.settings.repeats), drawn
                    shown = [i for i in self.prompts_shown if i < count]
                    self.shown[objective, route, steps] = drawn[shown]
                else:
                    measured[route] = measured[same] | {"equal_to": same.sampler}
                    self.shown[objective, route, steps] = self.shown[objective, same, steps]
            if steps == self.settings.steps_of_curves:
                closest = min(pixels, key=lambda route: measured[route]["frechet_distance"])
                measured[closest] |= self.exam.measure_by_imagenet(pixels[closest], self.settings.repeats)
            for route in ROUTES:
                start = 0.0 if route.sampler == "flow" else alignment.t_min
                self.row("quality", objective, route, steps, start=start, **measured[route])

    def measure_point(self, model: BaseModel, objective: str, route: Route, step: int) -> None:
        """Loss and distance after some training steps."""
        count, steps = self.settings.curve_pictures, self.settings.steps_of_curves
        painter, noise = self.painter(model, objective), self.noise(model)[:count]
        drawn = painter.draw(self.exam.prompts[:count], noise, route, steps)
        loss = flow_loss(model, painter.flow, self.exam.real[:count], self.exam.prompts[:count], noise)
        measured = self.exam.measure(drawn, self.settings.repeats)
        self.row("training", objective, route, steps, training_steps=step, flow_loss=loss, **measured)

    def measure_brightness(self, model: BaseModel, objective: str) -> None:
        """Brightness spread from both starts: DDIM's, which is how a stock pipeline draws, and t = 0."""
        painter, steps = self.painter(model, objective), self.settings.steps_of_curves
        style = "noto" if objective == "base" else "fluent"
        # A naive-flow network is drawn from t = 0 by every pipeline that knows it.
        for route in (FLOW,) if objective == "fm" else (DDIM, FLOW):
            start = 0.0 if route == FLOW else model.alignment.t_min
            for measured in measure_brightness(
                painter, route, steps, self.exam.names, style, self.settings.brightness_pictures, self.seed
            ):
                self.row("grey_bias", objective, route, steps, start=start, **measured)

    def measure_gaussian(self, alignment: Alignment) -> None:
        """The same for Gaussian data and a perfect network, at two sizes of latents."""
        for side in (8, 64):
            for steps in (4, 25):
                for start in (0.0, alignment.t_min):
                    times = (
                        torch.linspace(start, 1, steps + 1, dtype=torch.float64) if start else alignment.times(steps)
                    )
                    kept = gaussian_grey_bias(alignment, (4, side, side), 1.0, times)
                    self.rows.append(
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
                            "grey_bias": kept,
                        }
                    )

    def noise(self, model: BaseModel) -> Tensor:
        """Start noise of the exam's captions."""
        return noise_of(self.exam.count, model, self.seed)

    def measure_autoencoder(self, model: BaseModel) -> None:
        """The real pictures through the autoencoder: no network can do better but by chance."""
        with torch.no_grad():
            latents = model.scale_latents(model.encode_images(self.exam.real)["mean"])
            drawn = torch.cat([model.decode(part) for part in latents.split(64)]).clamp(-1, 1).cpu()
        measured = self.exam.measure(drawn, self.settings.repeats)
        measured |= self.exam.measure_by_imagenet(drawn, self.settings.repeats)
        self.rows.append(
            {
                "measure": "autoencoder",
                "objective": "real",
                "adapter": "none",
                "sampler": "none",
                "steps": 0,
                **measured,
            }
        )


def forward_passes(settings: DemoSettings) -> int:
    """Network evaluations, in pictures, that the progress bar counts."""
    middle, only = settings.steps_of_curves, sum(network.one_number for network in NETWORKS.values())
    whole = 1 + len(NETWORKS) - only  # the base too
    quality = whole * sum(len(ROUTES) * steps * count for steps, count in settings.pictures.items())
    quality += only * len(ROUTES) * middle * settings.pictures.get(middle, 0)
    quality -= (whole - 1) * 2 * settings.pictures.get(2, 0)
    curves = len(NETWORKS) * len(settings.curve_points()) * settings.curve_pictures * middle
    return quality + curves + (2 * whole - 1) * 2 * settings.brightness_pictures * middle


def run_demo(
    output_dir: str | Path,
    seed: int = 0,
    settings: DemoSettings | None = None,
    load_pipeline: Callable[[], Any] = load_miniature,
    classifier: Classifier | None = None,
) -> Path:
    """Run the demo, and write the report, grids, LoRA files and `metrics.json` into a folder.

    Args:
        output_dir: made when missing.
        seed: of training, noise and bootstrap; the learning rates were chosen on another.
        settings: sizes; None for those of the command line.
        load_pipeline: gives the base model, anew at each call: training changes it.
        classifier: the judge; None for the miniature's own.

    Returns:
        Path of `report.html`.
    """
    settings, started, output = settings or DemoSettings(), time.monotonic(), Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    choices = Choices.read()
    held_out = pictures.held_out_names()
    exam = Exam(sorted(held_out), max(settings.pictures.values()), classifier or load_classifier(), seed)
    dataset = StylePictures([name for name in pictures.names_in_both_styles() if name not in held_out])
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        progress = stack.enter_context(tqdm(total=forward_passes(settings), unit="pass", unit_scale=True))
        demo = Demo(settings, exam, seed, one_of_each_colour(exam, min(settings.pictures.values())), progress)
        base = BaseModel(load_pipeline())
        demo.measure_autoencoder(base)
        demo.measure_gaussian(base.alignment)
        demo.measure_quality(base, "base")
        demo.measure_brightness(base, "base")
        for network in NETWORKS:
            trainer = make_trainer(load_pipeline, settings, network, choices.learning_rate[network], seed, folder)
            route = choices.route[network]

            def at(step: int, trainer: AlignedTrainer = trainer, network: str = network, route: Route = route) -> None:
                demo.measure_point(with_merged_unet(trainer.model), network, route, step)

            train(trainer, dataset, settings.curve_points(), at)
            with trainer.averaged():
                model = with_merged_unet(trainer.model)
            demo.measure_quality(model, network)
            if not NETWORKS[network].negated:
                demo.measure_brightness(model, network)
                trainer.save_lora(output / network)
    demo.rows += comparisons(demo.rows)
    seconds = time.monotonic() - started
    report = write_report(output, demo.rows, demo.shown, shown_pictures(demo), seed, seconds)
    write_run_record(output, "d2f demo", seed, seconds, demo.rows)
    return report


def one_of_each_colour(exam: Exam, count: int) -> list[int]:
    """Positions of the first caption of each colour among the first `count`."""
    first: dict[int, int] = {}
    for position, picture in enumerate(exam.drawn[:count]):
        first.setdefault(picture.colour, position)
    return list(first.values())


def shown_pictures(demo: Demo) -> tuple[list[str], list[Image.Image]]:
    """Captions and real pictures of the grids' columns."""
    positions = list(demo.prompts_shown)
    return [demo.exam.prompts[i] for i in positions], to_pil(demo.exam.real[positions])
