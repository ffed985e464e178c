"""Hold the update of one layer as a LoRA file gives it, in any of the forms that are exactly a product of two matrices.

LoRA    alpha / r * up @ down                                  with `mid`, LoCon's core, folded into down
LoHa    alpha / r * (w1_a @ w1_b) * (w2_a @ w2_b)              elementwise product, rank r * r
LoKr    alpha / r * kron(w1, w2)                               rank of w1 times rank of w2
DoRA    magnitude * (W + LoRA) / norm of its rows - W          depends on the weight W
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from d2f_fast.lora.shapes import loha_shape, lokr_shape, lora_shape


@dataclass(frozen=True)
class LoraLayerWeights:
    """Update of one layer: alpha / r * up @ down, with DoRA's norm where there is a magnitude.

    Attributes:
        down: First matrix, [r, in] or, for a convolution, [r, in, kernel height, kernel width], float32.
        up: Second matrix, [out, r] or [out, r, 1, 1], float32.
        alpha: Number that scales the update; r is a scale of 1.
        magnitude: DoRA's norms of the rows of the adapted weight, [out], or of its columns, [1, in], float32; None for
            a LoRA without DoRA.
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """Return the rank r of the update."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Return the shape of the update as a matrix: out, and in * kernel height * kernel width."""
        return self.up.shape[0], self.down.shape[1:].numel()

    def as_lora(self) -> "LoraLayerWeights":
        """Return the update as two matrices: itself."""
        return self

    def delta(self, weight: Tensor) -> Tensor:
        """Return the update as a matrix, [out, in * kernel height * kernel width], float32.

        Args:
            weight: Weight that is adapted, of which only DoRA's update depends.
        """
        product = (self.up.flatten(1) @ self.down.flatten(1)) * (self.alpha / self.rank)
        if self.magnitude is None:
            return product
        weight = weight.float()
        adapted = weight + product.reshape(weight.shape)
        # DoRA by peft keeps one norm for each output, and some LyCORIS files one for each input.
        kept = 0 if self.magnitude.shape[0] == weight.shape[0] else 1
        others = [axis for axis in range(weight.ndim) if axis != kept]
        norm: Tensor = torch.linalg.vector_norm(adapted, dim=others, keepdim=True)
        return (adapted * (self.magnitude.reshape(norm.shape) / norm) - weight).flatten(1)


@dataclass(frozen=True)
class HadamardLayerWeights:
    """Update of one layer in LoHa's form: alpha / r * (up1 @ down1) * (up2 @ down2), elementwise.

    Attributes:
        factors: The two pairs (up, down), of shapes [out, r] and [r, in * kernel], float32.
        alpha: Number that scales the update.
        rank: Rank r of each of the two products.
    """

    factors: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
    alpha: float
    rank: int

    @property
    def shape(self) -> tuple[int, int]:
        """Return the shape of the update as a matrix."""
        up, down = self.factors[0]
        return up.shape[0], down.shape[1]

    def delta(self, weight: Tensor) -> Tensor:
        """Return the update as a matrix, float32; it does not depend on the weight."""
        (up1, down1), (up2, down2) = self.factors
        product: Tensor = (up1 @ down1) * (up2 @ down2)
        return product * (self.alpha / self.rank)

    def as_lora(self) -> LoraLayerWeights:
        """Return the same update as two matrices, of rank r * r or, if that is smaller, of full rank."""
        (up1, down1), (up2, down2) = self.factors
        rank = up1.shape[1] * up2.shape[1]
        if rank > min(self.shape):
            return _full_rank(self.delta(up1))
        up = torch.einsum("or,os->ors", up1, up2).flatten(1)
        down = torch.einsum("ri,si->rsi", down1, down2).flatten(0, 1)
        return LoraLayerWeights(down, up, self.alpha * rank / self.rank)


@dataclass(frozen=True)
class KroneckerLayerWeights:
    """Update of one layer in LoKr's form: scale * kron(up1 @ down1, up2 @ down2).

    Attributes:
        factors: The two pairs (up, down), float32. A factor that the file holds whole is paired with None.
        scale: Number that scales the update.
    """

    factors: tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """Return the shape of the update as a matrix."""
        widths = [up.shape[1] if down is None else down.shape[1] for up, down in self.factors]
        return self.factors[0][0].shape[0] * self.factors[1][0].shape[0], widths[0] * widths[1]

    def delta(self, weight: Tensor) -> Tensor:
        """Return the update as a matrix, float32; it does not depend on the weight."""
        first, second = (up if down is None else up @ down for up, down in self.factors)
        return _kron(first, second) * self.scale

    def as_lora(self) -> LoraLayerWeights:
        """Return the same update as two matrices, of the product of the ranks or, if that is smaller, of full rank."""
        (up1, down1), (up2, down2) = (_as_product(*factor) for factor in self.factors)
        rank = up1.shape[1] * up2.shape[1]
        if rank > min(self.shape):
            return _full_rank(self.delta(up1))
        return LoraLayerWeights(_kron(down1, down2), _kron(up1, up2), self.scale * rank)


