"""`d2f pairs`: generate pairs of noise and latents, on which `d2f train --pairs` straightens a model's path."""

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from d2f_fast.commands.checks import check_lora_and_output
from d2f_fast.config import (
    MAX_BATCH,
    MAX_GUIDANCE,
    MAX_SHIFT,
    MAX_SIDE,
    MAX_STEPS,
    Spacing,
    at_least,
    check_guidance,
    check_options,
    check_seed,
    option,
    positive,
)
from d2f_fast.errors import DatasetError, RefusedInputError, printable
from d2f_fast.lora.source import check_lora_file, lora_identity, parse_lora
from d2f_fast.models.library_messages import silence_libraries
from d2f_fast.models.names import MINIATURE
from d2f_fast.models.options import ModelOptions
from d2f_fast.models.tags import lowest_guidance, options_of_training
from d2f_fast.sampling.options import (
    ChosenGuidance,
    check_negative_prompt,
    chosen_guidance,
    complete_size,
    guidance_or_default,
    image_size,
)
from d2f_fast.tasks.pair_record import check_record, prompt_entries
from d2f_fast.tasks.processes import Process, device_of, owned_folder

if TYPE_CHECKING:
    from d2f_fast.commands.load_model import SampledModel
    from d2f_fast.sampling.scheduler import Diff2FlowScheduler
    from d2f_fast.tasks.pairs import PairPlan


