"""Measure the matrix products and attentions of a training step on a GPU in minutes, by torch and Triton alone.

    python -m benchmarks.probe --minutes 6

Providers, forward alone and forward with backward:

    base, addmm, split   a LoRA linear of 320, 640 and 1280 features at batch 16: the frozen product alone; with the
                         adapter by cuBLAS; with the adapter by the Triton kernels with the dispatch table's blocks
    flash, cudnn, …      torch's attention kernels at Stable Diffusion's shapes: head sizes 40, 80 and 160 (SD1.5), and
                         64 (SD2.1, SDXL)

Each is compared with float64 before it is timed. Each row is written to `<results>/<device>-probe.csv` as soon as it is
measured; a row that is already there is not measured again. The rows decide which kernels deserve work: where split
takes more than addmm / 1.2, improve the use of addmm rather than the kernels.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import clock
from benchmarks.lora_paths import ADDMM, Operands, errors_of, operands, run_base, run_forward, run_step, split
from d2f_fast.kernels.lora_dispatch import entry_of, narrow_entry_of

TABLE, ROUNDS = "probe", 15
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


class Probe(Protocol):
    """A product or an attention that is timed as one row.

    Attributes:
        case: column of the row that names the sizes.
        provider: column of the row that names the provider.
        forward: True for forward alone, False for forward and backward.
        flops: operations of one call.
    """

    provider: str
    forward: bool

    @property
    def case(self) -> str: ...
    @property
    def flops(self) -> int: ...

    def inputs(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return random operands of `run`."""

    def run(self, *operands: Tensor) -> object:
        """Compute once.

        Raises:
            RuntimeError: this kernel does not support the shape.
        """

    def error(self, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
        """Return the relative difference from float64 on a smaller case, and the largest that is allowed."""


@dataclass(frozen=True)
class LinearProbe:
    """A LoRA linear from n to n features by one provider."""

    rows: int
    n: int
    rank: int
    provider: str
    forward: bool

    @property
    def case(self) -> str:
        return f"linear {self.rows}x{self.n}x{self.n} r{self.rank}"

    @property
    def flops(self) -> int:
        rank = 0 if self.provider == "base" else self.rank
        return self.rows * self.n * (2 * self.n + 4 * rank if self.forward else 4 * self.n + 12 * rank)

    def inputs(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return operands(self.rows, self.n, self.n, self.rank, device, dtype)

    def run(self, *given: Tensor) -> object:
        o = Operands(*given)
        if self.provider == "base":
            return F.linear(o.x, o.weight, o.bias) if self.forward else run_base(o)
        ops = self._ops(o.x.device, o.x.dtype)
        return run_forward(ops, o) if self.forward else run_step(ops, o)

    def error(self, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
        if self.provider == "base":
            return 0.0, 0.0
        o = operands(min(self.rows, 4159), self.n, self.n, self.rank, device, dtype)
        return max(errors_of(self._ops(device, dtype), o)), 1.2 * max(errors_of(ADDMM, o)) + 1e-6

    def _ops(self, device: torch.device, dtype: torch.dtype) -> Any:
        if self.provider == "addmm":
            return ADDMM
        entry = entry_of(self.n, self.n, self.rank, dtype, device)
        return split(entry, narrow_entry_of(self.rank, dtype, device))


@dataclass(frozen=True)
class AttentionProbe:
    """Attention of some heads by one of torch's kernels."""

    batch: int
    heads: int
    tokens: int
    keys: int
    size: int
    provider: str
    forward: bool

    @property
    def case(self) -> str:
        return f"attention {self.batch}x{self.heads}x{self.tokens}x{self.keys} d{self.size}"

    @property
    def flops(self) -> int:
        return (4 if self.forward else 14) * self.batch * self.heads * self.tokens * self.keys * self.size

    def inputs(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        lengths = (self.tokens, self.keys, self.keys, self.tokens)
        shapes = [(self.batch, self.heads, length, self.size) for length in lengths]
        q, k, v, grad = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
        return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad

    def run(self, *given: Tensor) -> tuple[Tensor, ...]:
        *qkv, grad = given
        with sdpa_kernel(BACKENDS[self.provider]):
            y = F.scaled_dot_product_attention(*qkv)
        return (y,) if self.forward else (y, *torch.autograd.grad(y, qkv, grad))

    def error(self, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
        small = AttentionProbe(1, 2, self.tokens, self.keys, self.size, "math", self.forward)
        given = small.inputs(device, dtype)
        exact = small.run(*(x.detach().double().requires_grad_(x.requires_grad) for x in given))
        pairs = zip(self.run(*given), exact, strict=True)
        errors = [float((got.detach().double() - e.detach()).norm() / e.detach().norm()) for got, e in pairs]
        # Probabilities, their gradients and the results are rounded to the type, each by half a unit at most.
        return max(errors), 4 * torch.finfo(dtype).eps


def probes() -> Iterable[Probe]:
    """Yield all rows, the most important first."""
    for rows, n, rank in ((65536, 320, 16), (16384, 640, 16), (4096, 1280, 16), (65536, 320, 64), (4096, 1280, 64)):
        for forward in (True, False):
            yield from (LinearProbe(rows, n, rank, path, forward) for path in ("base", "addmm", "split"))
    # Self-attention on three levels, cross-attention to the text, and heads of size 64.
    for shape in ((16, 8, 4096, 4096, 40), (16, 8, 1024, 1024, 80), (16, 8, 256, 256, 160), (16, 8, 4096, 77, 40),
                  (16, 5, 4096, 4096, 64), (4, 10, 4096, 4096, 64)):  # fmt: skip
        for forward in (True, False):
            large = shape[0] * shape[1] * shape[2] * shape[3] > 2**28  # probabilities that would fill the memory
            yield from (AttentionProbe(*shape, name, forward) for name in BACKENDS if not (large and name == "math"))


def measure(
    rows: Iterable[Probe], device: torch.device, dtype: torch.dtype, rounds: int, deadline: float, results: Path
) -> bool:
    """Time the rows that the table lacks, and return whether none is missing in the end.

    Args:
        rows: probes in order.
        device: device to measure.
        dtype: type of the operands.
        rounds: timed rounds of each row.
        deadline: time of `time.monotonic` after which no row is started.
        results: folder of the table.
    """
    measured = clock.measured(TABLE, ("case", "provider", "pass"), results)
    for probe in rows:
        row: dict[str, Any] = {"case": probe.case, "provider": probe.provider}
        row["pass"] = "forward" if probe.forward else "forward+backward"
        if tuple(row.values()) in measured:
            continue
        if time.monotonic() > deadline:
            return False
        row |= dict.fromkeys(("median_us", "p20_us", "p80_us", "tflop_per_s", "error"), "")
        try:
            error, allowed = probe.error(device, dtype)
        except RuntimeError as refusal:  # this card has no such attention kernel for this shape
            print(f"{probe.case}, {probe.provider}: {str(refusal).splitlines()[0]}")
        else:
            if error > allowed:
                raise SystemExit(f"{probe.case}, {probe.provider}: {error:.1e} from float64, {allowed:.1e} allowed")
            seconds = clock.time_calls(probe.run, lambda probe=probe: probe.inputs(device, dtype), device, rounds)
            times = (f"{second * 1e6:.3f}" for second in seconds)
            row |= dict(zip(("median_us", "p20_us", "p80_us"), times, strict=True))
            row |= {"tflop_per_s": f"{probe.flops / seconds[0] / 1e12:.4g}", "error": f"{error:.1e}"}
        clock.append(row, TABLE, results)
    return True


def main() -> None:
    """Probe this device, and print whether every row is measured."""
    parser = clock.gpu_script(__doc__, minutes=6)
    parser.add_argument("--only", choices=("linear", "attention"), help="leave out the other rows (default: none)")
    options, cuda = clock.gpu_options(parser), torch.cuda.is_available()
    device, dtype, rows, rounds = torch.device("cuda"), torch.bfloat16, probes(), ROUNDS
    if options.dry_run:  # one shape of each kind, in float32 on a CPU, where Triton's interpreter truncates bfloat16
        rounds, rows = 3, [LinearProbe(48, 32, 16, path, False) for path in ("base", "addmm", "split")]
        rows += [AttentionProbe(1, 2, 16, 16, 40, name, False) for name in BACKENDS]
        if not cuda:
            device, dtype = torch.device("cpu"), torch.float32
    rows = [row for row in rows if options.only is None or row.case.startswith(options.only)]
    torch.manual_seed(0)
    complete = measure(rows, device, dtype, rounds, time.monotonic() + 60 * options.minutes, options.results)
    print("complete" if complete else "stopped: run it again with the same --results to continue")


if __name__ == "__main__":
    main()
