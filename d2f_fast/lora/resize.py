"""Change the rank of low-rank updates: add several as one, cut one to a smaller rank, or find one for a matrix.

B₁A₁ + B₂A₂ = [B₁ B₂] [A₁; A₂]            exact, of rank r₁ + r₂
B A = Q (R Pᵀ) with B = Q_b R_b, Aᵀ = Q_a R_a: the singular values are those of R_b R_aᵀ, which is r × r
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from d2f_fast.errors import ModelError
from d2f_fast.lora.layer_weights import LoraLayerWeights

Layers = Mapping[str, LoraLayerWeights]

# Vectors beside the wanted ones, and passes over the matrix, by which the randomised decomposition finds them.
_OVERSAMPLING, _PASSES = 2, 4


def folded(layer: LoraLayerWeights, scale: float = 1.0) -> LoraLayerWeights:
    """Return the same update with alpha = rank, the scale being in the second matrix.

    Args:
        layer: Update of one layer.
        scale: Factor on the update.
    """
    factor = scale * layer.alpha / layer.rank
    return LoraLayerWeights(layer.down, layer.up if factor == 1 else layer.up * factor, float(layer.rank))


def added(adapters: Sequence[tuple[Layers, float]]) -> dict[str, LoraLayerWeights]:
    """Return the exact sum of adapters, whose ranks add up.

    Args:
        adapters: Updates by the name of their layer, each with its factor.

    Raises:
        ModelError: Two updates of one layer have different shapes.
    """
    names = dict.fromkeys(name for layers, _ in adapters for name in layers)
    total: dict[str, LoraLayerWeights] = {}
    for name in names:
        parts = [folded(layers[name], scale) for layers, scale in adapters if name in layers]
        shapes = {(part.up.shape[0], part.down.shape[1:].numel()) for part in parts}
        if len(shapes) > 1:
            raise ModelError(f"{name} has updates of different sizes, {sorted(shapes)}: the LoRA files differ in model")
        if len(parts) == 1:
            total[name] = parts[0]
            continue
        down = torch.cat([part.down.flatten(1) for part in parts])
        up = torch.cat([part.up.flatten(1) for part in parts], dim=1)
        total[name] = _layer(up, down, max((part.down.shape[1:] for part in parts), key=len))
    return total


def resized(layer: LoraLayerWeights, rank: int) -> LoraLayerWeights:
    """Return the best approximation of an update by one of a smaller rank; a smaller one stays as it is.

    Only the two matrices are decomposed, never their product.

    Args:
        layer: Update of one layer.
        rank: Largest rank of the result, 1 or more.
    """
    if layer.rank <= rank:
        return folded(layer)
    up, down = layer.up.flatten(1).double(), layer.down.flatten(1).double()
    up_basis, up_factor = torch.linalg.qr(up)
    down_basis, down_factor = torch.linalg.qr(down.T)
    left, values, right = torch.linalg.svd(up_factor @ down_factor.T * (layer.alpha / layer.rank))
    roots = values[:rank].sqrt()
    new_up = up_basis @ left[:, :rank] * roots
    new_down = roots[:, None] * (right[:rank] @ down_basis.T)
    return _layer(new_up.float(), new_down.float(), layer.down.shape[1:])


def approximated(delta: Tensor, rank: int) -> LoraLayerWeights:
    """Return the best update of a rank for the change of one weight.

    At full rank the result is exact. At less than an eighth of it, the singular vectors are found by a randomised
    method with a fixed seed, which is faster, and whose error is within 1 % of the least possible one.

    Args:
        delta: Change of the weight, [out, in] or [out, in, kernel height, kernel width].
        rank: Rank of the result, 1 or more; larger ranks than the matrix has are cut to its own.
    """
    matrix, inner = delta.flatten(1).float(), delta.shape[1:]
    smaller = min(matrix.shape)
    if rank >= smaller:
        identity = torch.eye(smaller, device=matrix.device)
        return _layer(identity, matrix, inner) if len(matrix) == smaller else _layer(matrix, identity, inner)
    if rank * 8 < smaller:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            left, values, right = torch.svd_lowrank(matrix, q=rank * _OVERSAMPLING, niter=_PASSES)
    else:
        left, values, right_transposed = torch.linalg.svd(matrix, full_matrices=False)
        right = right_transposed.T
    roots = values[:rank].sqrt()
    return _layer(left[:, :rank] * roots, (right[:, :rank] * roots).T, inner)


def _layer(up: Tensor, down: Tensor, inner: torch.Size) -> LoraLayerWeights:
    """Return two matrices as the update of a linear layer, or of a convolution where `inner` has a kernel."""
    rank = down.shape[0]
    ones = [1] * (len(inner) - 1)
    return LoraLayerWeights(
        down.reshape(rank, *inner).contiguous(), up.reshape(-1, rank, *ones).contiguous(), float(rank)
    )
