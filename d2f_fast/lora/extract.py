"""Find the LoRA by which a finetuned model differs from its base."""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from d2f_fast.errors import ModelError, printable
from d2f_fast.files.tensor_stream import LazyTensor
from d2f_fast.lora.layer_weights import LoraLayerWeights
from d2f_fast.lora.resize import approximated

Components = Mapping[str, Mapping[str, LazyTensor]]
# The parts of a pipeline that LoRA files adapt.
ADAPTED_COMPONENTS = ("unet", "text_encoder", "text_encoder_2")


class ExtractedLora(NamedTuple):
    """A LoRA that was found between two models.

    Attributes:
        layers: Updates by name, such as "unet.down_blocks.0.attentions.0.proj_in".
        left_out: Keys of tensors that changed and that no LoRA holds: biases, norms and embeddings.
        relative_error: Norm of what the rank cuts off, relative to the norm of the whole change of the adapted weights.
    """

    layers: dict[str, LoraLayerWeights]
    left_out: list[str]
    relative_error: float


@torch.no_grad()
def extract_lora(base: Components, tuned: Components, rank: int) -> ExtractedLora:
    """Return the LoRA of a rank that comes closest to the difference of two models, one layer at a time.

    Args:
        base: Tensors of the base model by component and key in diffusers.
        tuned: Tensors of the finetuned model, with the same keys and shapes.
        rank: Largest rank of a layer, 1 or more. Layers with a smaller full rank are exact.

    Raises:
        ModelError: The models are of different architectures, do not differ, or differ in no layer that a LoRA adapts.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layers: dict[str, LoraLayerWeights] = {}
    left_out: list[str] = []
    change, cut = 0.0, 0.0
    for component in ADAPTED_COMPONENTS:
        ours, theirs = base.get(component, {}), tuned.get(component, {})
        odd = sorted(ours.keys() ^ theirs.keys()) or [
            key for key in ours if key in theirs and ours[key].shape != theirs[key].shape
        ]
        if odd:
            raise ModelError(
                f"{component}: {printable(odd[0])} is not of one shape in both models: give the base that the model was"
                " finetuned from"
            )
        for key in ours:
            delta = theirs[key].load().to(device).float() - ours[key].load().to(device).float()
            if not delta.any():
                continue
            name, _, kind = f"{component}.{key}".rpartition(".")
            if kind != "weight" or delta.ndim < 2 or "embeddings." in key or name.endswith("text_projection"):
                left_out.append(f"{component}.{key}")
                continue
            layer = approximated(delta, rank)
            layers[name] = LoraLayerWeights(layer.down.cpu(), layer.up.cpu(), layer.alpha)
            change += delta.square().sum().item()
            cut += (delta.flatten(1) - layer.up.flatten(1) @ layer.down.flatten(1)).square().sum().item()
    if not layers:
        problem = f"differ only in {left_out[0]} and the like, which no LoRA holds" if left_out else "are equal"
        raise ModelError(f"the two models {problem}: give a finetuned model and its base")
    return ExtractedLora(layers, left_out, (cut / change) ** 0.5)
