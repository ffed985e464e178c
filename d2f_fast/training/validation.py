"""Measure the loss on held-out samples, in equal segments of flow time.

Samples, noise and times are the same at each measurement, so that two of them differ by the network alone. No random
number of the training is used.
"""

from collections.abc import Mapping, Sequence

from d2f_fast.config import TrainingConfig
from d2f_fast.data.order import Augmentation, BatchPlan
from d2f_fast.models.base_model import BaseModel
from d2f_fast.training.batches import TrainingData, loader_and_encoder
from d2f_fast.training.inputs import InputSampler, StepInputs
from d2f_fast.training.step import TrainingStep

SEGMENTS = 8
MOST_SAMPLES = 64
# An image is not mirrored and cropped in the middle, and the first of several captions is taken.
_PLAIN = Augmentation(flip=1.0, crop=(0.5, 0.5), caption=0.0)


class Validation:
    """Measure the loss of a network on the same inputs each time.

    Args:
        inputs: Inputs of the network, whose times t in [0, 1) are positions within a segment.
        step: Training step, which computes the loss.
    """

    def __init__(self, inputs: Sequence[StepInputs], step: TrainingStep) -> None:
        self._inputs, self._step = list(inputs), step

    def measure(self) -> list[float]:
        """Return the mean loss of each segment, from that of the noise to that of the images.

        A run that distills has the time 0 alone, and one loss.
        """
        count = sum(len(part.latents) for part in self._inputs)
        distills = self._step.objective.distill
        losses = []
        for segment in range(1 if distills else SEGMENTS):
            times = (part.t * 0 if distills else (segment + part.t) / SEGMENTS for part in self._inputs)
            moved = (part._replace(t=t) for part, t in zip(self._inputs, times, strict=True))
            losses.append(sum(self._step.losses(part).double().sum().item() for part in moved) / count)
        return losses


def start_validation(
    dataset: TrainingData,
    model: BaseModel,
    config: TrainingConfig,
    fingerprints: Mapping[str, str],
    inputs: InputSampler,
    step: TrainingStep,
) -> Validation:
    """Encode held-out samples, of which 64 at most are used, evenly over the data set.

    Args:
        dataset: Held-out samples.
        model: Base model of the run.
        config: Options of the run.
        fingerprints: Hashes of the base model before training; see `BaseModel.fingerprints`.
        inputs: Makes inputs of batches.
        step: Training step of the run.

    Raises:
        RefusedInputError: A sample cannot be used, or pairs do not fit the model.
    """
    count = min(len(dataset), MOST_SAMPLES)
    indices = [position * len(dataset) // count for position in range(count)]
    load, encode = loader_and_encoder(dataset, model, config, fingerprints)
    parts = []
    for first in range(0, count, config.train_batch_size):
        index = indices[first : first + config.train_batch_size]
        plan = BatchPlan(0, index, [_PLAIN] * len(index), len(index), 0)
        parts.append(inputs.fixed(encode(plan, load(plan)), index))
    return Validation(parts, step)
