"""Measure how fast a network learns the flow from a teacher, and how fast from the data alone, on the miniature.

    python -m benchmarks.teacher --output to_flow.json
    python -m benchmarks.teacher --output to_v.json --flow_checkpoint flow_checkpoint

The first command makes rectified-flow checkpoints of the miniature, which predicts noise, in its own domain. The second
one takes such a checkpoint (made in the named folder by 400 steps of full finetuning with the teacher, unless it is
there) and makes v-prediction models of it. After each number of steps the relative error of the velocity against that
of the starting model is measured on held-out images; after the last one the Fréchet distance of images of four
evaluations without guidance, beside that of the starting model. A seed decides the division of the images into trained
and held-out ones, all noise, and the order of the training. Rows that the file has are not measured again, and are
refused where they have another starting model.
"""

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.kept_rows import same_options
from d2f_fast.config import TrainingConfig
from d2f_fast.demo.generation import single_threaded_operations
from d2f_fast.evaluation.feature_space import FeatureSpace
from d2f_fast.files.json_file import write_json
from d2f_fast.flow.flow import Flow
from d2f_fast.miniature import emoji, load_miniature
from d2f_fast.miniature.classifier import load_classifier
from d2f_fast.models.base_model import BaseModel
from d2f_fast.models.options import ModelOptions
from d2f_fast.sampling.integrate import sample_flow, unet_velocity
from d2f_fast.sampling.multistep import sample_multistep
from d2f_fast.training.teacher_options import TeacherOptions
from d2f_fast.training.trainer import AlignedTrainer

POINTS = (10, 20, 40, 60, 80, 160)
CHECKPOINT_STEPS = 400
START = "starting model"
BATCH, TRAINING, HELD_OUT, IMAGES = 32, 2048, 256, 1000
LORA = {"adapter": "lora", "rank": 32, "conv_rank": 32, "first_last_layers": True}
# Options of each case, and whether it trains on generated pairs in place of images.
CASES: dict[str, tuple[dict[str, Any], str | None, bool]] = {
    f"{name}, lr {rate:g}, {kind}": ({**options, "learning_rate": rate}, teacher, kind == "teacher, pairs alone")
    for (name, options, rate), (kind, teacher) in itertools.product(
        (("full", {"adapter": "full"}, 3e-4), ("full", {"adapter": "full"}, 1e-3), ("lora", LORA, 1e-3)),
        (("data", None), ("teacher", "base"), ("teacher, pairs alone", "base")),
    )
}


