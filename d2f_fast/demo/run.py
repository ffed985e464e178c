"""Run the package's method on the embedded miniature, measure it, and write one folder (`d2f demo`).

Four comparisons, each with images and numbers:

1. The untouched base by its own sampler and along the flow: the same images.
2. The base trained further on the style that it knows, by aligned flow matching, by naive flow matching in the form
   that the paper's code has, and by its own loss, from the same start, data order, seed and learning rate.
3. The base, and the reflow LoRA that is part of the package, at few network evaluations.
4. A LoRA that learns a second style, on names in its training and on held-out names.
"""

import dataclasses
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from d2f_fast import __version__
from d2f_fast.demo.evaluation_set import EvaluationSet
from d2f_fast.demo.kept_parts import KeptParts
from d2f_fast.demo.measurements import BASE, REFLOW, Measurements
from d2f_fast.demo.networks import (
    CONTINUED,
    STYLE,
    EmojiDataset,
    PipelineLoader,
    averaged_weights,
    make_trainer,
    set_weights,
    train_in_parts,
    training_items,
    with_merged_unet,
)
from d2f_fast.demo.report import write_report
from d2f_fast.demo.settings import DemoSettings
from d2f_fast.files.hashes import file_sha256
from d2f_fast.files.run_record import write_run_record
from d2f_fast.lora.merge import fuse_adapter
from d2f_fast.miniature import REFLOW_LORA, emoji, load_miniature
from d2f_fast.miniature.classifier import Classifier, load_classifier
from d2f_fast.models.base_model import BaseModel
from d2f_fast.stopping import StopRequestedError


def run_demo(
    output_dir: str | Path,
    seed: int = 0,
    settings: DemoSettings | None = None,
    load_pipeline: PipelineLoader = load_miniature,
    classifier: Classifier | None = None,
    reflow_lora: Path = REFLOW_LORA,
) -> Path:
    """Run the demo, and write the report, image grids, LoRA files and `metrics.json` into a folder.

    Finished trainings and measurements are kept in the folder until the report is written, so that a demo that was
    stopped goes on from them.

    Args:
        output_dir: output folder; it is made if it does not exist.
        seed: seed of training, noise and bootstrap.
        settings: sizes; None for those of `d2f demo`.
        load_pipeline: loads a new copy of the base model at each call, because training changes it.
        classifier: classifier that measures the images; None for the miniature's own.
        reflow_lora: reflow LoRA of the base model.

    Returns:
        Path of `report.html`.

    Raises:
        RefusedInputError: the folder holds parts of an unfinished demo with other settings.
        StopRequestedError: a signal arrived; the message says what is kept.
    """
    settings, started, output = settings or DemoSettings(), time.monotonic(), Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    base = BaseModel(load_pipeline())
    kept = KeptParts(output, _identity(settings, seed, base, reflow_lora))
    if done := len(kept):
        print(f"d2f: going on with an unfinished demo: {done} parts are finished in {kept.folder}", file=sys.stderr)
    try:
        sets = _evaluation_sets(settings, classifier or load_classifier(), seed)
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            progress = stack.enter_context(tqdm(total=forward_passes(settings), unit="pass", unit_scale=True))
            measurements = Measurements(settings, *sets, seed, progress)
            measure_base(base, measurements, kept)
            measure_reflow(load_pipeline, reflow_lora, measurements, kept)
            for network in CONTINUED:
                train_further(network, measurements, kept, load_pipeline, folder)
            train_style(measurements, kept, load_pipeline, folder, output)
        seconds = time.monotonic() - started + kept.seconds_taken
        report = write_report(output, measurements, seconds)
        write_run_record(output, "d2f demo", seed, seconds, measurements.rows)
    except StopRequestedError as stop:
        kept_now = f"{len(kept)} parts are finished in {kept.folder}: the same command goes on from them"
        raise StopRequestedError(stop.number, kept_now if len(kept) else "") from stop
    kept.remove()
    return report


def measure_base(base: BaseModel, measurements: Measurements, kept: KeptParts) -> None:
    """Measure the untouched base model.

    Args:
        base: the base model; its scheduler is replaced by DDIM's.
        measurements: measurements of the demo, to which these are added.
        kept: finished parts, which are not measured again.
    """
    kept.measure("same-images", measurements, lambda: measurements.measure_same_images(base))
    kept.measure("base-few-steps", measurements, lambda: measurements.measure_few_steps(base, BASE))
    kept.measure("base-style", measurements, lambda: measurements.measure_style(base, BASE))


