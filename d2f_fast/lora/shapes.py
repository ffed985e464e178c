"""Find the shape and the rank of one layer's update from the shapes of its parts, in any form that a LoRA file has.

The forms are those of `layer_weights`. Imports no torch, so that the header of a file is enough.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

Shapes = Mapping[str, Sequence[int]]


class UpdateShape(NamedTuple):
    """Shape of one layer's update.

    Attributes:
        rows: Number of outputs of the layer.
        columns: Number of its inputs, times the height and the width of its kernel.
        rank: Rank of the update when it is written as a product of two matrices.
    """

    rows: int
    columns: int
    rank: int


def lora_shape(parts: Shapes) -> UpdateShape:
    """Return the shape of the parts "down" and "up", with LoCon's "mid" and DoRA's "magnitude" where they are given.

    Args:
        parts: Shapes of the parts by name.

    Raises:
        ValueError: The parts do not fit each other.
    """
    down, up, mid, magnitude = parts["down"], parts["up"], parts.get("mid"), parts.get("magnitude")
    if mid is not None:
        if len(mid) != 4 or len(down) < 2 or math.prod(down[2:]) != 1 or mid[1] != down[0]:
            raise ValueError(f"the core {list(mid)} does not fit {list(down)}")
        down = (mid[0], down[1], *mid[2:])
    if min(len(down), len(up)) < 2 or not 0 < down[0] == math.prod(up[1:]):
        raise ValueError(f"the matrices {list(up)} and {list(down)} have no rank in common")
    if magnitude is not None and math.prod(magnitude) not in (up[0], down[1]):
        raise ValueError(f"the magnitude {list(magnitude)} has no number for each output")
    return UpdateShape(up[0], math.prod(down[1:]), down[0])


def loha_shape(parts: Shapes) -> UpdateShape:
    """Return the shape of the parts "hada_w1_a" to "hada_w2_b", with the cores "hada_t1" and "hada_t2".

    Args:
        parts: Shapes of the parts by name.

    Raises:
        KeyError: A part is missing.
        ValueError: The parts do not fit each other.
    """
    first, second = (
        _product(parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"], parts.get(f"hada_t{i}")) for i in ("1", "2")
    )
    if first[:2] != second[:2]:
        raise ValueError("the two products differ in shape")
    return _with_largest_rank(first.rows, first.columns, first.rank * second.rank)


def lokr_shape(parts: Shapes) -> UpdateShape:
    """Return the shape of the parts "lokr_w1" or "lokr_w1_a" and "lokr_w1_b", the same of w2, and "lokr_t2".

    Args:
        parts: Shapes of the parts by name.

    Raises:
        ValueError: A factor is missing, or the parts do not fit each other.
    """
    first, second = (_kronecker_factor(parts, i) for i in ("1", "2"))
    return _with_largest_rank(first.rows * second.rows, first.columns * second.columns, first.rank * second.rank)


def _kronecker_factor(parts: Shapes, number: str) -> UpdateShape:
    """Return the shape of one factor of a Kronecker product, which the file holds whole or as two matrices."""
    whole, a, b = (parts.get(f"lokr_w{number}{end}") for end in ("", "_a", "_b"))
    if whole is not None:
        if len(whole) < 2 or not math.prod(whole):
            raise ValueError(f"lokr_w{number} is not a matrix")
        return _with_largest_rank(whole[0], math.prod(whole[1:]), math.prod(whole))
    if a is None or b is None:
        raise ValueError(f"lokr_w{number} is missing")
    return _product(a, b, parts.get(f"lokr_t{number}"))


def _product(a: Sequence[int], b: Sequence[int], core: Sequence[int] | None) -> UpdateShape:
    """Return the shape of a @ b, or of a convolution in Tucker form: core [r, s, height, width], a [r, out], b [s, in].

    The rank is that of the product, also where it is larger than a matrix of this shape can have.
    """
    if core is None:
        if len(a) < 2 or len(b) < 2 or not 0 < math.prod(a[1:]) == b[0]:
            raise ValueError(f"the matrices {list(a)} and {list(b)} have no rank in common")
        return UpdateShape(a[0], math.prod(b[1:]), b[0])
    if len(a) != 2 or len(b) != 2 or len(core) != 4 or list(core[:2]) != [a[0], b[0]] or not math.prod(core):
        raise ValueError(f"the core {list(core)} does not fit {list(a)} and {list(b)}")
    return UpdateShape(a[1], b[1] * math.prod(core[2:]), a[0])


def _with_largest_rank(rows: int, columns: int, rank: int) -> UpdateShape:
    """Return a shape whose rank is at most that of a full matrix."""
    return UpdateShape(rows, columns, min(rank, rows, columns))
