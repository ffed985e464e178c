"""The training step against a plain loop: peft's own layers, diffusers' loss loop, torch's AdamW and schedules."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn
from torch._inductor.runtime.cache_dir_utils import cache_dir

from d2f_fast import align, aligned_loss
from d2f_fast.commands.main import main
from d2f_fast.config import TrainingConfig
from d2f_fast.errors import RefusedInputError
from d2f_fast.kernels.lora_dispatch import PATH_VARIABLE
from d2f_fast.kernels.lora_linear import lora_linear
from d2f_fast.lora.inject import inject_lora
from d2f_fast.training.step import keep_compiled_code, learning_rates

TARGETS = ("to_q", "to_out.0", "ff.net.2")


# Against a plain loop


@pytest.mark.parametrize("options", [
    {},
    {"conv_rank": 2, "first_last_layers": True, "lora_alpha": 3.0, "lr_scheduler": "cosine", "lr_warmup_steps": 2},
    {"adam_beta1": 0.7, "max_grad_norm": 0.02, "adam_epsilon": 1e-3},
    {"adam_beta2": 0.9, "adam_weight_decay": 0.3},
], ids=["linear", "convolutions, cosine", "clipped", "decayed"])  # fmt: skip
def test_float32_steps_are_those_of_peft_and_a_plain_loop(
    make_batch: Any,
    next_inputs: Any,
    weights_of: Any,
    assert_equal: Any,
    make_trainer: Any,
    tiny_folder: Path,
    options: Any,
) -> None:
    trainer = make_trainer(caption_dropout=0.0, ema_decay=0.9, max_train_steps=8, train_batch_size=2, **options)
    unet = UNet2DConditionModel.from_pretrained(tiny_folder / "unet").train()
    names = ("conv_rank", "first_last_layers")
    own = {name: options[name] for name in names if name in options} | {"alpha": options.get("lora_alpha")}
    trainable = inject_lora(unet, 2, target_modules=TARGETS, **own)  # peft's layers: nothing of ours in the forward
    optimizer = torch.optim.AdamW(
        trainable.values(),
        lr=1e-2,
        betas=(options.get("adam_beta1", 0.9), options.get("adam_beta2", 0.999)),
        eps=options.get("adam_epsilon", 1e-8),
        weight_decay=options.get("adam_weight_decay", 1e-2),
        fused=True,
    )
    schedule = get_scheduler(
        options.get("lr_scheduler", "constant"), optimizer, num_warmup_steps=2, num_training_steps=8
    )
    ema = EMAModel(trainable.values(), decay=0.9)
    for number in range(4):
        given = next_inputs(trainer, make_batch(4, number))
        optimizer.zero_grad()
        losses = []
        for first in (0, 2):
            part = given.part(first, 2)
            sample, timestep = align(part.latents, part.noise, part.t, trainer.alignment)
            output = unet(sample, timestep, part.condition["encoder_hidden_states"]).sample
            losses.append(aligned_loss(output, part.latents, part.noise, part.t, trainer.alignment, reduction="none"))
            (losses[-1].sum() / 4).backward()
        nn.utils.clip_grad_norm_(trainable.values(), options.get("max_grad_norm", 1.0))
        optimizer.step()
        schedule.step()
        ema.step(trainable.values())
        loss = trainer.step(make_batch(4, number))
        assert loss.item() == pytest.approx(torch.cat(losses).mean().item(), rel=1e-6)
        assert_equal(weights_of(trainer), {name: parameter.detach() for name, parameter in trainable.items()})
    assert trainer.ema is not None
    for name, average in zip(trainable, ema.shadow_params, strict=True):  # its factors are rounded otherwise
        torch.testing.assert_close(trainer.ema.shadow[name], average, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"adapter": "full", "mixed_precision": "bf16"}], ids=["lora", "full"])
def test_two_runs_are_bitwise_equal(
    make_batch: Any, weights_of: Any, assert_equal: Any, make_trainer: Any, options: Any
) -> None:
    first, second = make_trainer(**options), make_trainer(**options)
    for number in range(3):
        assert torch.equal(first.step(make_batch(4, number)), second.step(make_batch(4, number)))
    assert_equal(weights_of(first), weights_of(second))


def test_one_mask_serves_every_micro_batch(
    make_batch: Any, weights_of: Any, assert_equal: Any, make_trainer: Any
) -> None:
    mask = torch.rand(1, 1, 8, 8)
    whole, parts = make_trainer(train_batch_size=4), make_trainer(train_batch_size=2, gradient_accumulation_steps=2)
    each = make_trainer(train_batch_size=2, gradient_accumulation_steps=2)
    loss = parts.step({**make_batch(), "mask": mask})
    assert loss.item() == pytest.approx(whole.step({**make_batch(), "mask": mask}).item(), rel=1e-6)
    assert torch.equal(loss, each.step({**make_batch(), "mask": mask.expand(4, 1, 8, 8)}))
    assert_equal(weights_of(parts), weights_of(each))


# The learning rate


@pytest.mark.parametrize(
    "name", ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
)
def test_learning_rates_are_those_of_the_schedule_stepped_along(name: str) -> None:
    warmup = 0 if name == "constant" else 3
    config = TrainingConfig(lr_scheduler=name, lr_warmup_steps=warmup, max_train_steps=12, learning_rate=3e-4)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=3e-4)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=12)
    learning_rate, expected = learning_rates(config), []
    for _ in range(12):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert [learning_rate(step) for step in range(12)] == expected
    assert name == "constant" or len(set(expected)) > 3


# Compiled


@pytest.fixture
def check_compiled(
    make_batch: Any, gradients_of: Any, distance: Any, make_one_level_trainer: Any
) -> Callable[[int, float], None]:
    """Return a function that asserts that a compiled step is one graph equal to eager for any t and seed.

    After a first step of each of two batch sizes nothing is compiled again.
    """

    def check(steps: int, tolerance: float) -> None:
        options = {"max_grad_norm": 1e9, "conv_rank": 2, "first_last_layers": True}
        eager, compiled = make_one_level_trainer(**options), make_one_level_trainer(**options, compile="full")
        for number in range(steps):
            given = make_batch((4, 3)[number % 2], number)
            with torch._dynamo.config.patch(error_on_recompile=number >= 2):
                loss = compiled.step(given)
            # Each step begins at the same weights, so that no difference grows.
            assert loss.item() == pytest.approx(eager.step(given).item(), rel=tolerance)
            assert distance(gradients_of(compiled), gradients_of(eager)) <= tolerance
            with torch.no_grad():
                for name, parameter in eager.trainable.items():
                    parameter.copy_(compiled.trainable[name])

    return check


def test_compiled_step_is_one_graph_equal_to_eager_for_any_time_and_seed(aot_eager: None, check_compiled: Any) -> None:
    check_compiled(12, 1e-6)


@pytest.mark.slow
def test_step_compiled_by_inductor_is_one_graph_equal_to_eager(
    check_compiled: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    # It sums in another order, and eager's own gradients are up to 8e-7 from those in float64.
    check_compiled(50, 2e-6)


def test_compiled_code_with_a_lora_linear_is_cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv(PATH_VARIABLE, "split")
    keep_compiled_code()
    operands = [torch.randn(shape, requires_grad=True) for shape in ((5, 32), (16, 32), (4, 32), (16, 4))]
    for found in (0, 1):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        torch.compile(lora_linear, fullgraph=True)(*operands).sum().backward()
        assert torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"] == found


@pytest.mark.parametrize("imported", [False, True], ids=["alone", "after Inductor put its default there"])
def test_compiled_code_is_kept_in_the_users_cache(
    imported: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "chosen")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "chosen"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    keep_compiled_code()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    if imported:
        monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
        monkeypatch.setattr("tempfile.tempdir", None)
        default = cache_dir()  # It sets the variable.
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == default
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "d2f_fast" / "inductor")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "home" / ".cache" / "d2f_fast" / "inductor")


# The line that says what runs


def test_paths_line_says_which_paths_run_and_why(
    make_trainer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    common = "loss: PyTorch, as the kernels of this package need a GPU; LoRA: {}; attention: PyTorch's flash_attention"
    plain = common.format("20 layers in PyTorch, as peft computes them")
    assert make_trainer().paths == (
        f"training runs on cpu in float32; not compiled (--compile makes later steps faster); {plain}"
    )
    assert make_trainer(compile="full", mixed_precision="bf16").paths == (
        f"training runs on cpu in bfloat16; compiled (--compile); {plain}"
    )
    assert "; blocks of the UNet compiled (--compile regional); " in make_trainer(compile="regional").paths
    trainer = make_trainer(adapter="full")
    assert common.format("none") in trainer.paths and "\n" not in trainer.paths
    trainer.unet.set_attn_processor(type("OtherProcessor", (), {"__call__": lambda *arguments: None})())
    assert trainer.paths.endswith("attention: OtherProcessor")
    monkeypatch.setenv(PATH_VARIABLE, "addmm")
    assert "LoRA: 20 layers in PyTorch (addmm)" in make_trainer().paths


@pytest.mark.gpu
def test_paths_line_on_a_gpu(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = make_trainer(cuda_graph=True, mixed_precision="bf16").paths
    assert "one CUDA graph for each of 4 shapes (--cuda_graph); loss: Triton kernels of this package; LoRA" in paths
    assert "LoRA: 0 of 20 layers in Triton kernels from 4096 rows on, else in PyTorch (addmm)" in paths
    monkeypatch.setenv(PATH_VARIABLE, "split")
    assert "LoRA: 0 of 20" not in make_trainer().paths  # 16 features and more have a kernel


def test_cuda_graph_needs_a_gpu(
    make_trainer: Any, tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    with pytest.raises(RefusedInputError, match=r"^cuda_graph needs a CUDA GPU, got cpu: leave it out$"):
        make_trainer(cuda_graph=True)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").touch()
    (tmp_path / "pictures" / "a.txt").write_text("a")
    paths = ["--train_data_dir", str(tmp_path / "pictures"), "--pretrained_model_name_or_path", str(tiny_folder)]
    assert main(["train", *paths, "--output_dir", str(tmp_path / "run"), "--cuda_graph"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "d2f: cuda_graph needs a CUDA GPU, got cpu: leave it out"
    assert not (tmp_path / "run").exists()


def test_operations_and_step_run_without_triton(tiny_folder: Path, tmp_path: Path) -> None:
    """Align, compute a loss and take a step in a process that cannot import Triton."""
    code = f"""
import sys
sys.modules["triton"] = None  # makes `import triton` fail
import torch
from d2f_fast.flow.naive_flow import NaiveFlow
from d2f_fast.kernels import align, velocity_loss
from d2f_fast.ops import align, aligned_loss
latents, noise, output = torch.ones(3, 2, 4, 8, 8)
t = torch.full((2,), 0.5)
sample, timestep = align(latents, noise, t, NaiveFlow())
assert (sample == 1).all() and (timestep == 500).all()
assert aligned_loss(output.requires_grad_(), latents, noise, t, NaiveFlow()) == 1
assert torch._C._dispatch_has_kernel_for_dispatch_key("d2f_fast::align", "CUDA")
from d2f_fast import AlignedTrainer, TrainingConfig
config = TrainingConfig(output_dir={str(tmp_path)!r}, resolution=16, rank=2)
trainer = AlignedTrainer.from_pretrained({str(tiny_folder)!r}, config)
batch = {{"latents": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 8, 16)}}
print(trainer.step(batch).isfinite().item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900)
    assert done.stdout.split() == ["True"], done.stderr
