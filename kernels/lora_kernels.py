"""LoRA kernels: the Triton kernels of a LoRA linear and their launches; `lora_linear.py` holds their formulas.

    _narrow_kernel       s = x Aᵀ, ds = dy (scale B)               M rows to r columns
    _wide_kernel         y = x Wᵀ + s (scale B)ᵀ + bias, dx = dy W + ds A        one accumulator, one store
    _grad_b_kernel       ds and the partial sums of dB = dyᵀ s, dy read once
    _rows_sum_kernel     partial sums of dA = dsᵀ x, and of dB where one pass does not pay

Sums over the rows are cut into blocks of rows, each of which writes its own float32 part; the parts are added in a
fixed order, so that two runs are bitwise equal. All products accumulate in float32, and float32 operands are multiplied
in IEEE float32, never in tf32; each output is rounded once, at its store. Features are compile-time constants and
multiples of 16; the rank is padded to a power of two in registers; M is masked.
"""

import torch
from torch import Tensor

from d2f_fast.kernels.lora_dispatch import MAX_RANK, Tile, entry_of, narrow_entry_of, rank_bucket
from d2f_fast.kernels.runtime import INTERPRET, on_device

GROUP = 8  # blocks of rows that share a tile of the weight
BLOCKS = 8  # blocks of rows that one program of a sum over the rows adds up

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