class LayerWeights(Protocol):
    """Update of one layer in any form."""

    @property
    def shape(self) -> tuple[int, int]:
        """Return the shape of the update as a matrix: out, and in * kernel height * kernel width."""

    def delta(self, weight: Tensor) -> Tensor:
        """Return the update as a matrix, for the weight that is adapted."""

    def as_lora(self) -> LoraLayerWeights:
        """Return the same update as two matrices; only DoRA's keeps a magnitude beside them."""


def lora_weights(parts: Mapping[str, Tensor], alpha: float) -> LoraLayerWeights:
    """Return the update of the parts "down" and "up", with LoCon's "mid" and DoRA's "magnitude" where they are given.

    Raises:
        ValueError: The parts have no rank in common.
    """
    lora_shape(_shapes(parts))
    down, up, mid, magnitude = parts["down"], parts["up"], parts.get("mid"), parts.get("magnitude")
    if mid is not None:
        down = torch.einsum("rskl,si->rikl", mid, down.flatten(1))
    if magnitude is not None:
        magnitude = magnitude.flatten() if magnitude.numel() == up.shape[0] else magnitude.reshape(1, -1)
    return LoraLayerWeights(down, up, alpha, magnitude)


def loha_weights(parts: Mapping[str, Tensor], alpha: float | None) -> HadamardLayerWeights:
    """Return the update of the parts "hada_w1_a" to "hada_w2_b", with the cores "hada_t1" and "hada_t2".

    Args:
        parts: Parts by name.
        alpha: Number that scales the update; None means the rank.

    Raises:
        ValueError: The shapes do not fit each other.
    """
    loha_shape(_shapes(parts))
    first, second = (
        _product(parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"], parts.get(f"hada_t{i}")) for i in ("1", "2")
    )
    rank = parts["hada_w1_b"].shape[0]
    return HadamardLayerWeights((first, second), float(rank) if alpha is None else alpha, rank)


def lokr_weights(parts: Mapping[str, Tensor], alpha: float | None, rank: int | None = None) -> KroneckerLayerWeights:
    """Return the update of the parts "lokr_w1" or "lokr_w1_a" and "lokr_w1_b", the same of w2, and "lokr_t2".

    Args:
        parts: Parts by name.
        alpha: Number that scales the update; None means the rank.
        rank: Rank that divides alpha, as peft's configuration gives it. None takes that of the matrices, and a scale
            of 1 where both factors are whole, as LyCORIS does.

    Raises:
        ValueError: A factor is missing, or the shapes do not fit each other.
    """
    lokr_shape(_shapes(parts))
    factors: list[tuple[Tensor, Tensor | None]] = []
    for i in ("1", "2"):
        if (whole := parts.get(f"lokr_w{i}")) is not None:
            factors.append((whole.flatten(1), None))
            continue
        a, b = parts[f"lokr_w{i}_a"], parts[f"lokr_w{i}_b"]
        factors.append(_product(a, b, parts.get(f"lokr_t{i}")))
        rank = rank or b.shape[0]
    scale = 1.0 if rank is None or alpha is None else alpha / rank
    return KroneckerLayerWeights((factors[0], factors[1]), scale)


def _shapes(parts: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each part."""
    return {name: tuple(part.shape) for name, part in parts.items()}


def _product(a: Tensor, b: Tensor, core: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return two matrices that have a rank in common, into the second of which a convolution's core is folded.

    The core is [r, s, height, width], with a [r, out] and b [s, in].
    """
    if core is None:
        return a.flatten(1), b.flatten(1)
    return a.T, torch.einsum("rskl,si->rikl", core, b).flatten(1)


def _as_product(up: Tensor, down: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return a factor as two matrices, one of which is the identity where the factor is whole."""
    if down is not None:
        return up, down
    rows, columns = up.shape
    return (torch.eye(rows), up) if rows <= columns else (up, torch.eye(columns))


def _kron(first: Tensor, second: Tensor) -> Tensor:
    """Return the Kronecker product of two matrices; `torch.kron` fails for some strides of matrices with one row."""
    rows, columns = first.shape[0] * second.shape[0], first.shape[1] * second.shape[1]
    return (first[:, None, :, None] * second[None, :, None, :]).reshape(rows, columns)


def _full_rank(delta: Tensor) -> LoraLayerWeights:
    """Return an update as a product with the identity."""
    up, down = _as_product(delta, None)
    return LoraLayerWeights(down, up, float(down.shape[0]))
