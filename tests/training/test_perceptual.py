"""LPIPS in the loss of a distillation, against its own computation by torch's autograd.

The packages lpips and torchvision are not installed for the tests, because PyPI's torchvision does not go with a CPU
build of torch. So most tests use a stand-in, with the same steps, and two small layers with random weights.
"""

import inspect
import json
import os
import sys
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal, cast
from urllib.error import URLError

import pytest
import torch
from torch import Tensor, nn

from d2f_fast.commands.main import main
from d2f_fast.config import TrainingConfig
from d2f_fast.data.pairs import PairDataset
from d2f_fast.errors import RefusedInputError
from d2f_fast.files.tensor_file import read_metadata, read_tensors
from d2f_fast.models.base_model import BaseModel
from d2f_fast.sampling.integrate import sample_flow, unet_velocity
from d2f_fast.training.perceptual import load_perceptual_loss
from d2f_fast.training.run_settings import settings_of
from d2f_fast.training.trainer import AlignedTrainer

DISTILL = {"distill": True, "caption_dropout": 0.0, "max_grad_norm": 1e9}


class StandIn(nn.Module):
    """Compute LPIPS as the package does: normalised features of two layers, weighted, squared and averaged."""

    def __init__(self) -> None:
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


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stand-in in the place of the package."""
    monkeypatch.setattr("d2f_fast.training.perceptual._load_network", lambda config: StandIn())
    monkeypatch.setattr("d2f_fast.training.launch._LPIPS_PACKAGES", ())


@pytest.fixture
def make(stand_in: None, make_one_level_trainer: Callable[..., AlignedTrainer]) -> Callable[..., AlignedTrainer]:
    """Return a function that makes trainers with their own autoencoder, for a distillation with the stand-in."""
    return partial(make_one_level_trainer, **DISTILL)


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


@pytest.mark.parametrize(
    "options", [{}, {"objective": "fm"}, {"adapter": "full", "lpips_weight": 1e5}], ids=["default", "fm", "full"]
)
def test_loss_and_gradient_are_those_of_the_decoded_images(
    make: Any, make_batch: Any, gradients_of: Any, options: dict[str, Any]
) -> None:
    trainer = make(**{"lpips_weight": 30.0, **options})
    weight = trainer.config.lpips_weight
    perturb(trainer)
    batch, parameters = pair_batch(make_batch), trainer.trainable.values()
    latent, lpips = (each.mean() for each in losses_of(trainer, batch, StandIn().eval()))
    alone = torch.autograd.grad(latent, parameters, retain_graph=True)
    expected = torch.autograd.grad(latent + weight * lpips, parameters)
    assert trainer.step(batch).item() == pytest.approx((latent + weight * lpips).item(), rel=1e-6)
    parts = trainer._training_step.parts()
    assert parts == pytest.approx({"latent_loss": latent.item(), "lpips": lpips.item()}, rel=1e-5)
    got, wanted, without = (
        torch.cat([x.flatten() for x in y]) for y in (gradients_of(trainer).values(), expected, alone)
    )
    assert (got - wanted).norm() <= 4e-6 * wanted.norm()
    assert (without - wanted).norm() > 0.01 * wanted.norm()


def test_micro_batches_and_uneven_slices_change_nothing(
    make: Any, make_batch: Any, gradients_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"lpips_weight": 3.0, "learning_rate": 1e-30}  # This rate changes no weight between the steps.
    whole, parts = make(**options), make(**options, train_batch_size=2, gradient_accumulation_steps=2)
    batch = pair_batch(make_batch)

    def last_of(trainer: AlignedTrainer, *sizes: int) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Return losses and gradients of the last of several processes, which gets the sums of all of them."""
        sums: list[Tensor] = []

        def add(tensor: Tensor) -> None:
            sums.append(tensor.clone())
            tensor.copy_(torch.stack(sums).sum(0))

        monkeypatch.setattr("d2f_fast.training.step.sum_over_processes", add)
        trainer._training_step._num_processes, first = len(sizes), 0
        for size in sizes:
            own = {name: x[first : first + size] for name, x in batch.items()}
            loss = trainer.step({**own, "offset": first, "global_batch_size": 4}).item()
            first += size
        return {"loss": loss, **trainer._training_step.parts()}, gradients_of(trainer)

    for trainer in (whole, parts):
        perturb(trainer)
    losses, gradients = last_of(whole, 4)
    for sizes in ((4,), (3, 1), (4, 0), (0, 4)):
        found = last_of(parts, *sizes)
        assert found[0] == pytest.approx(losses, rel=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_bfloat16_step_decodes_and_compares_in_float32(make: Any, make_batch: Any) -> None:
    exact, rounded = (make(lpips_weight=1.0, mixed_precision=precision) for precision in ("no", "bf16"))
    seen: list[tuple[torch.dtype, bool]] = []

    def watch(module: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> None:
        seen.append((result.dtype, torch.is_autocast_enabled("cpu")))

    rounded.model.vae.decoder.register_forward_hook(watch)
    rounded._training_step._perceptual._network.slices[0].register_forward_hook(watch)
    losses = [trainer.step(pair_batch(make_batch)).item() for trainer in (exact, rounded)]
    assert seen == [(torch.float32, False)] * 4  # Both images are decoded, and then compared.
    assert losses[1] != losses[0] and losses[1] == pytest.approx(losses[0], rel=0.05)


def test_checkpointed_decoder_gives_the_same_gradients(
    make: Any, make_batch: Any, weights_of: Any, assert_equal: Any
) -> None:
    plain, saving = (make(lpips_weight=1.0, gradient_checkpointing=on) for on in (False, True))
    assert [x.model.vae.decoder.gradient_checkpointing for x in (plain, saving)] == [False, True]
    assert torch.equal(plain.step(pair_batch(make_batch)), saving.step(pair_batch(make_batch)))
    assert_equal(weights_of(plain), weights_of(saving))


def test_resumed_run_is_equal_bit_for_bit_and_saves_no_frozen_network(
    pairs: Path, make: Any, state_of: Any, assert_equal: Any, tmp_path: Path
) -> None:
    options = {"lpips_weight": 0.5, "train_batch_size": 3, "max_train_steps": 2}
    data = PairDataset([pairs])
    whole, first = make("whole", validation_steps=9, **options), make("divided", **(options | {"max_train_steps": 1}))
    frozen = {name: x.clone() for name, x in whole.model.vae.state_dict().items()}
    whole.fit(data, data)
    first.fit(data)
    second = make("divided", resume_from_checkpoint="latest", **options)
    assert second.fit(data)["steps"] == 2
    assert_equal(state_of(second), state_of(whole))
    network = whole._training_step._perceptual._network
    assert all(not p.requires_grad and p.grad is None for part in (network, whole.model.vae) for p in part.parameters())
    assert not network.training
    assert_equal(whole.model.vae.state_dict(), frozen)
    assert all("lora_" in name for name in whole.trainable)
    assert set(read_tensors(tmp_path / "whole" / "checkpoint-2" / "trainable.safetensors")[0]) == set(whole.trainable)
    # The log has both parts, and the validation loss the sum.
    rows = [row for row in logged(whole) if "loss" in row]
    assert all(row["loss"] == pytest.approx(row["latent_loss"] + 0.5 * row["lpips"]) for row in rows) and len(rows) == 2
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


def test_run_without_lpips_is_as_before(make: Any, make_batch: Any) -> None:
    trainer = make()
    trainer.step(pair_batch(make_batch))
    assert trainer._training_step.parts() == {}
    with pytest.raises(RefusedInputError, match="mask weighs latents, and lpips_weight compares whole images"):
        make(lpips_weight=1.0).step(pair_batch(make_batch, mask=torch.ones(4, 1, 8, 8)))


def test_command_says_what_the_loss_is_and_refuses_images_that_are_too_small(
    pairs: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stand_in: None
) -> None:
    command = ["train", "--pretrained_model_name_or_path", str(tiny_folder), "--pairs", str(pairs), "--rank", "2"]
    command += ["--distill", "--lpips_weight", "0.5", "--max_train_steps", "1", "--target_modules", "to_q"]
    assert main([*command, "--output_dir", str(tmp_path / "run")]) == 0
    assert ", with 0.5 times LPIPS (vgg) of the decoded images; the base model" in capsys.readouterr().err
    (row,) = json.loads((tmp_path / "run" / "metrics.json").read_text())["results"]
    assert (row["lpips_weight"], row["lpips_net"]) == (0.5, "vgg")
    assert "LPIPS in the loss" in (tmp_path / "run" / "README.md").read_text()

    refused = ["--output_dir", str(tmp_path / "refused"), "--lpips_net", "alex", "--dry_run"]
    assert main([*command, *refused]) == 2
    assert not (tmp_path / "refused" / "config.json").exists()
    assert "lpips_net alex takes images of 31 pixels or more, and those of the pairs have 16 x 16" in (
        capsys.readouterr().err
    )


# The file of weights


class Mischief:
    """Make a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return os.mkdir, (self.folder,)


@pytest.fixture
def weights_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return the path at which torch keeps SqueezeNet's weights, with modules like lpips and torchvision, offline.

    The network has two layers, which the modules name as lpips and torchvision do.
    """

    class Package(nn.Module):
        def __init__(self, net: str, pnet_rand: bool, verbose: bool) -> None:
            super().__init__()
            assert (net, pnet_rand, verbose) == ("squeeze", True, False)
            self.net, self.lins = nn.Module(), nn.Conv2d(2, 1, 1)
            self.net.slice1, self.net.slice2 = (
                nn.Sequential(OrderedDict({number: nn.Conv2d(2, 2, 1)})) for number in ("0", "3")
            )

    def get_weight(name: str) -> SimpleNamespace:
        assert name == "SqueezeNet1_1_Weights.IMAGENET1K_V1"
        url = f"https://download.pytorch.org/models/{path.name}"
        return SimpleNamespace(get_state_dict=partial(torch.hub.load_state_dict_from_url, url))

    def offline(*arguments: Any, **options: Any) -> None:
        raise URLError("no\nnetwork")

    path = tmp_path / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    path.parent.mkdir(parents=True)
    for module, content in (("lpips", {"LPIPS": Package}), ("torchvision.models", {"get_weight": get_weight})):
        monkeypatch.setitem(sys.modules, module, cast(ModuleType, SimpleNamespace(**content)))
    monkeypatch.setattr("d2f_fast.training.launch._LPIPS_PACKAGES", ())
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return path


def load(net: Literal["vgg", "alex", "squeeze"] = "squeeze") -> nn.Module:
    """Return the network of LPIPS that a run loads."""
    config = TrainingConfig(distill=True, lpips_weight=1.0, lpips_net=net)
    loss = load_perceptual_loss(config, cast(BaseModel, SimpleNamespace(device=torch.device("cpu"))))
    assert loss is not None
    return loss._network


def test_weights_are_those_of_the_file(weights_file: Path) -> None:
    names = [f"{number}.{name}" for number in (0, 3) for name in ("weight", "bias")]
    weights = {f"features.{name}": torch.randn((2, 2, 1, 1) if "weight" in name else 2) for name in names}
    torch.save(weights | {"classifier.1.weight": torch.zeros(3)}, weights_file)
    network = load()
    for name, weight in zip(("slice1.0", "slice1.0", "slice2.3", "slice2.3"), weights, strict=True):
        kind = weight.rpartition(".")[2]
        assert torch.equal(network.net.get_parameter(f"{name}.{kind}"), weights[weight])


def test_file_with_code_is_refused_and_does_not_run(weights_file: Path, tmp_path: Path) -> None:
    torch.save({"features.0.weight": Mischief(tmp_path / "mischief")}, weights_file)
    with pytest.raises(RefusedInputError, match=r"squeeze: its file in .*/hub/checkpoints is damaged, or holds"):
        load()
    assert not (tmp_path / "mischief").exists()


def test_weights_that_cannot_be_downloaded_are_named(weights_file: Path) -> None:
    with pytest.raises(
        RefusedInputError, match=r"loaded \(URLError: '<urlopen error no\\nnetwork>'\): .* go online once"
    ):
        load()


@pytest.fixture
def traced_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch.compile trace the step as one graph, and run it without generating code, which takes minutes."""
    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda loss, fullgraph, options: compile(loss, fullgraph=fullgraph, backend="eager")
    )


@pytest.mark.slow
def test_compiled_step_is_one_graph_and_the_same(make: Any, make_batch: Any, traced_alone: None) -> None:
    losses = [make(lpips_weight=3.0, compile=part).step(pair_batch(make_batch)).item() for part in ("off", "full")]
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
    from lpips import LPIPS
    from torchvision.models import alexnet, squeezenet1_1, vgg16

    files = tmp_path / "hub" / "checkpoints"
    files.mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*arguments: Any, **options: Any) -> None:
        raise URLError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    with pytest.raises(RefusedInputError, match=r"lpips_net vgg cannot be loaded \(URLError: .*, so go online once"):
        load("vgg")
    torch.manual_seed(0)
    named = {"vgg16-397923af": vgg16, "alexnet-owt-7be5be79": alexnet, "squeezenet1_1-b8a52dc0": squeezenet1_1}
    for (name, network), net in zip(named.items(), ("vgg", "alex", "squeeze"), strict=True):
        weights = {key: x for key, x in network(weights=None).state_dict().items() if key.startswith("features.")}
        if net == "squeeze":
            torch.save(weights, files / f"{name}.pth")
        else:
            # The files of torchvision that are older than this format have parameters.
            weights = {key: nn.Parameter(x) for key, x in weights.items()}
            torch.save(weights, files / f"{name}.pth", _use_new_zipfile_serialization=False)
        loaded = load(net)
        pairs = zip(loaded.net.state_dict().values(), weights.values(), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
        own = torch.load(Path(inspect.getfile(LPIPS)).parent / f"weights/v0.1/{net}.pth", "cpu", weights_only=True)
        assert own and all(torch.equal(loaded.state_dict()[key], x) for key, x in own.items())
    generator = torch.Generator().manual_seed(8)
    noise, latents = (torch.randn(4, 4, 12, 12, generator=generator) for _ in range(2))
    batch = make_batch(noise=noise, latents=latents)
    options: dict[str, Any] = {**DISTILL, "lpips_weight": 30.0, "lpips_net": "squeeze"}
    trainer = make_one_level_trainer(**options)
    with torch.no_grad():
        latent, lpips = (x.mean() for x in losses_of(trainer, batch, trainer._training_step._perceptual._network))
        assert lpips > 0.001
    loss = trainer.step(batch).item()
    assert loss == pytest.approx((latent + 30 * lpips).item(), rel=1e-5)
    assert make_one_level_trainer(**options, compile="full").step(batch).item() == pytest.approx(loss, rel=1e-5)