if triton is not None:

    @triton.jit
    def _rank_tile(ptr, rank, mask, RANK: tl.constexpr, R: tl.constexpr, UPCAST: tl.constexpr):
        """Load a tile whose padded ranks, and rows outside `mask`, are zero."""
        tile = tl.load(ptr, mask=mask if RANK == R else mask & (rank < RANK), other=0.0)
        return tile.to(tl.float32) if UPCAST else tile

    @triton.jit
    def _narrow_kernel(
        x_ptr,
        a_ptr,
        s_ptr,
        rows,
        K: tl.constexpr,
        RANK: tl.constexpr,
        R: tl.constexpr,
        STRIDE_A_RANK: tl.constexpr,
        STRIDE_A_K: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_K: tl.constexpr,
        UPCAST: tl.constexpr,
    ):
        m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
        k, rank = tl.arange(0, BLOCK_K), tl.arange(0, R)[None, :]
        x_ptrs = x_ptr + m * K + k[None, :]
        a_ptrs = a_ptr + rank * STRIDE_A_RANK + k[:, None] * STRIDE_A_K
        acc = tl.zeros((BLOCK_M, R), tl.float32)
        for _ in range(0, K, BLOCK_K):
            x = tl.load(x_ptrs, mask=m < rows, other=0.0)
            if UPCAST:
                x = x.to(tl.float32)
            a = _rank_tile(a_ptrs, rank, k[:, None] < BLOCK_K, RANK, R, UPCAST)
            acc = tl.dot(x, a, acc, input_precision="ieee")
            x_ptrs += BLOCK_K
            a_ptrs += BLOCK_K * STRIDE_A_K
        mask = m < rows if RANK == R else (m < rows) & (rank < RANK)
        tl.store(s_ptr + m * RANK + rank, acc.to(s_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _wide_kernel(
        x_ptr,
        weight_ptr,
        s_ptr,
        b_ptr,
        bias_ptr,
        y_ptr,
        rows,
        N: tl.constexpr,
        K: tl.constexpr,
        RANK: tl.constexpr,
        R: tl.constexpr,
        STRIDE_WEIGHT_N: tl.constexpr,
        STRIDE_WEIGHT_K: tl.constexpr,
        STRIDE_B_N: tl.constexpr,
        STRIDE_B_RANK: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
        GROUP: tl.constexpr,
        UPCAST: tl.constexpr,
    ):
        # Programs walk down GROUP blocks of rows before the next column, so that the weight's tile is still in L2.
        group_size: tl.constexpr = GROUP * (N // BLOCK_N)
        first = tl.program_id(0) // group_size * GROUP
        height = tl.minimum(tl.cdiv(rows, BLOCK_M) - first, GROUP)
        inside = tl.program_id(0) % group_size
        m = (first + inside % height).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
        n = inside // height * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        k, rank = tl.arange(0, BLOCK_K), tl.arange(0, R)
        x_ptrs = x_ptr + m * K + k[None, :]
        weight_ptrs = weight_ptr + n * STRIDE_WEIGHT_N + k[:, None] * STRIDE_WEIGHT_K
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for _ in range(0, K, BLOCK_K):
            x, weight = tl.load(x_ptrs, mask=m < rows, other=0.0), tl.load(weight_ptrs)
            if UPCAST:
                x, weight = x.to(tl.float32), weight.to(tl.float32)
            acc = tl.dot(x, weight, acc, input_precision="ieee")
            x_ptrs += BLOCK_K
            weight_ptrs += BLOCK_K * STRIDE_WEIGHT_K
        # The adapter comes last: s is needed only here, and its load overlaps the loop.
        s = _rank_tile(s_ptr + m * RANK + rank[None, :], rank[None, :], m < rows, RANK, R, UPCAST)
        b_ptrs = b_ptr + n * STRIDE_B_N + rank[:, None] * STRIDE_B_RANK
        b = _rank_tile(b_ptrs, rank[:, None], n < N, RANK, R, UPCAST)
        acc = tl.dot(s, b, acc, input_precision="ieee")
        if HAS_BIAS:
            acc += tl.load(bias_ptr + n).to(tl.float32)
        tl.store(y_ptr + m * N + n, acc.to(y_ptr.dtype.element_ty), mask=m < rows)

    @triton.jit
    def _grad_b_kernel(
        grad_y_ptr,
        s_ptr,
        b_ptr,
        grad_s_ptr,
        part_ptr,
        rows,
        N: tl.constexpr,
        RANK: tl.constexpr,
        R: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        UPCAST: tl.constexpr,
    ):
        m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
        n, rank = tl.arange(0, BLOCK_N), tl.arange(0, R)[None, :]
        s = _rank_tile(s_ptr + m * RANK + rank, rank, m < rows, RANK, R, UPCAST)
        grad_y_ptrs = grad_y_ptr + m * N + n[None, :]
        b_ptrs = b_ptr + n[:, None] * RANK + rank
        part_ptrs = part_ptr + (tl.program_id(0).to(tl.int64) * N + n[:, None]) * RANK + rank
        acc = tl.zeros((BLOCK_M, R), tl.float32)
        for _ in range(0, N, BLOCK_N):
            grad_y = tl.load(grad_y_ptrs, mask=m < rows, other=0.0)
            if UPCAST:
                grad_y = grad_y.to(tl.float32)
            b = _rank_tile(b_ptrs, rank, n[:, None] < BLOCK_N, RANK, R, UPCAST)
            acc = tl.dot(grad_y, b, acc, input_precision="ieee")
            part = tl.dot(tl.trans(grad_y), s, input_precision="ieee")
            tl.store(part_ptrs, part, mask=rank < RANK)
            grad_y_ptrs += BLOCK_N
            b_ptrs += BLOCK_N * RANK
            part_ptrs += BLOCK_N * RANK
        mask = m < rows if RANK == R else (m < rows) & (rank < RANK)
        tl.store(grad_s_ptr + m * RANK + rank, acc.to(grad_s_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _rows_sum_kernel(
        x_ptr,
        s_ptr,
        part_ptr,
        rows,
        N: tl.constexpr,
        RANK: tl.constexpr,
        R: tl.constexpr,
        BLOCKS: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        UPCAST: tl.constexpr,
    ):
        m = tl.program_id(0).to(tl.int64) * (BLOCKS * BLOCK_M) + tl.arange(0, BLOCK_M)[:, None]
        n, rank = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, R)[None, :]
        acc = tl.zeros((BLOCK_N, R), tl.float32)
        for _ in range(BLOCKS):
            x = tl.load(x_ptr + m * N + n[None, :], mask=m < rows, other=0.0)
            if UPCAST:
                x = x.to(tl.float32)
            s = _rank_tile(s_ptr + m * RANK + rank, rank, m < rows, RANK, R, UPCAST)
            acc = tl.dot(tl.trans(x), s, acc, input_precision="ieee")
            m += BLOCK_M
        part_ptrs = part_ptr + (tl.program_id(0).to(tl.int64) * N + n[:, None]) * RANK + rank
        tl.store(part_ptrs, acc, mask=rank < RANK)


def launch_shrink(x: Tensor, a: Tensor, tile: Tile | None = None) -> Tensor:
    """Return s = x Aᵀ, [M, r], in x's dtype; x [M, K], a [r, K]."""
    rank, k = a.shape
    return _launch_narrow(x, a.contiguous(), rank, (k, 1), tile)


def launch_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, b: Tensor, tile: Tile | None = None
) -> Tensor:
    """Return y = x Wᵀ + s bᵀ + bias, [M, N].

    Shapes: x [M, K], weight [N, K], bias [N], s [M, r], b [N, r], all of one dtype.
    """
    n, k = weight.shape
    tile = tile or entry_of(n, k, s.shape[1], x.dtype, x.device).forward
    return _launch_wide(x, weight.contiguous(), (k, 1), s, b.contiguous(), (s.shape[1], 1), n, bias, tile)


def launch_backward_dx(grad_y: Tensor, weight: Tensor, grad_s: Tensor, a: Tensor, tile: Tile | None = None) -> Tensor:
    """Return dx = dy W + ds A, [M, K].

    Shapes: grad_y [M, N], weight [N, K], grad_s [M, r], a [r, K], all of one dtype.
    """
    n, k = weight.shape
    tile = tile or entry_of(n, k, a.shape[0], grad_y.dtype, grad_y.device).grad_x
    return _launch_wide(grad_y, weight.contiguous(), (1, k), grad_s, a.contiguous(), (1, k), k, None, tile)


def launch_backward_ds_db(
    grad_y: Tensor, s: Tensor, b: Tensor, tile: Tile | None = None, *, one_pass: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Return ds = dy b, [M, r] in dy's dtype, and db = dyᵀ s, [N, r] float32.

    Shapes: grad_y [M, N], s [M, r], b [N, r]. `one_pass` reads dy once for both; None lets the table decide.
    """
    (rows, n), rank = grad_y.shape, b.shape[1]
    entry = narrow_entry_of(rank, grad_y.dtype, grad_y.device)
    if one_pass is None:
        one_pass = entry.grad_b is not None
    if not one_pass:
        grad_y = grad_y.contiguous()
        return _launch_narrow(grad_y, b.contiguous(), rank, (1, rank), tile), _launch_rows_sum(grad_y, s, tile)
    tile = tile or entry.grad_b or entry.shrink
    _check(n, rank)
    grad_s, blocks = grad_y.new_empty(rows, rank), -(-rows // tile.m)
    parts = grad_y.new_empty(blocks, n, rank, dtype=torch.float32)
    if rows:
        with on_device(grad_y):
            _grad_b_kernel[(blocks,)](
                grad_y.contiguous(),
                s.contiguous(),
                b.contiguous(),
                grad_s,
                parts,
                rows,
                N=n,
                RANK=rank,
                R=rank_bucket(rank),
                BLOCK_M=tile.m,
                BLOCK_N=_dividing(tile.n, n),
                UPCAST=INTERPRET,
                **_options(tile),
            )
    return grad_s, parts.sum(0)


def launch_backward_da(grad_s: Tensor, x: Tensor, tile: Tile | None = None) -> Tensor:
    """Return dA = dsᵀ x, [r, K] float32; grad_s [M, r], x [M, K]."""
    return _launch_rows_sum(x, grad_s, tile).t().contiguous()


def _launch_narrow(x: Tensor, a: Tensor, rank: int, strides: tuple[int, int], tile: Tile | None) -> Tensor:
    """Return x times the matrix [K, rank] that `a` holds, whose strides along the rank and along K are `strides`."""
    rows, k = x.shape
    _check(k, rank)
    tile = tile or narrow_entry_of(rank, x.dtype, x.device).shrink
    s = x.new_empty(rows, rank)
    if rows:
        with on_device(x):
            _narrow_kernel[(-(-rows // tile.m),)](
                x.contiguous(),
                a,
                s,
                rows,
                K=k,
                RANK=rank,
                R=rank_bucket(rank),
                STRIDE_A_RANK=strides[0],
                STRIDE_A_K=strides[1],
                BLOCK_M=tile.m,
                BLOCK_K=_dividing(tile.k, k),
                UPCAST=INTERPRET,
                **_options(tile),
            )
    return s


def _launch_wide(
    x: Tensor,
    weight: Tensor,
    weight_strides: tuple[int, int],
    s: Tensor,
    b: Tensor,
    b_strides: tuple[int, int],
    n: int,
    bias: Tensor | None,
    tile: Tile,
) -> Tensor:
    """Return x times `weight` plus s times `b`, plus the bias, [M, n].

    The strides of `weight` and `b` are given along the output features first, then along the summed ones.
    """
    (rows, k), rank = x.shape, s.shape[1]
    _check(n, rank)
    _check(k, rank)
    y, block_n = x.new_empty(rows, n), _dividing(tile.n, n)
    if rows:
        with on_device(x):
            _wide_kernel[(-(-rows // tile.m) * (n // block_n),)](
                x.contiguous(),
                weight,
                s.contiguous(),
                b,
                x if bias is None else bias.contiguous(),
                y,
                rows,
                N=n,
                K=k,
                RANK=rank,
                R=rank_bucket(rank),
                STRIDE_WEIGHT_N=weight_strides[0],
                STRIDE_WEIGHT_K=weight_strides[1],
                STRIDE_B_N=b_strides[0],
                STRIDE_B_RANK=b_strides[1],
                HAS_BIAS=bias is not None,
                BLOCK_M=tile.m,
                BLOCK_N=block_n,
                BLOCK_K=_dividing(tile.k, k),
                GROUP=GROUP,
                UPCAST=INTERPRET,
                **_options(tile),
            )
    return y


def _launch_rows_sum(x: Tensor, s: Tensor, tile: Tile | None) -> Tensor:
    """Return xᵀ s, [N, r] float32: sums over blocks of rows, added in a fixed order."""
    (rows, n), rank = x.shape, s.shape[1]
    _check(n, rank)
    tile = tile or narrow_entry_of(rank, x.dtype, x.device).rows_sum
    block_n, blocks = _dividing(tile.n, n), -(-rows // (tile.m * BLOCKS))
    parts = x.new_empty(blocks, n, rank, dtype=torch.float32)
    if rows:
        with on_device(x):
            _rows_sum_kernel[(blocks, n // block_n)](
                x.contiguous(),
                s.contiguous(),
                parts,
                rows,
                N=n,
                RANK=rank,
                R=rank_bucket(rank),
                BLOCKS=BLOCKS,
                BLOCK_M=tile.m,
                BLOCK_N=block_n,
                UPCAST=INTERPRET,
                **_options(tile),
            )
    return parts.sum(0)


def _check(features: int, rank: int) -> None:
    if features % 16 or not 0 < rank <= MAX_RANK:
        raise ValueError(f"features must be a multiple of 16 and rank 1 to {MAX_RANK}, got {features} and {rank}")


def _dividing(block: int, features: int) -> int:
    """Return the largest power of two up to `block` that divides the features: no tile exceeds the matrix."""
    return min(block, features & -features)


def _options(tile: Tile) -> dict[str, int | bool]:
    # Fused multiply-add is stated: its default changes between versions of Triton, and with it the results.
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
