"""LPIPS in the loss of a distillation, against its own computation by torch's autograd.

The package lpips cannot be installed beside a CPU build of torch from PyPI alone, so that most tests use a stand-in for
it, with the same interface and the same steps, and two small layers with random weights.
"""

import json
import sys
from collections import namedtuple
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torch import Tensor, nn

from d2f_fast.commands.main import main
from d2f_fast.config import TrainingConfig
from d2f_fast.data.pairs import PairDataset
from d2f_fast.errors import RefusedInputError
from d2f_fast.files.tensor_file import read_metadata, read_tensors
from d2f_fast.sampling.integrate import sample_flow, unet_velocity
from d2f_fast.training.run_settings import settings_of
from d2f_fast.training.trainer import AlignedTrainer

DISTILL = {"distill": True, "caption_dropout": 0.0, "max_grad_norm": 1e9}


class StandIn(nn.Module):
    """Compute LPIPS as the package does: normalised features of two layers, weighted, squared and averaged."""

    def __init__(self, net: str = "alex", verbose: bool = True) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            first, second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
            self.lins = nn.ModuleList(nn.Sequential(nn.Dropout(), nn.Conv2d(k, 1, 1, bias=False)) for k in (6, 8))
        self.slices = nn.ModuleList([
            nn.Sequential(first, nn.ReLU()),
            nn.Sequential(nn.MaxPool2d(2), second, nn.ReLU()),
        ])  # fmt: skip
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[None, :, None, None])

    def forward(self, in0: Tensor, in1: Tensor) -> Tensor:
        """Return the distances, [B, 1, 1, 1], of images in [-1, 1]."""
        features = namedtuple("Features", ["first", "second"])  # The package makes its class here, too.
        of_images = []
        for image in (in0, in1):
            first = self.slices[0](image / self.scale)
            of_images.append(features(first, self.slices[1](first)))
        distances = []
        for lin, one, other in zip(self.lins, *of_images, strict=True):
            one, other = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in (one, other))
            distances.append(lin((one - other) ** 2).abs().mean((2, 3), keepdim=True))
        return torch.stack(distances).sum(0)


