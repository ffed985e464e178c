"""LoRA files have their whole effect in other versions of diffusers, in environments without this package."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from d2f_fast.layers.fused_lora import use_fused_lora
from d2f_fast.lora.inject import inject_lora
from d2f_fast.lora.write import save_lora

CLIENT = Path(__file__).with_name("lora_client.py")
# tests/older_environments.py makes the environments and prints this variable.
OLDER_PYTHONS = [name for name in os.environ.get("D2F_OLDER_PYTHONS", "").split(os.pathsep) if name]
FEED_FORWARD = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
TARGETS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": FEED_FORWARD[:4]},
    "feed-forward": {"target_modules": FEED_FORWARD},
    "mixed ranks": {"conv_rank": 3},
    "first and last": {"conv_rank": 3, "first_last_layers": True},
}
# The readers of kohya's names before 0.36 leave out the first and the last layer, or refuse the file.
KNOWN_TO_LOSE = {("0.31", "mixed ranks"), *((v, "first and last") for v in ("0.31", "0.32", "0.35"))}
PEFT_FILE = "pytorch_lora_weights"


@pytest.fixture(scope="module")
def saved(make_family_unet: Any, randomize: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a LoRA of every family and target set, its network, inputs, and its change of the output in training."""
    root = tmp_path_factory.mktemp("versions")
    generator = torch.Generator().manual_seed(3)
    for family in ("sd1", "sd2", "sdxl"):
        for targets, options in TARGETS.items():
            unet, folder = make_family_unet(family), root / f"{family}, {targets}"
            unet.save_pretrained(folder / "unet")
            given = {"sample": torch.randn(2, 4, 16, 16, generator=generator), "timestep": torch.tensor([673.0, 20.0])}
            given["encoder_hidden_states"] = torch.randn(2, 8, unet.config.cross_attention_dim, generator=generator)
            pooled = {}
            if family == "sdxl":
                pooled = {"text_embeds": torch.randn(2, 1280, generator=generator), "time_ids": torch.ones(2, 6)}
            np.savez(folder / "inputs.npz", **{name: tensor.numpy() for name, tensor in (given | pooled).items()})
            with torch.no_grad():
                base = unet(**given, added_cond_kwargs=pooled or None).sample
                inject_lora(unet, 2, alpha=3.0, **options)
                randomize(unet)
                with use_fused_lora(unet):
                    change = unet(**given, added_cond_kwargs=pooled or None).sample - base
            np.save(folder / "expected.npy", change.numpy())
            save_lora(unet, folder, lora_format="both")
    return root


def errors(python: str, saved: Path) -> Iterator[tuple[str, str, float | str]]:
    """Yield case, file and error of the change, relative to the change, or the words of a refusal."""
    for left in (*saved.glob("*/*kohya.npy"), *saved.glob(f"*/{PEFT_FILE}.npy"), *saved.glob("*/*.txt")):
        left.unlink()
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run([python, CLIENT, saved], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for folder in sorted(saved.iterdir()):
        expected = np.load(folder / "expected.npy")
        for file in sorted(folder.glob("*.safetensors")):
            name = PEFT_FILE if file.stem == PEFT_FILE else "kohya"
            if file.with_suffix(".txt").exists():
                yield folder.name, name, file.with_suffix(".txt").read_text()
            else:
                got = np.load(file.with_suffix(".npy"))
                yield folder.name, name, float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def version_of(python: str) -> str:
    """Return the minor version of diffusers in an environment."""
    code = "import importlib.metadata as m; print(m.version('diffusers'))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return ".".join(done.stdout.strip().split(".")[:2])


@pytest.mark.slow
@pytest.mark.parametrize("python", [sys.executable, *OLDER_PYTHONS])
def test_lora_files_have_their_whole_effect_in_another_version(python: str, saved: Path) -> None:
    version, missed = version_of(python), []
    for case, file, error in errors(python, saved):
        targets = case.partition(", ")[2]
        print(f"diffusers {version}, {case}, {file}: {error if isinstance(error, str) else f'{error:.1e}'}")
        is_known = (file == "kohya" or version == "0.31") and (version, targets) in KNOWN_TO_LOSE
        if not is_known and not (isinstance(error, float) and error <= 1e-4):
            missed.append((case, file, error))
    assert not missed
