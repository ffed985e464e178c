"""Launch every kernel once on small shapes that fill no block, for compute-sanitizer, which slows kernels down much.

    compute-sanitizer --tool memcheck python tests/kernels/small_launches.py

Without a GPU it runs in Triton's interpreter (TRITON_INTERPRET=1).
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # a script has no checkout on its path

from d2f_fast.flow.naive_flow import NaiveFlow
from d2f_fast.kernels import lora_kernels
from d2f_fast.kernels.align import align_launch
from d2f_fast.kernels.lora_dispatch import NARROW_TABLE, TABLE, Tile
from d2f_fast.kernels.velocity_loss import velocity_loss_launch


def launch_all(device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the outputs of every kernel."""
    flow, shape = NaiveFlow(), (3, 4, 9, 7)
    latents, noise, output = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    last = output.contiguous(memory_format=torch.channels_last)
    t, mask = torch.rand(3, device=device), torch.rand(3, 1, 9, 7, device=device) > 0.5
    table = torch.linspace(0.06, 0.97, 1000, device=device)
    outputs = [*align_launch(latents, noise, t, None, 0.0, 1000), *align_launch(latents, last, t, table, 0.06, 1000)]
    for given in (output, last):
        for prediction_type, weighting in (("epsilon", "min_snr"), ("v_prediction", "flow"), ("sample", "native")):
            arguments = (t, mask, prediction_type, 0.06, 0.97, weighting, 5.0, True)
            outputs += velocity_loss_launch(given, latents, noise, *arguments)
    naive = (t, None, "flow_prediction", flow.t_min, flow.t_max, "flow", 5.0, False)
    outputs += velocity_loss_launch(output, latents, noise, *naive)
    rows = 77
    for rank in (4, 16, 48):
        x, dy, w = (torch.randn(size, device=device).to(dtype) for size in ((rows, 64), (rows, 48), (48, 64)))
        a, b, bias = (torch.randn(size, device=device).to(dtype) for size in ((rank, 64), (48, rank), (48,)))
        for tile in blocks(rank):
            s = lora_kernels.launch_shrink(x, a, tile)
            outputs += [s, lora_kernels.launch_forward(x, w, bias, s, b, tile)]
            for one_pass in (True, False):
                outputs += lora_kernels.launch_backward_ds_db(dy, s, b, tile, one_pass=one_pass)
            outputs += [lora_kernels.launch_backward_dx(dy, w, s, a, tile), lora_kernels.launch_backward_da(s, x, tile)]
    return outputs


def blocks(rank: int) -> list[Tile]:
    """Return small blocks, and on a GPU also the table's blocks for it."""
    small = Tile(32, 32, 32, 4, 2)
    if not torch.cuda.is_available():
        return [small]
    major, minor = torch.cuda.get_device_capability()
    bucket, capability = lora_kernels.rank_bucket(rank), 10 * major + minor
    wide = [entry.forward for key, entry in TABLE.items() if (key[0], key[3]) == (capability, bucket)]
    narrow = [entry.shrink for key, entry in NARROW_TABLE.items() if key == (capability, bucket)]
    return list(dict.fromkeys([small, *wide, *narrow]))


if __name__ == "__main__":
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    # The interpreter truncates bfloat16.
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    outputs = launch_all(torch.device(device), dtype)
    if on_gpu:
        torch.cuda.synchronize()
    assert all(output.isfinite().all() for output in outputs)
    print(f"{len(outputs)} outputs, all finite")
