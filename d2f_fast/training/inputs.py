"""Turn a batch into the inputs of one step: latents, noise, time and condition, on the device.

All random numbers of a step come from one generator that is seeded by (seed, step). They are sampled for the global
batch, and each process takes the slice of its own samples: a run resumes bit for bit, and the number of processes
changes nothing.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from d2f_fast.data.batch import Batch, check_values
from d2f_fast.errors import RefusedInputError
from d2f_fast.flow.formulas import noised_source
from d2f_fast.models.base_model import BaseModel
from d2f_fast.training.objective import Objective

_FIXED_SEED = 0


class StepInputs(NamedTuple):
    """Inputs of one step: this process' slice of the batch, with noise and t sampled.

    Attributes:
        latents, noise: [b, C, h, w] float32; the noise is that of the batch where it has one, which may be zeros. Where
            the flow starts from images, it is their latents, noised as the batch says.
        t: [b] float32 flow times in [0, 1].
        condition: "encoder_hidden_states" [b, L, D], "context" [b, k · C, h, w] where the network sees images, and the
            other inputs of the network, [b, ...] each.
        mask: weight of each element, broadcastable to the latents; None weights all alike.
        global_size: number of samples in the global batch, over which the loss is the mean.
    """

    latents: Tensor
    noise: Tensor
    t: Tensor
    condition: dict[str, Tensor]
    mask: Tensor | None
    global_size: int

    def part(self, first: int, size: int) -> "StepInputs":
        """Return the micro-batch of `size` samples that begins at sample `first`, as views."""
        cut = slice(first, first + size)
        condition = {name: value[cut] for name, value in self.condition.items()}
        mask = self.mask if self.mask is None or len(self.mask) == 1 else self.mask[cut]
        return StepInputs(self.latents[cut], self.noise[cut], self.t[cut], condition, mask, self.global_size)


class InputSampler:
    """Sample the inputs of each step from its batch.

    Args:
        model: base model on its device; it encodes images, tokens and the empty prompt.
        objective: gives the density of the flow times.
        seed: seed of the run, in [0, 2**63).
        caption_dropout: probability in [0, 1) that a caption is replaced by the empty one; 0 keeps all captions.
    """

    def __init__(self, model: BaseModel, objective: Objective, seed: int, caption_dropout: float) -> None:
        self._model, self._objective, self._seed, self._caption_dropout = model, objective, seed, caption_dropout
        self._device = model.device
        self._empty_condition: dict[str, Tensor] | None = None
        self._checks_values = True

    def sample(self, batch: Batch, step: int) -> StepInputs:
        """Return the inputs of a step.

        Args:
            batch: this process' slice of the global batch.
            step: number of optimizer steps taken before this one.

        Raises:
            RefusedInputError: the batch has another context than the network takes; or, in the first batch, a value is
                outside its range. Later ones are not read, because that would wait for the device.
        """
        if self._checks_values:
            tokens = self._model.pipeline.text_encoder.get_input_embeddings() if "input_ids" in batch else None
            check_values(batch, None if tokens is None else tokens.num_embeddings)
            self._checks_values = False
        check_context(batch, self._model)
        generator = torch.Generator(self._device).manual_seed(step_seed(self._seed, step))
        posterior = self._posterior(batch)
        shape = next(iter(posterior.values())).shape
        offset, global_size = batch.get("offset", 0), batch.get("global_batch_size", shape[0])
        own = slice(offset, offset + shape[0])

        def gaussian() -> Tensor:
            return torch.randn(global_size, *shape[1:], generator=generator, device=self._device)[own]

        # The order is part of what a seed means: posterior, noise, times, dropout.
        posterior_noise, noise = gaussian(), gaussian()
        noise = self._start(batch, noise)
        t = self._objective.sample_times(global_size, generator, self._device)[own]
        dropped = torch.rand(global_size, generator=generator, device=self._device)[own] < self._caption_dropout
        if "latents" in posterior:
            latents = posterior["latents"]
        else:
            latents = self._model.scale_latents(posterior["mean"] + posterior["std"] * posterior_noise)
        if self._device.type == "cuda":
            latents, noise = (x.contiguous(memory_format=torch.channels_last) for x in (latents, noise))
        mask = batch.get("mask")
        mask = None if mask is None else self._on_device(mask)
        return StepInputs(latents, noise, t, self._condition(batch, dropped), mask, global_size)

    def fixed(self, batch: Batch, index: Sequence[int]) -> StepInputs:
        """Return inputs that are the same each time: mean latents, all captions, and noise and times of the samples.

        Args:
            batch: samples.
            index: number of each sample, which decides its noise and its time t in [0, 1).

        Raises:
            RefusedInputError: the batch has another context than the network takes.
        """
        check_context(batch, self._model)
        posterior = self._posterior(batch)
        latents = posterior["latents"] if "latents" in posterior else self._model.scale_latents(posterior["mean"])
        noise, t = [], []
        for number in index:
            generator = torch.Generator().manual_seed(step_seed(_FIXED_SEED, number))
            t.append(torch.rand((), generator=generator))
            noise.append(torch.randn(latents.shape[1:], generator=generator))
        own = self._start(batch, torch.stack(noise).to(self._device))
        if self._device.type == "cuda":
            latents, own = (x.contiguous(memory_format=torch.channels_last) for x in (latents, own))
        mask = batch.get("mask")
        none = torch.zeros(len(index), dtype=torch.bool, device=self._device)
        condition = self._condition(batch, none)
        mask = None if mask is None else self._on_device(mask)
        return StepInputs(latents, own, torch.stack(t).to(self._device), condition, mask, len(index))

    def _start(self, batch: Batch, noise: Tensor) -> Tensor:
        """Return the start of the flow: the sampled noise, that of the batch, or noised latents of source images."""
        if "noise" in batch:
            noise = self._on_device(batch["noise"]).float()
        if "source" not in batch:
            return noise
        return noised_source(self._on_device(batch["source"]).float(), noise, batch.get("source_noise", 0.0))

    def empty_condition(self) -> dict[str, Tensor]:
        """Return the condition of the empty prompt, [1, ...] each, encoded once; empty if no caption is dropped."""
        if self._empty_condition is None:
            self._empty_condition = self._model.empty_condition() if self._caption_dropout else {}
        return self._empty_condition

    def _posterior(self, batch: Batch) -> dict[str, Tensor]:
        """Return "latents" in the network's scale, or the posterior's "mean" and "std", on the device in float32."""
        if "latents" in batch:
            return {"latents": self._on_device(batch["latents"]).float()}
        if "mean" in batch:
            posterior = {"mean": batch["mean"], "std": batch["std"]}
        else:
            posterior = self._model.encode_images(batch["pixel_values"])
        return {name: self._on_device(value).float() for name, value in posterior.items()}

    def _condition(self, batch: Batch, dropped: Tensor) -> dict[str, Tensor]:
        """Return everything that conditions the network, [b, ...] each, with the empty prompt where it is dropped.

        Args:
            batch: this process' slice of the global batch.
            dropped: [b] bool, True where the caption is replaced by the empty one.
        """
        if "encoder_hidden_states" in batch:
            condition = {"encoder_hidden_states": batch["encoder_hidden_states"]}
        else:
            with torch.no_grad():
                ids = self._on_device(batch["input_ids"])
                condition = {"encoder_hidden_states": self._model.pipeline.text_encoder(ids)[0]}
        condition |= batch.get("added_cond_kwargs") or {}
        if "context" in batch:
            condition["context"] = batch["context"]
        # Cast to the type of the frozen weights, which may differ from that of the text encoder or the cache. Sizes
        # stay as they are: bfloat16 would round them.
        dtype = self._model.unet.conv_in.weight.dtype
        condition = {name: self._on_device(value) for name, value in condition.items()}
        condition = {name: x if name == "time_ids" else x.to(dtype) for name, x in condition.items()}
        for name, empty in self.empty_condition().items():
            if name in condition:
                expanded = dropped.reshape(-1, *(1,) * (condition[name].ndim - 1))
                condition[name] = torch.where(expanded, empty.to(condition[name].dtype), condition[name])
        return condition

    def _on_device(self, tensor: Tensor) -> Tensor:
        """Return the tensor on the device; a GPU fetches it while the host goes on."""
        if self._device.type == "cuda" and tensor.device.type == "cpu":
            return tensor.pin_memory().to(self._device, non_blocking=True)
        return tensor.to(self._device)


def check_context(batch: Batch, model: BaseModel) -> None:
    """Refuse a batch without the context that the network takes, or with one that it does not take.

    Args:
        batch: this process' slice of the global batch.
        model: base model of the run.

    Raises:
        RefusedInputError: the number of channels is another one.
    """
    got = batch["context"].shape[1] if "context" in batch else 0
    wanted = model.unet.config.in_channels - model.unet.config.out_channels
    if got != wanted:
        raise RefusedInputError(
            f"context must have the {wanted} channels that the network takes beside its own latents, got {got}: give a"
            " batch with the latents of the images, or a network that sees none"
        )


def step_seed(seed: int, step: int) -> int:
    """Return the seed of a step's generator: 63 bits, different in practice for every pair of seed and step."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{step}".encode()).digest()[:8], "little") >> 1