def measure_reflow(
    load_pipeline: PipelineLoader, reflow_lora: Path, measurements: Measurements, kept: KeptParts
) -> None:
    """Measure the base model with the reflow LoRA.

    Args:
        load_pipeline: loads a new copy of the base model.
        reflow_lora: file of the LoRA.
        measurements: measurements of the demo, to which these are added.
        kept: finished parts, which are not measured again.
    """

    def measure() -> None:
        pipeline = load_pipeline()
        fuse_adapter(pipeline, reflow_lora, 1.0)
        measurements.measure_few_steps(BaseModel(pipeline), REFLOW)

    kept.measure("reflow-few-steps", measurements, measure)


def train_further(
    network: str, measurements: Measurements, kept: KeptParts, load_pipeline: PipelineLoader, folder: Path
) -> None:
    """Train one network on the style that the base knows, and measure it during training.

    Args:
        network: name of the network, a key of `CONTINUED`.
        measurements: measurements of the demo, to which the network's are added.
        kept: finished parts, which are neither trained nor measured again.
        load_pipeline: loads a new copy of the base model.
        folder: folder for the training run's own files.
    """
    settings, seed = measurements.settings, measurements.seed

    def train() -> Mapping[str, Tensor]:
        trainer = make_trainer(load_pipeline, settings, network, settings.learning_rate, seed, folder)
        dataset = EmojiDataset(training_items(range(len(emoji.names())), seed), "noto")

        def measure(step: int) -> None:
            model, flow = with_merged_unet(trainer.model), trainer.objective.flow
            measurements.measure_training(model, flow, network, step, settings.learning_rate)

        train_in_parts(trainer, dataset, settings.curve_points, measure)
        return {}

    kept.train(f"{network}-training", measurements, train)


def train_style(
    measurements: Measurements, kept: KeptParts, load_pipeline: PipelineLoader, folder: Path, output: Path
) -> None:
    """Train the LoRA of the second style, measure it, and save it.

    Args:
        measurements: measurements of the demo, to which the network's are added.
        kept: finished parts, which are neither trained nor measured again.
        load_pipeline: loads a new copy of the base model.
        folder: folder for the training run's own files.
        output: folder in which the folder "style" gets the LoRA files.
    """
    settings, seed = measurements.settings, measurements.seed
    trainer = make_trainer(load_pipeline, settings, STYLE, settings.style_learning_rate, seed, folder)

    def train() -> Mapping[str, Tensor]:
        dataset = EmojiDataset(training_items(names_of_style_training(), seed), "fluent")
        train_in_parts(trainer, dataset, settings.curve_points[-1:], lambda step: None)
        return averaged_weights(trainer)

    set_weights(trainer, kept.train("style-training", measurements, train), settings.curve_points[-1])
    with trainer.averaged():
        model = with_merged_unet(trainer.model)
    kept.measure("style", measurements, lambda: measurements.measure_style(model, STYLE))
    trainer.save_lora(output / STYLE)


def names_of_style_training() -> list[int]:
    """Return the names on which the second style is learned."""
    held_out = emoji.held_out_names()
    return [name for name in emoji.names_in_both_styles() if name not in held_out]


def _evaluation_sets(
    settings: DemoSettings, classifier: Classifier, seed: int
) -> tuple[EvaluationSet, EvaluationSet, EvaluationSet]:
    """Return what is measured on: the base's own style, then the second one for names in training and held-out ones."""

    def make(names: range | list[int], count: int, style: str) -> EvaluationSet:
        return EvaluationSet(
            names, count, classifier, style, settings.reference_images, seed, settings.bootstrap_repeats
        )

    return (
        make(range(len(emoji.names())), settings.images, "noto"),
        make(names_of_style_training(), settings.style_images, "fluent"),
        make(sorted(emoji.held_out_names()), settings.style_images, "fluent"),
    )


def _identity(settings: DemoSettings, seed: int, base: BaseModel, reflow_lora: Path) -> dict[str, object]:
    """Return everything that the results of a demo depend on, as far as another run could differ in it."""
    return {
        "seed": seed,
        **dataclasses.asdict(settings),
        "base model": base.fingerprint("unet", "vae", "text_encoder", most=4096),
        "reflow LoRA": file_sha256(reflow_lora),
        "version of d2f_fast": __version__,
        **{f"version of {name}": version(name) for name in ("torch", "diffusers", "peft")},
    }


def forward_passes(settings: DemoSettings) -> int:
    """Return the number of network evaluations for images that the progress bar expects; training is not counted."""
    same = 3 * 2 * settings.own_steps * settings.own_images
    curves = len(CONTINUED) * len(settings.curve_points) * settings.curve_evaluations * settings.images
    guided = sum(2 * (evaluations // 2) for evaluations in settings.evaluations)
    few_steps = (2 * sum(settings.evaluations) + guided) * settings.images
    style = 2 * 2 * 2 * (settings.style_evaluations // 2) * settings.style_images
    return same + curves + few_steps + style
