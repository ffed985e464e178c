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
from torch import Tensor, nn

from d2f_fast import align, aligned_loss
from d2f_fast.commands.main import main
from d2f_fast.config import TrainingConfig
from d2f_fast.errors import RefusedInputError
from d2f_fast.kernels.lora_dispatch import PATH_VARIABLE
from d2f_fast.kernels.lora_linear import lora_linear
from d2f_fast.lora.inject import inject_lora
from d2f_fast.training.optimizer_state import pack_optimizer
from d2f_fast.training.step import keep_compiled_code, learning_rates
from d2f_fast.training.trainer import AlignedTrainer, _step_seed

TARGETS = ("to_q", "to_out.0", "ff.net.2")


@pytest.fixture
def make(tiny_folder: Path, tmp_path: Path) -> Callable[..., AlignedTrainer]:
    """Make a trainer of the tiny model."""

    def trainer(output: str = "run", **options: Any) -> AlignedTrainer:
        defaults = {"resolution": 16, "rank": 2, "target_modules": TARGETS, "learning_rate": 1e-2}
        config = TrainingConfig(output_dir=str(tmp_path / output), **{**defaults, **options})
        return AlignedTrainer.from_pretrained(tiny_folder, config)

    return trainer


def batch(size: int = 4, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(100 + seed)
    return {
        "latents": torch.randn(size, 4, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(size, 8, 16, generator=generator),
    }


def inputs(trainer: AlignedTrainer, given: dict[str, Any]) -> Any:
    """What the trainer's next step computes with."""
    seed = _step_seed(trainer.config.seed, trainer.global_step)
    return trainer._prepare(given, torch.Generator().manual_seed(seed))


def weights(trainer: AlignedTrainer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.trainable.items()}


def gradients(trainer: AlignedTrainer) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in trainer.trainable.items() if parameter.grad is not None}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys() and first
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys() and first
    one, other = (torch.cat([tensors[name].flatten() for name in first]) for tensors in (first, second))
    return ((one - other).norm() / other.norm()).item()


# Against a plain loop


@pytest.mark.parametrize("options", [
    {},
    {"conv_rank": 2, "first_last_layers": True, "lora_alpha": 3.0, "lr_scheduler": "cosine", "lr_warmup_steps": 2},
    {"adam_beta1": 0.7, "max_grad_norm": 0.02, "adam_epsilon": 1e-3},
    {"adam_beta2": 0.9, "adam_weight_decay": 0.3},
], ids=["linear", "convolutions, cosine", "clipped", "decayed"])  # fmt: skip
def test_float32_steps_are_those_of_peft_and_a_plain_loop(make: Any, tiny_folder: Path, options: Any) -> None:
    trainer = make(caption_dropout=0.0, ema_decay=0.9, max_train_steps=8, train_batch_size=2, **options)
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
        given = inputs(trainer, batch(4, number))
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
        loss = trainer.step(batch(4, number))
        assert loss.item() == pytest.approx(torch.cat(losses).mean().item(), rel=1e-6)
        assert_equal(weights(trainer), {name: parameter.detach() for name, parameter in trainable.items()})
    assert trainer.ema is not None
    for name, average in zip(trainable, ema.shadow_params, strict=True):  # its factors are rounded otherwise
        torch.testing.assert_close(trainer.ema.shadow[name], average, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"adapter": "full", "mixed_precision": "bf16"}], ids=["lora", "full"])
def test_two_runs_are_bitwise_equal(make: Any, options: Any) -> None:
    first, second = make(**options), make(**options)
    for number in range(3):
        assert torch.equal(first.step(batch(4, number)), second.step(batch(4, number)))
    assert_equal(weights(first), weights(second))


def test_one_mask_serves_every_micro_batch(make: Any) -> None:
    mask = torch.rand(1, 1, 8, 8)
    whole, parts = make(train_batch_size=4), make(train_batch_size=2, gradient_accumulation_steps=2)
    each = make(train_batch_size=2, gradient_accumulation_steps=2)
    loss = parts.step({**batch(), "mask": mask})
    assert loss.item() == pytest.approx(whole.step({**batch(), "mask": mask}).item(), rel=1e-6)
    assert torch.equal(loss, each.step({**batch(), "mask": mask.expand(4, 1, 8, 8)}))
    assert_equal(weights(parts), weights(each))


def test_gradient_checkpointing_changes_no_bit(make: Any) -> None:
    plain, checkpointed = make(), make(gradient_checkpointing=True)
    for number in range(2):
        assert torch.equal(plain.step(batch(4, number)), checkpointed.step(batch(4, number)))
    assert_equal(weights(plain), weights(checkpointed))


def test_a_network_with_dropout_is_checkpointed_with_its_random_state(make: Any) -> None:
    trainer = make(adapter="full", gradient_checkpointing=True)
    plain = make(adapter="full")
    for unet in (trainer.unet, plain.unet):
        for module in unet.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
    trainer._prepare_unet()
    for one in (trainer, plain):
        torch.manual_seed(3)
        one.step(batch())
    assert distance(gradients(trainer), gradients(plain)) == 0


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_channels_last_run_resumes_bit_for_bit(make: Any, adapter: str) -> None:
    def channels_last(**options: Any) -> AlignedTrainer:  # as a run on a GPU
        trainer = make(adapter=adapter, conv_rank=2, train_batch_size=2, **options)
        trainer.unet.to(memory_format=torch.channels_last)
        return trainer

    straight = channels_last()
    for number in range(4):
        if number == 2:
            straight._save_checkpoint()
        straight.step(batch(2, number))
    resumed = channels_last(resume_from_checkpoint="latest")
    resumed._resume()
    for number in (2, 3):
        resumed.step(batch(2, number))
    assert_equal(weights(resumed), weights(straight))
    assert_equal(pack_optimizer(resumed.optimizer)[0], pack_optimizer(straight.optimizer)[0])


