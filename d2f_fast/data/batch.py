"""The batch that the data loader yields and that a training step takes."""

import math
from collections.abc import Mapping
from typing import TypedDict

from torch import Tensor

from d2f_fast.errors import RefusedInputError

_MAX_PIXEL = 1.01  # Resizing and half precision may lead a little beyond 1.


class Batch(TypedDict, total=False):
    """One process' slice of the global batch: images and texts of b samples, on any device.

    Images are given in one of three forms, texts in one of two. Every other key may be left out.

    Attributes:
        latents: [b, C, h, w] floating; latents in the unit-variance scale of the network. First form of the images.
        mean, std: [b, C, h, w] floating; mean and standard deviation of the autoencoder's posterior, not scaled. Each
            step samples new latents from them. Second form of the images.
        pixel_values: [b, 3, H, W] floating in [-1, 1]; images that the step encodes. Third form of the images.
        context: [b, k · C, h, w] floating; latents, in the scale of the network, of the k images that the network sees
            before its own latents. Only for a network that takes them, see `BaseModel.see_images`.
        noise: [b, C, h, w] floating; start of the flow that belongs to the latents: the noise of each pair, or zeros.
            Left out, each step samples noise.
        source: [b, C, h, w] floating; latents, in the scale of the network, of the images that the flow starts from.
            Left out, it starts from noise.
        source_noise: share of noise in that start, in [0, 1]; see `noised_source`. 0 where it is left out.
        encoder_hidden_states: [b, L, D] floating; output of the text encoder. First form of the texts.
        input_ids: [b, L] int64; token ids that the step encodes. Second form of the texts, for models with one text
            encoder.
        added_cond_kwargs: further inputs of the network, [b, ...] each: for SDXL "text_embeds" [b, P], the pooled text,
            and "time_ids" [b, 6], the sizes in pixels. None or left out where the network takes none.
        mask: [b or 1, C or 1, h or 1, w or 1]; weight of each element in the loss, not negative. None or left out
            weights all elements alike.
        offset: position of this slice's first sample in the global batch; 0 where it is left out.
        global_batch_size: number of samples in the global batch of all processes; b where it is left out.
    """

    latents: Tensor
    mean: Tensor
    std: Tensor
    pixel_values: Tensor
    context: Tensor
    noise: Tensor
    source: Tensor
    source_noise: float
    encoder_hidden_states: Tensor
    input_ids: Tensor
    added_cond_kwargs: Mapping[str, Tensor] | None
    mask: Tensor | None
    offset: int
    global_batch_size: int


def check_batch(batch: Batch) -> None:
    """Refuse a batch whose tensors do not belong to one set of samples.

    Raises:
        RefusedInputError: a key is missing, a tensor has another type or shape, the numbers of samples differ, or
            `source_noise` has no source or is outside [0, 1].
    """
    given: Mapping[str, object] = batch
    images = next((name for name in ("latents", "mean", "pixel_values") if name in given), None)
    texts = next((name for name in ("encoder_hidden_states", "input_ids") if name in given), None)
    if images is None or texts is None:
        wanted = "encoder_hidden_states or input_ids" if images else "latents or pixel_values"
        raise RefusedInputError(f"a batch needs {wanted}, got {', '.join(given) or 'nothing'}")
    if images == "mean" and "std" not in given:
        raise RefusedInputError(f"a batch with mean needs std, got {', '.join(given)}")
    if "noise" in given and images != "latents":
        raise RefusedInputError(f"a batch with noise needs the latents that it belongs to, got {', '.join(given)}")
    if "source" in given and images == "pixel_values":
        raise RefusedInputError("a batch with source needs latents, or mean and std, got pixel_values: encode them")
    further = [name for name in ("noise", "source", "context", "mask") if given.get(name) is not None]
    maps = [images, *(["std"] if images == "mean" else []), *further]
    values = {name: given[name] for name in (*maps, texts)} | dict(batch.get("added_cond_kwargs") or {})
    tensors: dict[str, Tensor] = {}
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise RefusedInputError(f"{name} must be a tensor, got {type(value).__name__}")
        tensors[name] = value
    for name in maps:
        if tensors[name].ndim != 4 or not (tensors[name].is_floating_point() or name == "mask"):
            got = f"{list(tensors[name].shape)} {tensors[name].dtype}"
            raise RefusedInputError(f"{name} must be floating, [samples, channels, height, width], got {got}")
    if (share := batch.get("source_noise", 0.0)) and "source" not in given:
        raise RefusedInputError(f"source_noise {share} needs source, the latents that the flow starts from: add them")
    if not 0 <= share <= 1:
        raise RefusedInputError(f"source_noise must be in [0, 1], got {share}: give the share of noise in the start")
    for name in tensors.keys() & {"noise", "source"}:
        if tensors[name].shape != tensors[images].shape:
            shapes = f"{list(tensors[name].shape)} and {list(tensors[images].shape)}"
            raise RefusedInputError(f"{name} and {images} must have the same shape, got {shapes}")
    count = len(tensors[images])
    for name, value in tensors.items():
        if len(value) != count and not (name == "mask" and len(value) == 1):
            raise RefusedInputError(
                f"{name} has {len(value)} samples and {images} {count}: all tensors of a batch need the same number"
            )


def check_values(batch: Batch, vocabulary: int | None = None) -> None:
    """Refuse a batch that `check_batch` accepts and whose values are outside their ranges. Waits for the device.

    Args:
        batch: batch of the first step.
        vocabulary: number of tokens that the text encoder knows; None where there are no token ids.

    Raises:
        RefusedInputError: a value is outside its range.
    """
    given: Mapping[str, object] = batch
    cures = {"pixel_values": "divide values of 0 to 255 by 127.5 and subtract 1", "std": "give standard deviations"}
    limits = {
        "pixel_values": (-_MAX_PIXEL, _MAX_PIXEL, "in [-1, 1]"),
        "std": (0.0, math.inf, "0 or larger"),
        "mask": (0.0, math.inf, "0 or larger"),
        "input_ids": (0.0, math.inf if vocabulary is None else vocabulary - 1.0, f"in [0, {vocabulary})"),
    }
    for name, (least, most, allowed) in limits.items():
        value = given.get(name)
        if not isinstance(value, Tensor) or not value.numel():
            continue
        low, high = (float(end) for end in value.detach().float().aminmax())
        if low < least or high > most:  # NaN is neither: steps that are not finite are skipped and counted.
            cure = cures.get(name, "check how the batch is made")
            raise RefusedInputError(f"{name} must be {allowed}, got {low:g} to {high:g}: {cure}")
