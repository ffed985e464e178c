"""Measure how much of the real pictures' brightness spread is kept, and compute it for an ideal network."""

import itertools

from torch import Tensor

from d2f_fast.evaluation.distances import Array, Interval, bootstrap_interval
from d2f_fast.flow.alignment import Alignment


def mean_brightness(pictures: Tensor) -> Array:
    """Mean over channels and pixels of each picture, [B]."""
    return pictures.double().flatten(1).mean(1).cpu().numpy()


def grey_bias(pictures: Tensor, real: Tensor, repeats: int = 1000, seed: int = 0) -> Interval:
    """Spread of the mean brightness of pictures as a share of the real ones': 1 is none, below 1 is grey.

    Args:
        pictures, real: [B, C, H, W] and [R, C, H, W], drawn from the same captions, in the same units.
        repeats: of the bootstrap, which resamples both.
        seed: of the bootstrap.
    """
    return bootstrap_interval(
        lambda drawn, wanted: float(drawn.std(ddof=1) / wanted.std(ddof=1)),
        mean_brightness(pictures),
        mean_brightness(real),
        repeats=repeats,
        seed=seed,
    )


def gaussian_grey_bias(alignment: Alignment, shape: tuple[int, ...], variance: float, times: Tensor) -> float:
    """Share of the brightness spread that a perfect network keeps for Gaussian data: closed form, nothing is drawn.

    The latents are N(0, Σ), and the mean of each channel has variance `variance`. Along that one direction the ideal
    network and Euler's method are linear maps of a number, so its variance is propagated exactly. The direction's own
    variance is height * width * variance, which is why the effect grows with the size of the latents.

    Args:
        alignment: of the schedule and the prediction type.
        shape: (channels, height, width) of the latents.
        variance: of a channel's mean over the picture.
        times: [steps + 1] flow times; at times[0] the diffusion state is drawn from N(0, 1), as samplers do.
    """
    data = variance * shape[-1] * shape[-2]
    times = times.double()
    x_t = alignment.state_scale(times[0])
    for t, t_next in itertools.pairwise(times):
        # The ideal network reads the state it is given at the noise level it is told, which is the clipped one.
        alpha, sigma = alignment.coefficients(t)
        p, q = alignment.velocity_coefficients(t)
        sample = x_t / alignment.state_scale(t)
        latents = alpha * data / (alpha.square() * data + sigma.square()) * sample
        noise = sigma / (alpha.square() * data + sigma.square()) * sample
        output = {"epsilon": noise, "v_prediction": alpha * noise - sigma * latents, "sample": latents}
        x_t = x_t + (t_next - t) * (p * sample + q * output[alignment.prediction_type])
    return (x_t.abs() / data**0.5).item()
