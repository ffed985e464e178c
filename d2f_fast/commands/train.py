"""`d2f train`: finetune a model on captioned pictures."""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from d2f_fast.config import (
    TrainingConfig,
)
from d2f_fast.errors import RefusedInputError
from d2f_fast.models.library_messages import silence_libraries
from d2f_fast.models.names import MINIATURE


@dataclass(frozen=True)
class Train:
    """Finetune a model on captioned pictures.

    Args:
        train_data_dir: pictures with metadata.jsonl or .txt captions.
        options: of the training.
        pretrained_model_name_or_path: hub id, pipeline folder, .safetensors file, or "miniature", the embedded model.
        image_column: key of the file name in metadata.jsonl, beside "file_name".
        caption_column: key of the caption in metadata.jsonl.
        caption_extension: of caption files beside the pictures.
        dry_run: print the resolved options and stop.
        json: print the result as JSON.
    """

    train_data_dir: str
    options: Annotated[TrainingConfig, tyro.conf.arg(name="")] = field(default_factory=TrainingConfig)
    pretrained_model_name_or_path: str = MINIATURE
    image_column: str = "image"
    caption_column: str = "text"
    caption_extension: str = ".txt"
    dry_run: bool = False
    json: bool = False

    def run(self) -> dict[str, Any]:
        """Train, save, and return the result."""
        silence_libraries()
        from d2f_fast.data.image_folder import CaptionedImages
        from d2f_fast.data.order import steps_per_epoch
        from d2f_fast.files.run_record import write_run_record
        from d2f_fast.training.trainer import AlignedTrainer

        started, output = time.monotonic(), Path(self.options.output_dir)
        if self.options.adapter == "full" and (output / "pipeline").exists():  # before the training, not after it
            raise RefusedInputError(f"{output / 'pipeline'} exists: move it away, or choose another output_dir")
        dataset = CaptionedImages(self.train_data_dir, self.image_column, self.caption_column, self.caption_extension)
        trainer = AlignedTrainer.from_pretrained(self.pretrained_model_name_or_path, self.options)
        if trainer.accelerator.is_main_process:
            epochs = self.options.max_train_steps / steps_per_epoch(len(dataset), trainer.global_batch_size)
            print(f"d2f: {trainer.paths}", file=sys.stderr)
            print(
                f"d2f: {len(dataset)} pictures, {trainer.global_batch_size} a step:"
                f" {self.options.max_train_steps} steps are {epochs:.4g} epochs",
                file=sys.stderr,
            )
        result = trainer.fit(dataset)
        if not trainer.accelerator.is_main_process:
            return result | {"output": str(output)}
        saved = (
            trainer.save_lora(output) if self.options.adapter == "lora" else trainer.save_pipeline(output / "pipeline")
        )
        row = {"objective": self.options.objective, "adapter": self.options.adapter, **result}
        write_run_record(output, "d2f train", self.options.seed, time.monotonic() - started, [row])
        return row | {"output": str(saved)}
