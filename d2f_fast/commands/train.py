"""`d2f train`: finetune a model on captioned images, pairs of noise and latents, depth, or image pairs."""

import dataclasses
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from d2f_fast.commands.train_data import check_data, held_out_files, known_settings, training_files
from d2f_fast.config import TrainingConfig, check_options, option
from d2f_fast.data.depth_options import DepthOptions
from d2f_fast.data.source_options import SourceOptions
from d2f_fast.errors import RefusedInputError, printable
from d2f_fast.files.lock import locked_folder
from d2f_fast.image_sizes import Resolution, simplest
from d2f_fast.models.library_messages import silence_libraries
from d2f_fast.models.names import MINIATURE
from d2f_fast.models.options import ModelOptions, check_flow_schedule
from d2f_fast.models.tags import TAGS_FILE, trained_size
from d2f_fast.training.launch import check_launch
from d2f_fast.training.teacher_options import TeacherOptions, check_teacher_files

if TYPE_CHECKING:
    from d2f_fast.commands.train_data import HeldOutFiles, TrainingFiles
    from d2f_fast.models.configs import ModelConfigs
    from d2f_fast.training.trainer import AlignedTrainer, RunResult


@dataclass(frozen=True)
class Train:
    """Finetune a model on captioned images, pairs of noise and latents, depth, or image pairs.

    Required: --train_data_dir or --pairs. Without --pretrained_model_name_or_path the miniature is trained, a tiny
    model of 32-pixel emoji inside this package, which is there for trying things out. The training runs on the GPU, or
    on the CPU where there is none; `accelerate launch -m d2f_fast train ...` uses several GPUs.

    For sampling in one to four steps, train a second time, on pairs that the model has made itself (reflow): see the
    last two examples.

    Args:
        train_data_dir: Folder of the training images. Captions are in a text file beside each image (a.jpg and a.txt)
            or in one file metadata.jsonl. With --task depth it has the sub-folders rgb and depth, or another layout of
            docs/depth.md; with --task image_to_image the sub-folders source and target. Several folders are mixed, see
            --dataset_weights. Not together with --pairs. Default: none.
        pairs: Train on pairs of noise and latents in place of images (reflow). Give folders of `d2f pairs`, or tar
            files of the same content; {000000..000009}.tar names ten. Options about image files, crops, flips and
            --cache_latents are then an error. Default: none.
        pretrained_model_name_or_path: Model to start from: a Hugging Face id, a diffusers pipeline folder, or one
            .safetensors file, of Stable Diffusion 1.x, 2.x or SDXL. "miniature" is the tiny model.
        task: What the model learns. "text" generates images of captions. "depth" predicts the depth of an image; the
            result then also has a folder `pipeline` for diffusers' MarigoldDepthPipeline. "image_to_image" changes an
            image, such as a small or a damaged one, into another: the flow starts from it in place of noise, see
            docs/image_to_image.md.
        dataset_weights: Weight of each of several folders of --train_data_dir, such as 0.9 0.1. An epoch has as many
            images as all folders together, in the ratio of the weights. Default: the numbers of images, so that each
            image comes once an epoch.
        pairs_of_another_model: Accept pairs that another model made, such as a larger one with the same latents. They
            are an error otherwise.
        validation_data_dir: Folder of captioned images that are not trained on. Their loss is measured every
            --validation_steps, on 64 images at most, spread over the folder. With --task image_to_image it has the
            sub-folders source and target. Not with --task depth. Default: none.
        validation_pairs: Pairs that are not trained on, in place of such images; 64 at most are used. They are given as
            for --pairs. Default: none.
        image_column: Image of a line of metadata.jsonl, where lines name several. "image" is that of the key
            "file_name"; any other name X is that of the key "X_file_name", or else "X". It needs metadata.jsonl.
            Default: "image".
        caption_column: Key of metadata.jsonl whose value is the caption, or a list of captions of which each epoch
            takes one at random. It needs metadata.jsonl. Default: "text".
        caption_extension: Ending of the names of caption files, such as .caption. Not for a folder with metadata.jsonl.
            Default: ".txt".
        model_options: Options of the base model.
        teacher_options: Options of the teacher.
        depth_options: Options of the depth.
        source_options: Options of a flow that starts from an image.
        options: Options of the training itself.
        dry_run: Check the options and the files, print all options as JSON, and stop. Nothing is downloaded, computed
            or written. An option that was left open is printed as null.
        json: Print the result (steps, last loss, skipped steps, seconds, path) as one line of JSON, in place of the
            path alone. A skipped step is one whose loss or gradient was not a finite number; it changed no weight.

    Examples:
        d2f train --train_data_dir photos --output_dir trial --max_train_steps 20
        d2f train --pretrained_model_name_or_path MODEL --train_data_dir photos --mixed_precision bf16
        d2f pairs --model MODEL --prompts_file prompts.txt --num_pairs 20000 --output_dir pairs
        d2f train --pretrained_model_name_or_path MODEL --pairs pairs --output_dir reflow
    """

    train_data_dir: tuple[str, ...] | str | None = option("essential", None, metavar="FOLDER")
    pairs: tuple[str, ...] | None = option("essential", None, metavar="PATH")
    pretrained_model_name_or_path: str = option("essential", MINIATURE, metavar="MODEL")
    task: Literal["text", "depth", "image_to_image"] = option("method", "text")
    dataset_weights: tuple[float, ...] | None = option("data", None)
    pairs_of_another_model: bool = option("data", False)
    validation_data_dir: str | None = option("data", None, metavar="FOLDER")
    validation_pairs: tuple[str, ...] | None = option("data", None, metavar="PATH")
    image_column: str | None = option("data", None, metavar="NAME")
    caption_column: str | None = option("data", None, metavar="KEY")
    caption_extension: str | None = option("data", None)
    model_options: ModelOptions = field(default_factory=ModelOptions)
    teacher_options: TeacherOptions = field(default_factory=TeacherOptions)
    depth_options: DepthOptions = field(default_factory=DepthOptions)
    source_options: SourceOptions = field(default_factory=SourceOptions)
    options: TrainingConfig = field(default_factory=TrainingConfig)
    dry_run: bool = option("other", False)
    json: bool = option("other", False)

    def __post_init__(self) -> None:
        """Hold a single folder as text, and several as a tuple."""
        if isinstance(self.train_data_dir, tuple) and len(self.train_data_dir) < 2:
            object.__setattr__(self, "train_data_dir", next(iter(self.train_data_dir), None))

    @property
    def folders(self) -> tuple[str, ...]:
        """Return the folders of the training images."""
        given = self.train_data_dir or ()
        return (given,) if isinstance(given, str) else given

    def check(self) -> None:
        """Refuse, before the slow imports and the training, what would be refused after them.

        Raises:
            RefusedInputError: The data, the model, the output folder or an option cannot be used.
        """
        self._checked_data()

    def run(self) -> dict[str, Any]:
        """Train the model, save the result, and return what was trained and where it was written.

        Raises:
            RefusedInputError: The data, the model or an option cannot be used.
        """
        data, output = self._checked_data(), Path(self.options.output_dir)
        # The first process writes, and so keeps other runs out, before the slow imports and the loading of the model.
        writes = int(os.environ.get("RANK", 0)) == 0
        with locked_folder(output) if writes else nullcontext():
            return self._train(*data, output)

    def _train(self, found: "TrainingFiles", held_out: "HeldOutFiles", output: Path) -> dict[str, Any]:
        """Train and save in an output folder that no other run uses."""
        started = time.monotonic()
        silence_libraries()
        from d2f_fast.commands.data_lines import data_lines
        from d2f_fast.data.depth_encoding import DepthDataset, options_for_depth
        from d2f_fast.data.pair_checks import options_for_pairs
        from d2f_fast.data.pairs import PairDataset
        from d2f_fast.files.run_record import write_run_record
        from d2f_fast.training.objective import method_line
        from d2f_fast.training.signals import InterruptedRunError, stop_signals
        from d2f_fast.training.trainer import AlignedTrainer

        dataset = DepthDataset(found, self.depth_options, self.dataset_weights) if isinstance(found, list) else found
        options = self.teacher_options.settle(self.options)
        options = options_for_pairs(options, dataset) if isinstance(dataset, PairDataset) else options
        options = options_for_depth(options) if isinstance(dataset, DepthDataset) else options
        options = dataclasses.replace(options, resolution=options.resolution or self._trained_resolution())
        trainer = AlignedTrainer.from_pretrained(
            *(self.pretrained_model_name_or_path, options, self.model_options, self.teacher_options),
            context_images=int(self.task == "depth"),
        )
        trainer.command_options = _own_options(self)
        facts = trainer.model.facts
        if trainer.accelerator.is_main_process:
            taught = [] if trainer.teacher is None else [str(trainer.teacher)]
            of_model = (
                trainer.paths,
                f"Model {printable(self.pretrained_model_name_or_path)}: {facts}",
                method_line(trainer.config, trainer.model.flow),
                *taught,
            )
            for line in (*of_model, *data_lines(trainer, dataset, self.folders, self.options.resolution)):
                print(f"d2f: {line}", file=sys.stderr)
        # A signal that arrives after the last step waits until the result is saved, unless a checkpoint holds it.
        with stop_signals(trainer.has_unsaved_steps, announce=trainer.accelerator.is_main_process) as signals:
            result = trainer.fit(dataset, held_out)
            if not trainer.accelerator.is_main_process:
                return result | {"output": str(output)}
            if result["loss"] is None and not result["skipped_steps"]:
                print(f"d2f: step {result['steps']} was taken before: raise max_train_steps to go on", file=sys.stderr)
            is_lora = self.options.adapter == "lora"
            # A run that goes on from a checkpoint replaces its own result; `check` has refused any other folder.
            if is_lora:
                saved = trainer.save_lora(output)
            if not is_lora or isinstance(dataset, DepthDataset):
                saved = trainer.save_pipeline(output / "pipeline", replace=True)
            if isinstance(dataset, DepthDataset) and dataset.invalid:
                share = sum(dataset.invalid.values()) / len(dataset.invalid)
                print(f"d2f: {share:.2%} of the pixels had no depth in range, and no part in the loss", file=sys.stderr)
            method = {"objective": trainer.config.objective, "fm_form": trainer.config.fm_form}
            row = {**{k: v for k, v in method.items() if v is not None}, "adapter": self.options.adapter, **result}
            row |= {"model": dataclasses.asdict(facts)}
            if weight := trainer.config.lpips_weight:
                row |= {"lpips_weight": weight, "lpips_net": trainer.config.lpips_net}
            if trainer.teacher is not None:
                row |= {"teacher": trainer.teacher.name, "teacher_guidance_scale": trainer.teacher.guidance_scale}
            if (start := trainer.model.starting_lora) is not None:
                row |= {"init_lora": {"file": str(start.path), "scale": start.scale, "sha256": start.sha256}}
            write_run_record(output, "d2f train", self.options.seed, time.monotonic() - started, [row])
            _say_how_to_sample(output, self.pretrained_model_name_or_path, trainer, result)
        if (number := signals.received) is not None:
            name = signal.Signals(number).name
            raise InterruptedRunError(f"stopped by {name} after the run was complete: {saved} is saved", number)
        return row | {"output": str(saved)}

    def _checked_data(self) -> "tuple[TrainingFiles, HeldOutFiles]":
        """Return the data and the held-out data, once all that can be refused without torch has been checked."""
        from d2f_fast.training.run_settings import check_settings

        configs = self._check_files()
        dataset, held_out = training_files(self), held_out_files(self)
        if configs is not None and (self.pairs or self.validation_pairs):
            from d2f_fast.data.pair_checks import check_pairs_of_run  # It imports NumPy.

            trained = self._trained_resolution()
            check_pairs_of_run(self.options, self.model_options, configs, trained, dataset, held_out)
        of_data = known_settings(self, dataset)
        check_settings(self.options, self.model_options, self.teacher_options, configs, of_data)
        return dataset, held_out

    def _check_files(self) -> "ModelConfigs | None":
        """Refuse options, a model, LoRA and a checkpoint that cannot be used, and return the model's configurations."""
        check_options(self)
        check_launch(self.options, os.environ)
        self._check_pipeline(Path(self.options.output_dir) / "pipeline")
        check_data(self)
        from d2f_fast.models.configs import check_one_text_encoder, check_training, read_configs
        from d2f_fast.training.adapter import check_adapter
        from d2f_fast.training.checkpoint import refuse_used_folder

        model, is_depth = (self.pretrained_model_name_or_path, self.model_options), self.task == "depth"
        if self.options.objective == "fm":
            check_flow_schedule(self.model_options, "objective fm")
        if (configs := read_configs(*model)) is not None:
            check_training(configs, self.options.resolution or self._trained_resolution(), images=int(is_depth))
            if is_depth:
                check_one_text_encoder(configs.text_encoders)
        check_teacher_files(self.teacher_options, *model)
        check_adapter(self.options, *model, images=int(is_depth), has_teacher=self.teacher_options.teacher is not None)
        refuse_used_folder(self.options.output_dir, self.options.resume_from_checkpoint)
        return configs

    def _trained_resolution(self) -> Resolution | None:
        """Return the resolution, for each folder, at which the model was trained; None where its files do not say."""
        size = trained_size(self.pretrained_model_name_or_path, ())
        return None if size is None else simplest(size * max(1, len(self.folders)))

    def _check_pipeline(self, folder: Path) -> None:
        """Refuse a run that writes a pipeline and would replace the result of another run."""
        if (self.options.adapter != "full" and self.task != "depth") or not folder.exists():
            return
        if self.options.resume_from_checkpoint is None:
            raise RefusedInputError(
                f"{printable(folder)} exists: continue its run with --resume_from_checkpoint latest and a larger"
                " max_train_steps, move it away, or choose another output_dir"
            )
        if not (folder / TAGS_FILE).is_file():
            raise RefusedInputError(
                f"{printable(folder)} is not the result of a run, and is not replaced: move it away, or choose another"
                " output_dir"
            )


def _say_how_to_sample(output: Path, base: str, trainer: "AlignedTrainer", result: "RunResult") -> None:
    """Print how to generate images with the result, and write the same into its model card."""
    from d2f_fast.lora.family import family_of
    from d2f_fast.training.model_card import CARD_FILE, write_model_card
    from d2f_fast.training.recipe import placeholders, recipe

    run, family = {**result, "images_per_step": trainer.global_batch_size}, family_of(trainer.unet)
    for way in recipe(output, trainer.tags, family, base=base):
        print(f"d2f: {way.line}", file=sys.stderr)
    print(f"d2f: {placeholders(trainer.tags, names_base=False)}", file=sys.stderr)
    if write_model_card(output, base, family, trainer.config, trainer.tags, run) is None:
        print(f"d2f: {output / CARD_FILE} is not a model card of d2f_fast, and is kept", file=sys.stderr)


def _own_options(command: Train) -> dict[str, object]:
    """Return the options of the command itself, without those of the training, the model and the teacher."""
    values = {each.name: getattr(command, each.name) for each in dataclasses.fields(command)}
    return {
        name: value
        for name, value in values.items()
        if not dataclasses.is_dataclass(value) and name not in ("dry_run", "json")
    }
