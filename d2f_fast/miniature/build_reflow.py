"""Make the miniature's reflow LoRA: the stage `reflow` of `build.py`.

The miniature makes pairs of noise and latents for the captions of its images, with and without a background colour, and
a LoRA is trained on them, by the two commands that users have. The file holds the LoRA in float16, with its update
multiplied by a constant.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np

from d2f_fast.files.hashes import file_sha256
from d2f_fast.files.tensor_file import read_tensors, write_tensors
from d2f_fast.lora.source import LORA_FILE
from d2f_fast.miniature import REFLOW_LORA, emoji

SEED = 22
PAIR_OPTIONS = {"guidance_scale": 2, "num_inference_steps": 12, "batch_size": 64, "seed": SEED}
# More of the training is spent near the noise, where one or two steps decide everything.
TRAINING_OPTIONS = {
    "rank": 20,
    "conv_rank": 20,
    "train_batch_size": 32,
    "learning_rate": 1.5e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 50,
    "ema_decay": 0.99,
    "flow_shift": 5,
    "sampling_shift": 1,
    "checkpointing_steps": 0,
    "lora_format": "diffusers",
    "seed": SEED,
}
# Many images are right for a caption without a colour, so the network needs more of their pairs to learn which noise
# belongs to which.
REPEATS_WITHOUT_COLOUR = 6
# So short a training falls short of the pairs: more of the same update comes nearer to them. The factor was chosen with
# 400 images of each of the seeds 77 and 78.
UPDATE_SCALE = 1.35


def prompts() -> list[str]:
    """Return every caption in a random order, and after these the captions without a colour, again and again."""
    names = range(len(emoji.names()))
    colours = [*range(len(emoji.BACKGROUNDS)), None]
    random = np.random.default_rng(SEED)
    captions = [emoji.caption(name, colour) for name in names for colour in colours]
    without_colour = [emoji.caption(name, None) for name in names] * REPEATS_WITHOUT_COLOUR
    return [part[i] for part in (captions, without_colour) for i in random.permutation(len(part))]


def build_reflow(folder: Path, pairs: int, steps: int) -> None:
    """Make the pairs, train the LoRA, and write it into the package.

    Args:
        folder: folder for the prompts, the pairs and the run; finished pairs in it are kept.
        pairs: number of pairs.
        steps: training steps.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompts.txt").write_text("\n".join(prompts()) + "\n")
    places = {"prompts_file": folder / "prompts.txt", "num_pairs": pairs, "output_dir": folder / "pairs"}
    _d2f("pairs", {**places, **PAIR_OPTIONS})
    places = {"pairs": folder / "pairs", "max_train_steps": steps, "output_dir": folder / "lora"}
    _d2f("train", {**places, **TRAINING_OPTIONS}, "--first_last_layers")
    write_shipped(folder / "lora" / LORA_FILE, REFLOW_LORA)
    print(f"{REFLOW_LORA}: {REFLOW_LORA.stat().st_size} bytes, sha256 {file_sha256(REFLOW_LORA)}")


def write_shipped(trained: Path, shipped: Path) -> None:
    """Write the file of a LoRA in float16, with its update multiplied by `UPDATE_SCALE`.

    Args:
        trained: trained LoRA in diffusers' form.
        shipped: file to write.
    """
    tensors, header = read_tensors(trained)
    scales = {name: UPDATE_SCALE if ".lora_B." in name else 1.0 for name in tensors}
    write_tensors(shipped, {name: (scales[name] * tensor).half() for name, tensor in tensors.items()}, header)


def _d2f(command: str, options: dict[str, object], *flags: str) -> None:
    """Run a command of this package."""
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    subprocess.run([sys.executable, "-m", "d2f_fast", command, *words, *flags], check=True)