# The learning rate


@pytest.mark.parametrize(
    "name", ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
)
def test_learning_rates_are_those_of_the_schedule_stepped_along(name: str) -> None:
    config = TrainingConfig(lr_scheduler=name, lr_warmup_steps=3, max_train_steps=12, learning_rate=3e-4)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=3e-4)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=12)
    learning_rate, expected = learning_rates(config), []
    for _ in range(12):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert [learning_rate(step) for step in range(12)] == expected
    assert name == "constant" or len(set(expected)) > 3


# Compiled


@pytest.fixture
def aot_eager(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compile to the traced operators, which takes seconds where Inductor takes a minute."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda loss, fullgraph, options=None: compile(loss, fullgraph=fullgraph, backend="aot_eager")
    )


def check_compiled(make: Any, steps: int, tolerance: float) -> None:
    """One graph, equal to eager, and after a first step of each of two batch sizes no other for any t and seed."""
    options = {"max_grad_norm": 1e9, "conv_rank": 2, "first_last_layers": True}
    eager, compiled = make(**options), make(**options, compile=True)
    for number in range(steps):
        given = batch((4, 3)[number % 2], number)
        with torch._dynamo.config.patch(error_on_recompile=number >= 2):
            loss = compiled.step(given)
        # each step from the same weights, so that no difference grows
        assert loss.item() == pytest.approx(eager.step(given).item(), rel=tolerance)
        assert distance(gradients(compiled), gradients(eager)) <= tolerance
        with torch.no_grad():
            for name, parameter in eager.trainable.items():
                parameter.copy_(compiled.trainable[name])


def test_the_compiled_step_is_one_graph_equal_to_eager_for_50_times_and_seeds(aot_eager: None, make: Any) -> None:
    check_compiled(make, 50, 1e-6)


@pytest.mark.slow
def test_the_step_compiled_by_inductor_too(make: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    # It sums in another order, and eager's own gradients are up to 8e-7 from those in float64.
    check_compiled(make, 50, 2e-6)


def test_trainers_of_one_process_do_not_use_up_each_others_recompiles(aot_eager: None, make: Any) -> None:
    with torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(2):
            trainer = make(compile=True)
            for size in (4, 3):
                trainer.step(batch(size))


def test_compiled_code_with_a_lora_linear_in_it_is_found_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv(PATH_VARIABLE, "split")
    keep_compiled_code()
    operands = [torch.randn(shape, requires_grad=True) for shape in ((5, 32), (16, 32), (4, 32), (16, 4))]
    for found in (0, 1):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        torch.compile(lora_linear, fullgraph=True)(*operands).sum().backward()
        assert torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"] == found


def test_compiled_code_is_kept_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "chosen")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "chosen"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    keep_compiled_code()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "d2f_fast" / "inductor")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "home" / ".cache" / "d2f_fast" / "inductor")


# What runs


def test_the_line_says_which_paths_run_and_why(make: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    common = "alignment and loss: plain torch (no GPU); LoRA: {}; attention: torch's flash_attention kernel"
    plain = common.format("20 layers in plain torch, as peft computes them (no GPU)")
    assert make().paths == (f"step on cpu in float32; eager (no --compile); not captured (needs a CUDA GPU); {plain}")
    assert make(compile=True, mixed_precision="bf16").paths == (
        f"step on cpu in bfloat16; compiled (--compile); not captured (needs a CUDA GPU); {plain}"
    )
    trainer = make(adapter="full")
    assert common.format("none") in trainer.paths and "\n" not in trainer.paths
    trainer.unet.set_attn_processor(type("OtherProcessor", (), {"__call__": lambda *arguments: None})())
    assert trainer.paths.endswith("attention: OtherProcessor")
    monkeypatch.setenv(PATH_VARIABLE, "addmm")
    assert "LoRA: 20 layers by addmm in plain torch (no Triton)" in make().paths


@pytest.mark.gpu
def test_the_line_on_a_gpu(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = make(cuda_graph=True, mixed_precision="bf16").paths
    assert "one CUDA graph for each of 4 shapes (--cuda_graph); alignment and loss: Triton kernels" in paths
    assert "LoRA: 0 of 20 layers in Triton from 4096 rows on, else by addmm (the dispatch table)" in paths
    monkeypatch.setenv(PATH_VARIABLE, "split")
    assert "LoRA: 0 of 20" not in make().paths  # 16 features and more have a kernel


def test_a_graph_needs_a_gpu(make: Any, tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    with pytest.raises(RefusedInputError, match=r"^cuda_graph needs a CUDA GPU, got cpu: leave it out$"):
        make(cuda_graph=True)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").touch()
    (tmp_path / "pictures" / "a.txt").write_text("a")
    paths = ["--train_data_dir", str(tmp_path / "pictures"), "--pretrained_model_name_or_path", str(tiny_folder)]
    assert main(["train", *paths, "--output_dir", str(tmp_path / "run"), "--cuda_graph"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "d2f: cuda_graph needs a CUDA GPU, got cpu: leave it out"
    assert not (tmp_path / "run").exists()


def test_a_step_without_triton(tiny_folder: Path, tmp_path: Path) -> None:
    """The package, the trainer and a step, in a process that cannot import Triton."""
    code = f"""
import sys
sys.modules["triton"] = None
import torch
from d2f_fast import AlignedTrainer, TrainingConfig
config = TrainingConfig(output_dir={str(tmp_path)!r}, resolution=16, rank=2)
trainer = AlignedTrainer.from_pretrained({str(tiny_folder)!r}, config)
batch = {{"latents": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 8, 16)}}
print(trainer.step(batch).isfinite().item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["True"], done.stderr
