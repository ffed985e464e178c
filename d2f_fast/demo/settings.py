"""Sizes of the demo."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of a demo.

    Args:
        own_steps: steps of the base's own sampler, in the comparison of the same images.
        own_images: number of images in that comparison.
        curve_points: training steps at which a run is measured, rising from 0; the last one is the length of each run.
        images: number of images of the base's own style in every other measurement of it.
        reference_images: largest number of real images that generated ones are compared with.
        curve_evaluations: network evaluations for each image of a run, without guidance.
        batch_size: images in one training step.
        rank: rank of the LoRA layers, which adapt attention and feed-forward layers as common LoRA files do.
        learning_rate: constant learning rate of continued training, the same for every objective.
        style_learning_rate: constant learning rate of training on the second style.
        ema_decay: decay of the moving average of the trained weights, in [0, 1).
        guidance_scale: scale of classifier-free guidance, where an image is generated with it.
        evaluations: numbers of network evaluations of the few-step comparison, rising; guidance counts twice.
        style_images: number of images of the second style, for names in training and for held-out names.
        style_evaluations: network evaluations for each of these; guidance counts twice.
        bootstrap_repeats: resamplings behind each interval of a Fréchet distance.
    """

    own_steps: int = 25
    own_images: int = 16
    curve_points: tuple[int, ...] = (0, 10, 20, 40, 80, 160)
    images: int = 200
    reference_images: int = 2000
    curve_evaluations: int = 4
    batch_size: int = 16
    rank: int = 16
    learning_rate: float = 1e-3
    style_learning_rate: float = 2e-3
    ema_decay: float = 0.99
    guidance_scale: float = 2.0
    evaluations: tuple[int, ...] = (1, 2, 4, 25)
    style_images: int = 200
    style_evaluations: int = 8
    bootstrap_repeats: int = 100
