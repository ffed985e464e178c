"""Measure how much of the real images' spread of brightness is kept, and compute it for an ideal network.

In training the schedule's last timestep still shows the brightness of the image through the noise. Stock samplers
start there from noise alone, so that all generated images tend to a medium brightness: they have a grey bias.
"""

import itertools

from torch import Tensor

from d2f_fast.evaluation.distances import Array, Interval, bootstrap_interval
from d2f_fast.flow.alignment import Alignment


def mean_brightness(images: Tensor) -> Array:
    """Return the mean of each image [B, C, H, W] over channels and pixels, as a float64 array [B]."""
    means: Array = images.double().flatten(1).mean(1).cpu().numpy()
    return means


def grey_bias(images: Tensor, real: Tensor, repeats: int = 1000, seed: int = 0) -> Interval:
    """Measure the spread of the images' mean brightness, divided by the real images' spread.

    A ratio of 1 means no grey bias; below 1 the images are closer to one common brightness than real ones.

    Args:
        images: generated images [B, C, H, W].
        real: real images of the same captions, [R, C, H, W], in the same units.
        repeats: resamplings of the bootstrap, which resamples both sets.
        seed: seed of the bootstrap.

    Returns:
        The ratio of the standard deviations with its 95 % interval.
    """
    return bootstrap_interval(
        lambda generated, wanted: float(generated.std(ddof=1) / wanted.std(ddof=1)),
        mean_brightness(images),
        mean_brightness(real),
        repeats=repeats,
        seed=seed,
    )


def gaussian_grey_bias(alignment: Alignment, shape: tuple[int, ...], variance: float, times: Tensor) -> float:
    """Compute the fraction of the brightness spread that an ideal network keeps for Gaussian data, in closed form.

    The latents are N(0, Σ), and the mean of each channel has variance `variance`. Along that one direction the ideal
    network and Euler's method are linear maps of a number, so its variance is propagated exactly. The direction's own
    variance is height * width * variance, so the effect grows with the size of the latents.

    Args:
        alignment: alignment with the schedule and the prediction type of the network.
        shape: shape (channels, height, width) of the latents.
        variance: variance of a channel's mean over the latents.
        times: flow times [steps + 1]; the diffusion state at times[0] is N(0, 1), as samplers take it.

    Returns:
        Final standard deviation divided by the data's; 1 means that all of the spread is kept.
    """
    data = variance * shape[-1] * shape[-2]
    times = times.double()
    x_t = alignment.state_scale(times[0])
    for t, t_next in itertools.pairwise(times):
        # The ideal network assumes the noise level that belongs to the timestep it is fed, which the table clips.
        alpha, sigma = alignment.coefficients(t)
        p, q = alignment.velocity_coefficients(t)
        sample = x_t / alignment.state_scale(t)
        latents = alpha * data / (alpha.square() * data + sigma.square()) * sample
        noise = sigma / (alpha.square() * data + sigma.square()) * sample
        output = {"epsilon": noise, "v_prediction": alpha * noise - sigma * latents, "sample": latents}
        x_t = x_t + (t_next - t) * (p * sample + q * output[alignment.prediction_type])
    return float(x_t.abs() / data**0.5)