class Trial:
    """Starting model, data and measurements that all cases share.

    Args:
        checkpoint: folder of a rectified-flow checkpoint that becomes a v-prediction model; None for the miniature,
            which becomes a rectified-flow checkpoint.
        seed: seed of the division of the images into trained and held-out ones, and of the start noise.
    """

    def __init__(self, checkpoint: Path | None = None, seed: int = 0) -> None:
        self.checkpoint = checkpoint
        self.base = BaseModel(load_miniature()) if checkpoint is None else BaseModel.load(str(checkpoint))
        items = [(n, c) for n in range(len(emoji.names())) for c in range(len(emoji.BACKGROUNDS))]
        held_out = [item for item in items if item in emoji.held_out_pairs()]
        seen = [item for item in items if item not in emoji.held_out_pairs()]
        order = np.random.default_rng(seed)
        chosen = [seen[i] for i in order.permutation(len(seen))[:TRAINING]]
        measured = [held_out[i] for i in order.permutation(len(held_out))]
        self.latents, self.texts = self._encoded(chosen)
        self.real_latents, self.real_texts = self._encoded(measured[:HELD_OUT])
        generator = torch.Generator().manual_seed(seed + 1)
        self.noise = torch.randn(self.real_latents.shape, generator=generator)
        self.t = (torch.arange(HELD_OUT) + 0.5) / HELD_OUT
        self.reference = self.velocity(self.base, self.base.flow)
        self.captions = [emoji.caption(*measured[i % len(measured)]) for i in range(IMAGES)]
        self.start = torch.randn((IMAGES, *self.latents.shape[1:]), generator=generator)
        halves = [emoji.render([emoji.Emoji(*item) for item in part], "noto") for part in (seen[::4], seen[2::4])]
        self.space = FeatureSpace(load_classifier().features, *halves, seed=0)
        self.pair_noise = torch.randn(self.latents.shape, generator=generator)
        self.pair_latents = torch.cat([
            sample_multistep(unet_velocity(self.base.unet, self.base.flow, text), noise, self.base.flow.times(15))
            for text, noise in zip(self.texts.split(64), self.pair_noise.split(64), strict=True)
        ])  # fmt: skip

    def _encoded(self, items: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Return latents and text of images."""
        pixels = emoji.render([emoji.Emoji(*item) for item in items], "noto")
        mean = self.base.encode_images(pixels)["mean"]
        texts = self.base.encode_prompts([emoji.caption(*item) for item in items])["encoder_hidden_states"]
        return self.base.scale_latents(mean), texts

    def velocity(self, model: BaseModel, flow: Flow) -> Tensor:
        """Return the velocity at the held-out states."""
        x_t = flow.interpolate(self.real_latents, self.noise, self.t)
        return unet_velocity(model.unet, flow, self.real_texts)(x_t, self.t)

    def error(self, model: BaseModel, flow: Flow) -> float:
        """Return the relative error of a network's velocity against that of the aligned base."""
        return float((self.velocity(model, flow) - self.reference).norm() / self.reference.norm())

    def distance(self, model: BaseModel, flow: Flow) -> float:
        """Return the Fréchet distance of images of four evaluations, above that of real images."""
        images = []
        for first in range(0, IMAGES, 100):
            text = model.encode_prompts(self.captions[first : first + 100])["encoder_hidden_states"]
            end = sample_flow(
                unet_velocity(model.unet, flow, text), self.start[first : first + 100], times=flow.times(4)
            )
            assert isinstance(end, Tensor)
            images.append(model.decode(end).clamp(-1, 1))
        found = self.space.measure(torch.cat(images), repeats=2)
        return found["frechet_distance"] - found["frechet_floor"]

    def trainer(self, folder: str, teacher: str | None, seed: int, **options: Any) -> AlignedTrainer:
        """Return the trainer of a case."""
        options = {"output_dir": folder, "train_batch_size": BATCH, "seed": seed, **options}
        if self.checkpoint is None:
            config = TrainingConfig(objective="fm", **options)
            return AlignedTrainer.from_pretrained(load_miniature(), config, teacher_options=TeacherOptions(teacher))
        config = TrainingConfig(objective="diffusion", **options)
        reading = ModelOptions(prediction_type="v_prediction")
        teachers = TeacherOptions(teacher, teacher_prediction_type="flow_prediction" if teacher else None)
        return AlignedTrainer.from_pretrained(str(self.checkpoint), config, reading, teachers)

    def train(self, trainer: AlignedTrainer, steps: int, *, of_pairs: bool = False) -> Iterator[int]:
        """Train on random samples, and yield the number of steps after each."""
        order = np.random.default_rng(trainer.config.seed)
        for step in range(1, steps + 1):
            index = torch.from_numpy(order.integers(TRAINING, size=BATCH))
            batch = {"latents": self.latents[index], "encoder_hidden_states": self.texts[index]}
            if of_pairs:
                batch |= {"latents": self.pair_latents[index], "noise": self.pair_noise[index]}
            trainer.step(batch)  # type: ignore[arg-type]
            yield step


def make_checkpoint(folder: Path) -> None:
    """Make a rectified-flow checkpoint of the miniature in a folder."""
    with torch.no_grad():
        trial = Trial()
    with tempfile.TemporaryDirectory() as run:
        options = {"adapter": "full", "learning_rate": 3e-4, "ema_decay": 0.99}
        trainer = trial.trainer(run, "base", 0, **options)
        for _ in tqdm(trial.train(trainer, CHECKPOINT_STEPS), total=CHECKPOINT_STEPS, desc="flow checkpoint"):
            pass
        trainer.save_pipeline(folder)


def measure(trial: Trial, case: str, seed: int) -> dict[str, Any]:
    """Train one case, and return its row."""
    if case == START:
        with torch.no_grad():
            return {"case": START, "seed": seed, "distance": round(trial.distance(trial.base, trial.base.flow), 2)}
    options, teacher, of_pairs = CASES[case]
    errors: dict[int, float] = {}
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trial.trainer(folder, teacher, seed, ema_decay=0.0, **options)
        for step in trial.train(trainer, POINTS[-1], of_pairs=of_pairs):
            if step in POINTS:
                with torch.no_grad():
                    errors[step] = round(trial.error(trainer.model, trainer.objective.flow), 4)
    seconds = time.process_time() - started
    with torch.no_grad():
        distance = trial.distance(trainer.model, trainer.objective.flow)
    return {"case": case, "seed": seed, "error": errors, "distance": round(distance, 2), "cpu_seconds": round(seconds)}


def main() -> None:
    """Measure all cases, and write a row of each as it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("teacher.json"), help="file of the rows")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds of each case (%(default)s)")
    text = "folder of a rectified-flow checkpoint, to make a v-prediction model of (default: the reverse)"
    parser.add_argument("--flow_checkpoint", type=Path, help=text)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="cases (all)")
    arguments = parser.parse_args()
    with single_threaded_operations():
        if arguments.flow_checkpoint and not arguments.flow_checkpoint.exists():
            make_checkpoint(arguments.flow_checkpoint)
        rows = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
        start = arguments.flow_checkpoint and str(arguments.flow_checkpoint.resolve())
        own = {"flow_checkpoint": start}
        same_options({f"row {i} of {arguments.output}": row.get("options") for i, row in enumerate(rows)}, own)
        for seed in range(arguments.seeds):
            known = {row["case"] for row in rows if row["seed"] == seed}
            missing = [case for case in (START, *arguments.cases) if case not in known]
            if not missing:
                continue
            with torch.no_grad():
                trial = Trial(arguments.flow_checkpoint, seed)
            for case in missing:
                rows.append(measure(trial, case, seed) | {"options": own})
                print(rows[-1], flush=True)
                write_json(arguments.output, rows)


if __name__ == "__main__":
    main()