@dataclass(frozen=True)
class Pairs:
    """Generate pairs of noise and latents with a model, for `d2f train --pairs`.

    Training on pairs that the model has made itself (reflow) straightens its way from noise to image, for sampling in
    one to four steps (docs/reflow.md).

    Required: --prompts_file, --train_data_dir, or both. Without --model the miniature generates, a tiny model of
    32-pixel emoji inside this package. It runs on an NVIDIA GPU, or else on the CPU; `accelerate launch -m d2f_fast
    pairs ...` uses several GPUs.

    Args:
        prompts_file: UTF-8 text file with one prompt on each line. Empty lines are skipped. Default: none.
        train_data_dir: Folder of captioned images, as for `d2f train`. Their captions are the prompts, after those of
            --prompts_file; the images are not used. Default: none.
        model: Model that generates: a Hugging Face id, a diffusers pipeline folder, or one .safetensors file.
            "miniature" is the tiny model.
        lora: LoRA that are merged into the model, each as PATH or PATH:SCALE, as for `d2f sample`. Default: none.
        num_pairs: Number of pairs. The prompts are taken in turn, each time with other noise. Default: one pair of each
            prompt.
        guidance_scale: Strength of classifier-free guidance, which the trained model then has built in. 1 and 0 turn it
            off. Default: the one saved with the LoRA or model (1 where guidance is built in), or 3.
        batch_size: Number of pairs that each process generates at once.
        mixed_precision: Precision of the network. "fp16" and "bf16" are faster on a GPU; "no" is float32.
        output_dir: Folder for the pairs (numbered tar files, called shards), pairs.json and grid.png, a picture of the
            first 16 pairs. The same command completes a folder that is unfinished; a folder with shards of other
            options or of another model is an error.
        seed: Seed of all noise. The same seed and options give the same pairs on one kind of machine, with any number
            of processes.
        image_column: Image of a line of metadata.jsonl in --train_data_dir, as for `d2f train`. Default: "image".
        caption_column: Key of the captions in metadata.jsonl in --train_data_dir, as for `d2f train`. Default: "text".
        caption_extension: Ending of the names of caption files in --train_data_dir, as for `d2f train`. Default:
            ".txt".
        model_options: Options of the base model.
        solver: Method that follows the path from noise to image. "dpmsolver++" and "euler" evaluate the network once in
            each step, "midpoint" and "heun" twice. "euler" is the least exact.
        num_inference_steps: Number of steps of each path. Guidance doubles the evaluations of each step.
        guidance_scale_max: Upper end of a range from --guidance_scale on, of which each pair gets a random strength.
            Default: all pairs have --guidance_scale.
        negative_prompt: Prompt to steer away from, the same for all pairs. It needs a guidance scale above 1. Default:
            none.
        flow_spacing: Spacing of the steps of every solver, as for `d2f sample`.
        shift: Factor on the ratio of noise to image at each step, as for `d2f sample`. Default: the one saved with the
            LoRA or model, or that of the model's own flow-matching scheduler, or 1, which changes nothing.
        height: Height of the images in pixels, a multiple of 8. Default: that of the training, as saved with the LoRA
            or model; or the model's own.
        width: Width of the images in pixels, a multiple of 8. Default: that of the training, as saved with the LoRA
            or model; or the model's own.
        save_images: Also store each image as a JPEG file, to look at. The training does not use it.
        dtype: Type of the stored numbers. "float16" takes half the space. The noise is rounded to it before the path is
            followed, so that the stored noise is the noise that was used.
        pairs_per_shard: Number of pairs in each tar file. A run that is stopped loses those of its unfinished file.
        dry_run: Check the options and the files, print all options as JSON, and stop. Nothing is downloaded, computed
            or written. An option that was left open is printed as null.
        json: Print the result (pairs, shards, evaluations of the network, images per second, seconds, path) as one line
            of JSON, in place of the path of the folder.

    Examples:
        d2f pairs --model MODEL --prompts_file prompts.txt --num_pairs 20000 --mixed_precision fp16
        d2f pairs --model MODEL --train_data_dir photos --guidance_scale 4 --output_dir pairs
    """

    prompts_file: str | None = option("essential", None, metavar="FILE")
    train_data_dir: str | None = option("essential", None, metavar="FOLDER")
    model: str = option("essential", MINIATURE, metavar="MODEL")
    lora: tuple[str, ...] = option("essential", (), metavar="PATH[:SCALE]")
    num_pairs: int | None = option("essential", None, at_least(1, MAX_STEPS))
    guidance_scale: float | None = option("essential", None, check_guidance)
    batch_size: int = option("essential", 8, at_least(1, MAX_BATCH))
    mixed_precision: Literal["no", "fp16", "bf16"] = option("essential", "no")
    output_dir: str = option("essential", "d2f-pairs", metavar="FOLDER")
    seed: int = option("essential", 0, check_seed)
    image_column: str | None = option("data", None, metavar="NAME")
    caption_column: str | None = option("data", None, metavar="KEY")
    caption_extension: str | None = option("data", None)
    model_options: ModelOptions = field(default_factory=ModelOptions)
    solver: Literal["dpmsolver++", "euler", "midpoint", "heun"] = option("sampling", "dpmsolver++")
    num_inference_steps: int = option("sampling", 25, at_least(1, 10_000))
    guidance_scale_max: float | None = option("sampling", None, at_least(1, MAX_GUIDANCE))
    negative_prompt: str = option("sampling", "")
    flow_spacing: Spacing = option("sampling", "uniform")
    shift: float | None = option("sampling", None, positive(MAX_SHIFT))
    height: int | None = option("image", None, at_least(8, MAX_SIDE))
    width: int | None = option("image", None, at_least(8, MAX_SIDE))
    save_images: bool = option("image", False)
    dtype: Literal["float16", "float32"] = option("image", "float16")
    pairs_per_shard: int = option("image", 512, at_least(1, MAX_BATCH))
    dry_run: bool = option("other", False)
    json: bool = option("other", False)

    def check(self) -> None:
        """Refuse, before the slow imports and the sampling, what would be refused after them.

        Raises:
            RefusedInputError: An option, the prompts, the model, a LoRA or the output folder cannot be used.
        """
        self._checked_prompts()

    def run(self) -> dict[str, Any]:
        """Make the pairs that the folder lacks, and return what was made and where it was written.

        Raises:
            RefusedInputError: An option, the prompts, the model, a LoRA or the output folder cannot be used.
        """
        prompts, output = self._checked_prompts(), Path(self.output_dir)
        process = Process.from_environment()
        with owned_folder(output, process):  # Before the slow imports, so that a refusal comes at once.
            silence_libraries()
            return self._make(prompts, output, process)

    def _make(self, prompts: list[str], output: Path, process: Process) -> dict[str, Any]:
        """Make the pairs in a folder that no other run uses."""
        started = time.monotonic()
        from d2f_fast.commands.load_model import load_with_lora
        from d2f_fast.models.base_model import BaseModel
        from d2f_fast.tasks.pair_folder import PairFolder
        from d2f_fast.tasks.pair_record import pair_record, settle_record
        from d2f_fast.tasks.pairs import PairGenerator, evaluations

        loaded = load_with_lora(self.model, self.lora, self.model_options, self.shift)
        model = BaseModel(loaded.pipeline, self.model_options, loaded.facts)
        plan, scheduler = self._plan(prompts, model, loaded)
        origin: dict[str, object] = {
            "model": loaded.fingerprints["unet"],
            "vae": loaded.fingerprints["vae"],
            "text_encoders": loaded.fingerprints["text_encoders"],
            "lora": [lora_identity(each["sha256"], each["scale"]) for each in loaded.lora],
        }
        settle_record(output, pair_record(plan, origin, scheduler.config), process)
        folder = PairFolder(output, plan, process, origin)
        device = device_of(int(os.environ.get("LOCAL_RANK", 0)))
        generator = PairGenerator(model.to(device), scheduler.flow.to(device), plan, origin)
        space = folder.check_disk(generator.shape)
        if process.is_main:
            finished = plan.num_shards - len(folder.missing)
            already = f", {finished} of them finished before" if finished else ""
            by = f", by {process.count} processes" if process.count > 1 else ""
            used = f"the first {plan.num_pairs} of " if plan.num_pairs < len(prompts) else ""
            of_prompts = f"{plan.num_pairs} pairs of {used}{len(prompts)} prompts"
            shards = f"{plan.num_shards} shard{'s' if plan.num_shards > 1 else ''}"
            for line in (
                f"Model {printable(self.model)}: {loaded.facts}",
                _method_line(self, chosen_guidance(self.guidance_scale, loaded.guidance_scale)),
                f"{of_prompts} in {shards}{already}{by}; {space}",
            ):
                print(f"d2f: {line}", file=sys.stderr)
        before = time.monotonic()
        made = folder.fill(generator.shard)
        rate = made / max(time.monotonic() - before, 1e-9)
        grid = folder.write_grid(generator)
        if process.is_main:
            seen = f"; look at {grid}" if grid is not None else ""
            print(f"d2f: {made} pairs made here, {rate:.3g} images a second{seen}", file=sys.stderr)
        each = evaluations(plan.solver, self.num_inference_steps, plan.guidance_scale_max > 1)
        return {
            "pairs": plan.num_pairs,
            "pairs_made": made,
            "shards": plan.num_shards,
            "evaluations": made * each,
            "images_per_second": round(rate, 4),
            "seconds": round(time.monotonic() - started, 3),
            "output": str(output),
        }

    def _plan(self, prompts: list[str], model: Any, loaded: "SampledModel") -> "tuple[PairPlan, Diff2FlowScheduler]":
        """Return what is made, and the scheduler with the flow along which it is made."""
        from d2f_fast.tasks.pairs import PairPlan

        scheduler = loaded.flow_scheduler(self.flow_spacing)
        try:
            shift = float(scheduler.config["shift"])
            times = scheduler.flow.times(self.num_inference_steps, self.flow_spacing, shift)
        except ValueError as error:
            raise RefusedInputError(str(error)) from error
        height, width = self._size(model.unet.config.sample_size, model.downsampling)
        lowest, highest = self._guidance(loaded.guidance_scale)
        plan = PairPlan(
            prompts=prompts,
            num_pairs=self.num_pairs or len(prompts),
            pairs_per_shard=self.pairs_per_shard,
            batch_size=self.batch_size,
            seed=self.seed,
            times=times,
            solver=self.solver,
            guidance_scale=lowest,
            guidance_scale_max=highest,
            negative_prompt=self.negative_prompt,
            height=height,
            width=width,
            dtype=self.dtype,
            precision=self.mixed_precision,
            save_images=self.save_images,
        )
        return plan, scheduler

    def _guidance(self, saved: float | None) -> tuple[float, float]:
        """Return the lowest and the highest guidance scale of the pairs.

        Args:
            saved: Guidance scale that is saved with the LoRA or model; None for none.

        Raises:
            RefusedInputError: The range is empty, or a negative prompt would have no effect.
        """
        lowest = guidance_or_default(self.guidance_scale, saved)
        highest = lowest if self.guidance_scale_max is None else self.guidance_scale_max
        if self.guidance_scale_max is not None and not 1 <= lowest < highest:
            raise RefusedInputError(
                f"guidance_scale_max must be above guidance_scale, and that at least 1, got {highest:g} and {lowest:g}"
            )
        check_negative_prompt(self.negative_prompt, highest)
        return lowest, highest

    def _prompts(self) -> Iterator[str]:
        """Yield the prompts of the file, and then the captions of the data set.

        Raises:
            DatasetError: A prompt is too long or not UTF-8, a file holds none, or the data set cannot be used.
        """
        from d2f_fast.data.captions import read_prompts
        from d2f_fast.data.image_folder import CaptionedImages, NoCaptionsError

        if self.prompts_file is not None:
            yield from read_prompts(Path(self.prompts_file))
        if self.train_data_dir is not None:
            columns = self.image_column, self.caption_column, self.caption_extension
            try:
                images = CaptionedImages(self.train_data_dir, *columns)
            except NoCaptionsError as error:
                raise DatasetError(f"{error}; or give the prompts as --prompts_file alone") from error
            for index in range(len(images)):
                yield from images.captions(index).alternatives

    def _size(self, sample_size: object, downsampling: int) -> tuple[int, int]:
        """Return the height and the width of the images in pixels, those given or else the model's own."""
        given = image_size(self.height, self.width, sample_size, downsampling)
        return complete_size(*given, sample_size, downsampling)

    def _checked_prompts(self) -> list[str]:
        """Return the prompts, once everything that can be refused without torch has been checked."""
        from d2f_fast.models.configs import check_seen_images, downsampling_of, local_name, read_configs

        if self.prompts_file is None and self.train_data_dir is None:
            raise RefusedInputError("give --prompts_file, --train_data_dir, or both: pairs need prompts")
        check_options(self)
        if self.prompts_file is not None and not Path(self.prompts_file).is_file():
            raise RefusedInputError(f"prompts_file: {printable(self.prompts_file)} is not a file: give a text file")
        if self.train_data_dir is not None and not Path(self.train_data_dir).is_dir():
            raise RefusedInputError(
                f"train_data_dir: {printable(self.train_data_dir)} is not a folder: give the folder of the captioned"
                " images"
            )
        for name in ("image_column", "caption_column", "caption_extension"):
            if self.train_data_dir is None and getattr(self, name) is not None:
                raise RefusedInputError(f"{name} needs --train_data_dir: leave {name} out")
        if (configs := read_configs(self.model, self.model_options)) is not None:
            check_seen_images(self.model, configs, "give a text-to-image model")
            self._size(configs.unet.get("sample_size"), downsampling_of(configs.vae))
        check_lora_and_output(self.lora, self.output_dir, self.shift, model=self.model, options=self.model_options)
        source = local_name(self.model, self.model_options)
        # What is saved with a hub id that is not on this machine is known once it is loaded.
        saved = lowest_guidance(source or self.model, [parse_lora(entry).path for entry in self.lora])
        guidance = self._guidance(saved)
        prompts = list(self._prompts())
        if (output := Path(self.output_dir)).is_dir():
            check_record(output, self._known_entries(prompts, source, guidance))
        return prompts

    def _known_entries(
        self, prompts: list[str], source: str | None, guidance: tuple[float, float]
    ) -> dict[str, object]:
        """Return the entries of pairs.json that are known before the model is loaded, by their names there."""
        from d2f_fast.files.hashes import file_sha256

        same = (
            *("pairs_per_shard", "seed", "num_inference_steps", "solver", "flow_spacing"),
            *("negative_prompt", "dtype", "mixed_precision", "batch_size", "save_images"),
        )
        scales: dict[str, float] = {}
        if source is not None or self.guidance_scale is not None:
            scales = dict(zip(("guidance_scale", "guidance_scale_max"), guidance, strict=True))
        of_training: dict[str, Any] = {}
        if source is not None or self.lora:  # A hub id says it once it is loaded.
            found = options_of_training(source or self.model, self.lora, self.model_options, self.shift)
            # What no option and no tag says is that of the model's own scheduler, which is compared once it is loaded.
            of_training = {name: found[name] for name in ("prediction_type", "fm_form", "shift") if name in found}
        sizes = {"height": self.height, "width": self.width}  # A size that is not given is that of the model.
        sources = [parse_lora(entry) for entry in self.lora]
        return {
            "num_pairs": self.num_pairs or len(prompts),
            **prompt_entries(prompts),
            **{name: getattr(self, name) for name in same},
            **scales,
            **of_training,
            **{name: side for name, side in sizes.items() if side is not None},
            "lora": [lora_identity(file_sha256(check_lora_file(path)), scale) for path, scale in sources],
        }


def _method_line(command: Pairs, guidance: ChosenGuidance) -> str:
    """Return in one line how pairs are made, with the guidance scale that was chosen."""
    scale = f"{guidance.scale:g}" + (f" to {command.guidance_scale_max:g}" if command.guidance_scale_max else "")
    merged = f"; LoRA {', '.join(map(printable, command.lora))}" if command.lora else ""
    return f"guidance_scale {scale}, {guidance.source}; {command.num_inference_steps} steps of {command.solver}{merged}"
