"""Run the whole method on the embedded miniature, measure it, and write one folder (`d2f demo`).

The base model knows one style of images. LoRA runs of equal length, data order and seeds teach it a second style: as
aligned flow matching (diff2flow), as naive flow matching (fm, fm_paper), and by its own loss (diffusion). Each network,
and the untouched base, then generates images with every sampler of `samplers`, from the same noise and with the same
guidance, so that each network can be compared at its best.

Work of the default settings, in forward passes of the UNet on one image, where guidance counts twice: training 4 x 160
steps x 32; quality 4 networks x 4 samplers x ((2 + 4) evaluations x 200 images + 8 x 128 + 25 x 48), and 4 x 4 x 200
for `fm_paper`, together 114,000; training curves 4 x 7 points x 4 x 128, 29,000; brightness 7 networks and samplers x 2
groups x 4 x 1000, 112,000. Each generated image is decoded once: 27,000 images.
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
from d2f_fast.demo.comparisons import comparisons
from d2f_fast.demo.evaluation_set import EvaluationSet
from d2f_fast.demo.kept_parts import KeptParts
from d2f_fast.demo.measurements import Measurements, ideal_brightness_rows
from d2f_fast.demo.networks import (
    NETWORKS,
    PipelineLoader,
    StyleDataset,
    averaged_weights,
    make_trainer,
    set_weights,
    train_in_parts,
    with_merged_unet,
)
from d2f_fast.demo.report import GridColumns, write_report
from d2f_fast.demo.samplers import SAMPLERS
from d2f_fast.demo.settings import DemoSettings, TunedSettings
from d2f_fast.evaluation import features as imagenet
from d2f_fast.files.run_record import write_run_record
from d2f_fast.miniature import emoji, load_miniature
from d2f_fast.miniature.classifier import Classifier, load_classifier
from d2f_fast.models.base_model import BaseModel, to_pil
from d2f_fast.stopping import StopRequestedError


def run_demo(
    output_dir: str | Path,
    seed: int = 0,
    settings: DemoSettings | None = None,
    load_pipeline: PipelineLoader = load_miniature,
    classifier: Classifier | None = None,
) -> Path:
    """Run the demo, and write the report, image grids, LoRA files and `metrics.json` into a folder.

    Finished trainings and measurements are kept in the folder until the report is written, so that a demo that was
    stopped goes on from them.

    Args:
        output_dir: output folder; it is made if it does not exist.
        seed: seed of training, noise and bootstrap; the learning rates were tuned with another seed.
        settings: sizes; None for those of `d2f demo`.
        load_pipeline: loads a new copy of the base model at each call, because training changes it.
        classifier: classifier that measures the images; None for the miniature's own.

    Returns:
        Path of `report.html`.

    Raises:
        RefusedInputError: the folder holds parts of an unfinished demo with other settings.
        StopRequestedError: a signal arrived; the message says what is kept.
    """
    settings, started, output = settings or DemoSettings(), time.monotonic(), Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    base = BaseModel(load_pipeline())
    kept = KeptParts(output, _identity(settings, seed, base))
    if done := len(kept):
        print(f"d2f: going on with an unfinished demo: {done} parts are finished in {kept.folder}", file=sys.stderr)
    names, count = sorted(emoji.held_out_names()), max(settings.images.values())
    try:
        evaluation_set = EvaluationSet(names, count, classifier or load_classifier(), seed)
        shown_positions = evaluation_set.one_of_each_colour(min(settings.images.values()))
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            progress = stack.enter_context(tqdm(total=forward_passes(settings), unit="pass", unit_scale=True))
            measurements = Measurements(settings, evaluation_set, seed, shown_positions, progress)
            measure_base(base, measurements, kept)
            for network in NETWORKS:
                train_and_measure(network, measurements, kept, load_pipeline, folder, output)
        rows = measurements.rows + comparisons(measurements.rows)
        columns = GridColumns(
            [evaluation_set.prompts[i] for i in shown_positions], to_pil(evaluation_set.real[shown_positions])
        )
        seconds = time.monotonic() - started + kept.seconds_taken
        report = write_report(output, rows, measurements.shown, columns, seed, seconds)
        write_run_record(output, "d2f demo", seed, seconds, rows)
    except StopRequestedError as stop:
        kept_now = f"{len(kept)} parts are finished in {kept.folder}: the same command goes on from them"
        raise StopRequestedError(stop.number, kept_now if len(kept) else "") from stop
    kept.remove()
    return report


def measure_base(base: BaseModel, measurements: Measurements, kept: KeptParts) -> None:
    """Measure the autoencoder, a perfect network and the base model.

    Args:
        base: the untouched base model.
        measurements: measurements of the demo, to which these are added.
        kept: finished parts, which are not measured again.
    """

    def measure_quality() -> None:
        measurements.measure_autoencoder(base)
        measurements.rows += ideal_brightness_rows(base.alignment)
        measurements.measure_quality(base, "base")

    kept.measure("base-quality", measurements, measure_quality)
    kept.measure("base-brightness", measurements, lambda: measurements.measure_brightness(base, "base"))


def train_and_measure(
    network: str,
    measurements: Measurements,
    kept: KeptParts,
    load_pipeline: PipelineLoader,
    folder: Path,
    output: Path,
) -> None:
    """Train one network, measure it during and after training, and save its LoRA.

    Args:
        network: name of the network, a key of `NETWORKS`.
        measurements: measurements of the demo, to which the network's are added.
        kept: finished parts, which are neither trained nor measured again.
        load_pipeline: loads a new copy of the base model.
        folder: folder for the training run's own files.
        output: folder in which a folder of the network's name gets the LoRA files.
    """
    tuned, held_out = TunedSettings.read(), emoji.held_out_names()
    settings = measurements.settings
    trainer = make_trainer(load_pipeline, settings, network, tuned.learning_rate[network], measurements.seed, folder)

    def measure(step: int) -> None:
        measurements.measure_training(with_merged_unet(trainer.model), network, tuned.sampler[network], step)

    def train() -> Mapping[str, Tensor]:
        dataset = StyleDataset([name for name in emoji.names_in_both_styles() if name not in held_out])
        train_in_parts(trainer, dataset, settings.curve_points(), measure)
        return averaged_weights(trainer)

    set_weights(trainer, kept.train(f"{network}-training", measurements, train), settings.training_steps)
    with trainer.averaged():
        model = with_merged_unet(trainer.model)
    kept.measure(f"{network}-quality", measurements, lambda: measurements.measure_quality(model, network))
    if not NETWORKS[network].negated:
        kept.measure(f"{network}-brightness", measurements, lambda: measurements.measure_brightness(model, network))
        trainer.save_lora(output / network)


def _identity(settings: DemoSettings, seed: int, base: BaseModel) -> dict[str, object]:
    """Return everything that the results of a demo depend on, as far as another run could differ in it."""
    return {
        "seed": seed,
        **dataclasses.asdict(settings),
        "base model": base.fingerprint("unet", "vae", "text_encoder", most=4096),
        "tuned settings": dataclasses.asdict(TunedSettings.read()),
        "ImageNet features": imagenet.is_installed(),
        "version of d2f_fast": __version__,
        **{f"version of {name}": version(name) for name in ("torch", "diffusers", "peft")},
    }


def forward_passes(settings: DemoSettings) -> int:
    """Return the number of network evaluations, counted in images, that the progress bar expects."""
    evaluations = settings.curve_evaluations
    only_curve = sum(network.curve_evaluations_only for network in NETWORKS.values())
    whole = 1 + len(NETWORKS) - only_curve  # The base is measured like a finetuned network.
    quality = whole * sum(len(SAMPLERS) * steps * count for steps, count in settings.images.items())
    quality += only_curve * len(SAMPLERS) * evaluations * settings.images.get(evaluations, 0)
    # At two evaluations DPM-Solver++ is DDIM for all of these networks but the naive-flow one.
    quality -= (whole - 1) * 2 * settings.images.get(2, 0)
    curves = len(NETWORKS) * len(settings.curve_points()) * settings.curve_images * evaluations
    # Two samplers and two groups of captions for each network, but a single sampler for naive flow.
    brightness = (2 * whole - 1) * 2 * settings.brightness_images * evaluations
    return quality + curves + brightness