@pytest.fixture(autouse=True)
def lpips(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModuleType | None:
    """Put the stand-in in the place of the package, except in the tests of the package itself."""
    if request.node.get_closest_marker("slow") and "real_package" in request.node.name:
        return None
    module = ModuleType("lpips")
    module.__spec__, module.LPIPS = ModuleSpec("lpips", None), StandIn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lpips", module)
    return module


@pytest.fixture
def pairs(write_pairs: Callable[..., Path], tmp_path: Path) -> Path:
    """Return the folder of ten pairs of the tiny model."""
    return write_pairs(tmp_path / "pairs" / "0.tar", 10).parent


def losses_of(trainer: AlignedTrainer, batch: dict[str, Any], network: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the squared error of the latents after one step, and the LPIPS of their images, [B] each."""
    velocity = unet_velocity(trainer.unet, trainer.objective.flow, batch["encoder_hidden_states"])
    predicted, vae = sample_flow(velocity, batch["noise"], 1), trainer.model.vae
    images = [vae.decode(x / vae.config.scaling_factor).sample for x in (predicted, batch["latents"])]
    return (predicted - batch["latents"]).square().mean((1, 2, 3)), network(*images).flatten()


def pair_batch(make_batch: Any, size: int = 4, **changes: Any) -> dict[str, Any]:
    """Return a batch of pairs whose latents are near those of one step, so that both losses count."""
    noise = torch.randn(size, 4, 8, 8, generator=torch.Generator().manual_seed(8))
    return make_batch(size, **{"noise": noise, **changes})


def perturb(trainer: AlignedTrainer) -> None:
    """Move the trained weights away from where they start, where half of a LoRA has no gradient."""
    with torch.no_grad():
        for parameter in trainer.trainable.values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7))


def logged(trainer: AlignedTrainer) -> list[dict[str, Any]]:
    """Return the rows of a run's log."""
    return [json.loads(line) for line in (Path(trainer.config.output_dir) / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("options", [{}, {"objective": "fm"}, {"adapter": "full"}], ids=str)
def test_loss_and_gradient_are_those_of_the_decoded_images(
    make_trainer: Any, make_batch: Any, gradients_of: Any, options: dict[str, Any]
) -> None:
    trainer = make_trainer(**DISTILL, lpips_weight=30.0, **options)
    perturb(trainer)
    batch, parameters = pair_batch(make_batch), trainer.trainable.values()
    latent, lpips = (each.mean() for each in losses_of(trainer, batch, StandIn("vgg").eval()))
    alone = torch.autograd.grad(latent, parameters, retain_graph=True)
    expected = torch.autograd.grad(latent + 30 * lpips, parameters)
    loss = trainer.step(batch).item()
    assert loss == pytest.approx((latent + 30 * lpips).item(), rel=1e-6)
    parts = trainer._training_step.parts(loss)
    assert parts == pytest.approx({"latent_loss": latent.item(), "lpips": lpips.item()}, rel=1e-5)
    got, wanted, without = (
        torch.cat([x.flatten() for x in y]) for y in (gradients_of(trainer).values(), expected, alone)
    )
    assert (got - wanted).norm() <= 1e-6 * wanted.norm()
    assert (without - wanted).norm() > 0.01 * wanted.norm()


def test_micro_batches_and_processes_change_nothing(
    make_trainer: Any, make_batch: Any, gradients_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_trainer(**DISTILL, lpips_weight=3.0)
    parts = make_trainer(**DISTILL, lpips_weight=3.0, train_batch_size=2, gradient_accumulation_steps=2)
    slices = make_trainer(**DISTILL, lpips_weight=3.0)
    # Two processes that have the same slice of a batch of eight, whose sum is twice that of one.
    monkeypatch.setattr("d2f_fast.training.step.sum_over_processes", lambda tensor: tensor.mul_(2))
    slices._training_step._num_processes = 2
    batches = [pair_batch(make_batch), pair_batch(make_batch), pair_batch(make_batch, offset=0, global_batch_size=8)]
    for trainer, batch in zip((whole, parts, slices), batches, strict=True):
        loss = trainer.step(batch).item()
        trainer.found = {"loss": loss, **trainer._training_step.parts(loss)}
    for trainer in (parts, slices):
        assert trainer.found == pytest.approx(whole.found, rel=1e-5)
        for name, gradient in gradients_of(whole).items():
            torch.testing.assert_close(gradients_of(trainer)[name], gradient, rtol=1e-4, atol=1e-6)


def test_bfloat16_step_decodes_and_compares_in_float32(
    make_trainer: Any, make_batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.dtype, bool]] = []

    class Watching(StandIn):
        def forward(self, in0: Tensor, in1: Tensor) -> Tensor:
            features = self.slices[0](in0)
            seen.append((features.dtype, torch.is_autocast_enabled("cpu")))
            return super().forward(in0, in1)

    monkeypatch.setattr(sys.modules["lpips"], "LPIPS", Watching)
    exact, rounded = (make_trainer(**DISTILL, lpips_weight=1.0, mixed_precision=p) for p in ("no", "bf16"))
    losses = [trainer.step(pair_batch(make_batch)).item() for trainer in (exact, rounded)]
    assert seen == [(torch.float32, False)] * 2
    assert losses[1] != losses[0] and losses[1] == pytest.approx(losses[0], rel=0.05)


def test_checkpointed_decoder_gives_the_same_gradients(
    make_trainer: Any, make_batch: Any, weights_of: Any, assert_equal: Any
) -> None:
    plain, saving = (make_trainer(**DISTILL, lpips_weight=1.0, gradient_checkpointing=on) for on in (False, True))
    assert saving.model.vae.decoder.gradient_checkpointing
    assert torch.equal(plain.step(pair_batch(make_batch)), saving.step(pair_batch(make_batch)))
    assert_equal(weights_of(plain), weights_of(saving))


def test_resumed_run_is_equal_bit_for_bit_and_saves_no_frozen_network(
    pairs: Path, make_trainer: Any, state_of: Any, assert_equal: Any, tmp_path: Path
) -> None:
    options = {**DISTILL, "lpips_weight": 0.5, "train_batch_size": 3, "validation_steps": 9, "max_train_steps": 3}
    data = PairDataset([pairs])
    whole, first = make_trainer("whole", **options), make_trainer("divided", **(options | {"max_train_steps": 2}))
    frozen = {name: x.clone() for name, x in whole.model.vae.state_dict().items()}
    whole.fit(data, data)
    first.fit(data, data)
    second = make_trainer("divided", resume_from_checkpoint="latest", **options)
    assert second.fit(data, data)["steps"] == 3
    assert_equal(state_of(second), state_of(whole))
    network = whole._training_step._perceptual._network
    assert all(not p.requires_grad and p.grad is None for part in (network, whole.model.vae) for p in part.parameters())
    assert not network.training
    assert_equal(whole.model.vae.state_dict(), frozen)
    assert set(whole.trainable) == set(make_trainer("without").trainable)
    assert set(read_tensors(tmp_path / "whole" / "checkpoint-3" / "trainable.safetensors")[0]) == set(whole.trainable)
    # The log has both parts, and the validation loss the sum.
    rows = [row for row in logged(whole) if "loss" in row]
    assert all(row["loss"] == pytest.approx(row["latent_loss"] + 0.5 * row["lpips"]) for row in rows) and len(rows) == 3
    with whole.averaged(), torch.no_grad():
        sums = []
        for part in whole._validation._inputs:
            text = part.condition["encoder_hidden_states"]
            batch = {"latents": part.latents, "noise": part.noise, "encoder_hidden_states": text}
            latent, lpips = losses_of(whole, batch, network)
            sums.append((latent + 0.5 * lpips).sum())
    validated = [row["validation_loss"] for row in logged(whole) if "validation_loss" in row]
    assert validated[-1] == pytest.approx(sum(sums).item() / 10, rel=1e-5)
    header = read_metadata(whole.save_lora(tmp_path / "out"))
    assert (header["d2f.lpips_weight"], header["d2f.lpips_net"]) == ("0.5", "vgg")
    assert settings_of(whole.config).items() >= {"lpips_weight": 0.5, "lpips_net": "vgg"}.items()  # None may change.


def test_run_without_lpips_is_as_before(make_trainer: Any, make_batch: Any) -> None:
    trainer = make_trainer(**DISTILL)
    assert trainer._training_step.parts(trainer.step(pair_batch(make_batch)).item()) == {}
    with pytest.raises(RefusedInputError, match="mask weighs latents, and lpips_weight compares whole images"):
        make_trainer(**DISTILL, lpips_weight=1.0).step(pair_batch(make_batch, mask=torch.ones(4, 1, 8, 8)))


def test_command_says_what_the_loss_is_and_refuses_what_cannot_be_done(
    pairs: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["train", "--pretrained_model_name_or_path", str(tiny_folder), "--pairs", str(pairs), "--rank", "2"]
    command += ["--distill", "--lpips_weight", "0.5", "--max_train_steps", "2", "--logging_steps", "1"]
    assert main([*command, "--output_dir", str(tmp_path / "run")]) == 0
    assert ", with 0.5 times LPIPS (vgg) of the decoded images; the base model" in capsys.readouterr().err
    (row,) = json.loads((tmp_path / "run" / "metrics.json").read_text())["results"]
    assert (row["lpips_weight"], row["lpips_net"]) == (0.5, "vgg")
    assert "LPIPS in the loss" in (tmp_path / "run" / "README.md").read_text()

    def refused(*options: str) -> str:
        assert main([*command, "--output_dir", str(tmp_path / "refused"), *options]) == 2
        assert not (tmp_path / "refused" / "config.json").exists()
        return capsys.readouterr().err.splitlines()[-1]

    assert "lpips_net alex takes images of 31 pixels or more, and those of the pairs have 16 x 16" in refused(
        "--lpips_net", "alex", "--dry_run"
    )

    def offline(net: str, verbose: bool) -> nn.Module:
        raise URLError("no\nnetwork")

    monkeypatch.setattr(sys.modules["lpips"], "LPIPS", offline)
    sentence = refused()
    assert "lpips_net vgg cannot be loaded (URLError: '<urlopen error no\\nnetwork>')" in sentence
    assert sentence.endswith("so go online once, or leave lpips_weight out")
    monkeypatch.setitem(sys.modules, "lpips", None)
    assert "lpips_weight needs the package lpips: pip install lpips" in refused("--dry_run")
    with pytest.raises(RefusedInputError, match="needs the package lpips"):
        AlignedTrainer.from_pretrained(tiny_folder, TrainingConfig(distill=True, lpips_weight=1.0))


@pytest.fixture
def traced_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch.compile trace the step as one graph, and run it without generating code, which takes minutes."""
    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda loss, fullgraph, options: compile(loss, fullgraph=fullgraph, backend="eager")
    )


@pytest.mark.slow
def test_compiled_step_is_one_graph_and_the_same(
    make_one_level_trainer: Any, make_batch: Any, traced_alone: None
) -> None:
    losses = [
        make_one_level_trainer(**DISTILL, lpips_weight=3.0, compile=on).step(pair_batch(make_batch)).item()
        for on in (False, True)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.slow
def test_real_package_computes_and_loads_without_the_network(
    make_one_level_trainer: Any,
    make_batch: Any,
    traced_alone: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    if find_spec("lpips") is None:
        pytest.skip("lpips is not installed")
    from torchvision.models import squeezenet1_1

    files = tmp_path / "hub" / "checkpoints"
    files.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(squeezenet1_1(weights=None).state_dict(), files / "squeezenet1_1-b8a52dc0.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*arguments: Any, **options: Any) -> None:
        raise URLError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    with pytest.raises(RefusedInputError, match=r"lpips_net vgg cannot be loaded \(URLError: .*, so go online once"):
        make_one_level_trainer(**DISTILL, lpips_weight=1.0)
    generator = torch.Generator().manual_seed(8)
    noise, latents = (torch.randn(4, 4, 12, 12, generator=generator) for _ in range(2))
    batch = make_batch(noise=noise, latents=latents)
    options: dict[str, Any] = {**DISTILL, "lpips_weight": 30.0, "lpips_net": "squeeze"}
    trainer = make_one_level_trainer(**options)
    from lpips import LPIPS

    with torch.no_grad():
        latent, lpips = (x.mean() for x in losses_of(trainer, batch, trainer._training_step._perceptual._network))
        assert isinstance(trainer._training_step._perceptual._network, LPIPS) and lpips > 0.001
    loss = trainer.step(batch).item()
    assert loss == pytest.approx((latent + 30 * lpips).item(), rel=1e-5)
    assert make_one_level_trainer(**options, compile=True).step(batch).item() == pytest.approx(loss, rel=1e-5)
