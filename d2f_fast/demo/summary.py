"""Put the demo's numbers into words; the same sentences serve wins and losses."""

from collections.abc import Sequence

from d2f_fast.demo.rows import Row, Section, best_within, excess, select, training_curve, verdict

VERBS = {"better": "is lower than", "worse": "is higher than", "level": "cannot be distinguished from"}
EARLY = 20  # training steps of the aligned LoRA that are compared with a whole run of the naive one


def readings(rows: Sequence[Row]) -> dict[Section, list[str]]:
    """Return what the numbers of each section say, a sentence or two for each."""
    return {
        "same_images": _same_images(rows),
        "continued": _continued(rows),
        "few_steps": _few_steps(rows),
        "style": _style(rows),
    }


def _distance(row: Row) -> str:
    return f"{row['frechet_distance']:.3g} ({row['frechet_low']:.3g} to {row['frechet_high']:.3g})"


def _same_images(rows: Sequence[Row]) -> list[str]:
    """Say how much the images of the two samplers differ."""
    (row,) = select(rows, "same_images")
    return [
        f"The untouched weights, sampled by the base's own DDIM and by Euler's method along the flow between the same"
        f" {row['steps']} times, give the same {row['samples']} images: no pixel differs by more than"
        f" {row['largest_difference']:.2g} of 255."
    ]


def _continued(rows: Sequence[Row]) -> list[str]:
    """Compare the early aligned LoRA with the naive one after its whole training, and say where each begins."""
    aligned, naive, diffusion = (training_curve(rows, name) for name in ("diff2flow", "fm", "diffusion"))
    early, row = next(pair for pair in reversed(aligned) if pair[0] <= EARLY)
    last, other = naive[-1]
    return [
        f"After {early} training steps the aligned LoRA has a Fréchet distance (lower is better) of {_distance(row)},"
        f" which {VERBS[verdict(row, other)]} that of the naive LoRA after {last}: {_distance(other)}.",
        f"Before training, the aligned network is the base, with {aligned[0][1]['frechet_distance']:.3g}, and the"
        f" naive one has {naive[0][1]['frechet_distance']:.3g}. After {last} steps the aligned LoRA has"
        f" {aligned[-1][1]['frechet_distance']:.3g}, and the LoRA with the diffusion loss"
        f" {diffusion[-1][1]['frechet_distance']:.3g}. Other real images have {other['frechet_floor']:.3g}.",
    ]


def _few_steps(rows: Sequence[Row]) -> list[str]:
    """Compare the reflow LoRA with the base at the best of its settings."""
    counts = sorted({row["allowed"] for row in select(rows, "few_steps", network="reflow")})
    few, most = [count for count in counts if count <= 2], counts[-1]
    sentences = []
    for count in few:
        (ours,), base = (
            select(rows, "few_steps", network="reflow", evaluations=count),
            best_within(rows, "base", few[-1]),
        )
        sentences.append(
            f"With {_times(count)} for each image, the reflow LoRA has a Fréchet distance of {_distance(ours)}, which"
            f" {VERBS[verdict(ours, base)]} that of the base at the best of its settings with at most {few[-1]},"
            f" {_distance(base)}."
        )
    teacher = best_within(rows, "base", most)
    sentences.append(
        f"With at most {_times(most)} the base reaches {_distance(teacher)}; other real images have"
        f" {teacher['frechet_floor']:.3g}."
    )
    return sentences


def _times(count: int) -> str:
    return f"{count} network evaluation{'' if count == 1 else 's'}"


def _style(rows: Sequence[Row]) -> list[str]:
    """Give distance and right names of the style LoRA and of the base."""
    sentences = []
    for names, of_names in (("trained", "names in the training"), ("held out", "names that it never saw")):
        (ours,), (base,) = (select(rows, "style", network=network, names=names) for network in ("style", "base"))
        sentences.append(
            f"On {of_names}, the LoRA's images are {excess(ours):.3g} above real images of the second style"
            f" (the base's {excess(base):.3g}), and {ours['name_top5']:.0%} have the right name among the classifier's"
            f" first five (the base's {base['name_top5']:.0%})."
        )
    return sentences
