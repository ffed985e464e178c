"""Write the results of `d2f evaluate` as rows of metrics.json and as tables."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from d2f_fast.evaluation.comparison import Comparison
    from d2f_fast.evaluation.image_set import Features
    from d2f_fast.miniature.classifier import Classifier

# Below this number of images a table says that they are few.
_MANY_IMAGES = 100


def comparison_entries(compared: "Comparison") -> dict[str, Any]:
    """Return the entries of metrics.json of a comparison; "floor" stands for real images against real ones."""
    return {
        "samples": compared.compared,
        "reference_samples": compared.against,
        "frechet_distance": compared.distance.value,
        "frechet_low": compared.distance.low,
        "frechet_high": compared.distance.high,
        "frechet_floor": compared.floor,
        **asdict(compared.generated),
        **{f"{name}_floor": value for name, value in asdict(compared.real).items()},
    }


def name_entries(
    features: "Features", captions: Sequence[str | None], classifier: "Classifier", device: "torch.device"
) -> dict[str, Any]:
    """Return how many images show the emoji of their caption, or no entries where no caption names an emoji.

    Args:
        features: features of the images by the classifier, [N, 64].
        captions: caption of each image; None where it has none.
        classifier: classifier on the device.
        device: its device.
    """
    import torch

    from d2f_fast.evaluation.accuracy import name_accuracy
    from d2f_fast.miniature.emoji import name_of_caption

    found = {i: name for i, text in enumerate(captions) if text and (name := name_of_caption(text)) is not None}
    if not found:
        return {}
    with torch.no_grad():
        logits = classifier.name_head(torch.from_numpy(features[list(found)]).to(device)).cpu()
    names = torch.tensor(list(found.values()))
    return {
        "name_top1": name_accuracy(logits, names),
        "name_top5": name_accuracy(logits, names, top=5),
        "name_samples": len(found),
    }


def comparison_table(row: Mapping[str, Any]) -> list[str]:
    """Return the lines of the table of a comparison.

    Args:
        row: row of metrics.json.
    """
    cells = [
        ("", "generated", "95 % interval", "real images", ""),
        (
            "Fréchet distance",
            f"{row['frechet_distance']:.4g}",
            f"{row['frechet_low']:.4g} … {row['frechet_high']:.4g}",
            f"{row['frechet_floor']:.4g}",
            "lower is better",
        ),
    ]
    for name in ("precision", "recall", "coverage"):
        cells.append((name, f"{row[name]:.3f}", "", f"{row[f'{name}_floor']:.3f}", "higher is better"))
    if "name_samples" in row:
        for name, top in (("right name", "name_top1"), ("right name among 5", "name_top5")):
            cells.append((name, f"{row[top]:.3f}", "", "", "higher is better"))
    made = str(row["images"]) if "images" in row else _made(row)
    return [
        f"{row['samples']} generated images ({made}) and, for comparison, {row['samples']} real ones,"
        f" against {row['reference_samples']} other real ones; {row['features']} features, seed {row['seed']}",
        *_aligned(cells),
        *_doubts(row),
    ]


def straightness_table(row: Mapping[str, Any]) -> list[str]:
    """Return the lines of the table of straightness.

    Args:
        row: row of metrics.json.
    """
    cells: list[tuple[str, ...]] = [("flow time", "deviation", "curvature", "step error")]
    count = len(row["deviation"])
    for i, values in enumerate(zip(row["deviation"], row["curvature"], row["step_error"], strict=True)):
        cells.append((f"{i / count:g} … {(i + 1) / count:g}", *(f"{value:.4g}" for value in values)))
    cells.append(("all", f"{row['mean_deviation']:.4g}", "", ""))
    return [f"{paths_title(row)}; lower is better, and a straight path has 0", *_aligned(cells)]


def paths_title(row: Mapping[str, Any]) -> str:
    """Return a sentence of whose paths a row of straightness describes."""
    return (
        f"Straightness of {row['paths']} paths of {_model(row)}, {row['prompts']} prompts, guidance"
        f" {row['guidance_scale']:g}, seed {row['seed']}"
    )


def _doubts(row: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line on generated images that were not compared, and one on too few images to rely on the numbers."""
    compared, generated = row["samples"], row["generated_images"]
    if compared < generated:
        names = "; the right name is looked for in all of them" if "name_samples" in row else ""
        yield (
            f"  {compared} of the {generated} generated images, chosen at random, are compared: half as many as the"
            f" {row['real_images']} real images{names}"
        )
    if compared < _MANY_IMAGES:
        yield (
            f"  {compared} images are few: precision, recall and coverage can be high by chance, and small differences"
            f" mean nothing; compare {_MANY_IMAGES} or more"
        )


def _made(row: Mapping[str, Any]) -> str:
    """Return how images were generated."""
    return f"{_model(row)}, {row['steps']} steps of {row['method']}, guidance {row['guidance_scale']:g}"


def _model(row: Mapping[str, Any]) -> str:
    """Return the names of the model and its LoRA."""
    return " + ".join([row["model"], *row["lora"]])


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Return lines in which the columns of a table are aligned."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  " + "  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
