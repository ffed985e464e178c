"""`d2f`: the commands. Options come from the dataclasses below, spelled with underscores or dashes.

Exit codes: 0 done, 2 refused input, 143 saved after SIGTERM or SIGINT.
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from d2f_fast.config import (
    Method,
    PredictionType,
    Spacing,
    TrainingConfig,
    check_number,
    check_positive,
    check_seed,
)
from d2f_fast.errors import RefusedInputError

MINIATURE = "miniature"


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
        from d2f_fast.data.order import CaptionedImages, steps_per_epoch
        from d2f_fast.files.run_record import write_metrics
        from d2f_fast.training.trainer import AlignedTrainer

        started, output = time.monotonic(), Path(self.options.output_dir)
        if self.options.adapter == "full" and (output / "pipeline").exists():  # before the training, not after it
            raise RefusedInputError(f"{output / 'pipeline'} exists: move it away, or choose another output_dir")
        dataset = CaptionedImages(self.train_data_dir, self.image_column, self.caption_column, self.caption_extension)
        trainer = AlignedTrainer.from_pretrained(_model(self.pretrained_model_name_or_path), self.options)
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
        write_metrics(output, "d2f train", self.options.seed, time.monotonic() - started, [row])
        return row | {"output": str(saved)}


@dataclass(frozen=True)
class Sample:
    """Draw pictures of prompts along flow time, in any Stable Diffusion pipeline.

    Args:
        prompts: one picture each.
        model: hub id, pipeline folder, .safetensors file, or "miniature", the embedded model.
        lora: folder or file of LoRA weights.
        onnx: folder of export/to_onnx.py to draw with, by ONNX Runtime, in place of model and lora.
        onnx_provider: auto, cpu, cuda or tensorrt, for onnx; auto is cuda where there is one.
        num_inference_steps: network evaluations a picture; twice as many with midpoint and heun.
        guidance_scale: 1 is no guidance.
        negative_prompt: led away from.
        prediction_type: flow_prediction for a network trained on naive flow matching; None for what the file says.
        method: euler, midpoint or heun.
        flow_spacing: uniform in flow time, or trailing.
        shift: factor on the sampling sigmas; None for that of the training, or 1.
        height: pixels; None for the model's own.
        width: pixels; None for the model's own.
        seed: of the noise.
        output_dir: of the pictures.
        dry_run: print the resolved options and stop.
        json: print the result as JSON.
    """

    prompts: tuple[str, ...]
    model: str = MINIATURE
    lora: str | None = None
    onnx: str | None = None
    onnx_provider: Literal["auto", "cpu", "cuda", "tensorrt"] = "auto"
    num_inference_steps: int = 4
    guidance_scale: float = 3.0
    negative_prompt: str = ""
    prediction_type: PredictionType | None = None
    method: Method = "euler"
    flow_spacing: Spacing = "uniform"
    shift: float | None = None
    height: int | None = None
    width: int | None = None
    seed: int = 0
    output_dir: str = "d2f-samples"
    dry_run: bool = False
    json: bool = False

    def run(self) -> dict[str, Any]:
        """Draw, write the pictures, and return where they are."""
        from d2f_fast.training.checkpoint import atomic_path, make_folder
        from d2f_fast.files.run_record import write_metrics

        if not self.prompts or not all(self.prompts):
            raise RefusedInputError("prompts: give at least one prompt, none of them empty")
        for name, least in (("num_inference_steps", 1), ("height", 8), ("width", 8)):
            check_number(name, getattr(self, name), least)
        check_seed(self.seed)
        check_positive("shift", self.shift)
        if not math.isfinite(self.guidance_scale):
            raise RefusedInputError(f"guidance_scale must be finite, got {self.guidance_scale}")
        output = Path(self.output_dir)
        if output.exists():
            make_folder(output)  # or refuse it, before the pictures are drawn
        started = time.monotonic()
        pictures = self._draw() if self.onnx is None else self._draw_with_onnx(self.onnx)
        make_folder(output)
        files = [str(output / f"{i:03d}.png") for i in range(len(pictures))]
        for file, picture in zip(files, pictures, strict=True):
            with atomic_path(file) as temporary:
                picture.save(temporary)
        seconds = time.monotonic() - started
        row = {"sampler": "flow", "method": self.method, "steps": self.num_inference_steps, "samples": len(files)}
        write_metrics(output, "d2f sample", self.seed, seconds, [row])
        return row | {"files": files, "output": str(output)}

    def _draw(self) -> list[Any]:
        """Pictures by diffusers."""
        silence_libraries()
        import torch

        from d2f_fast.models.base_model import load_pipeline
        from d2f_fast.lora.read import fuse_adapter
        from d2f_fast.sampling.scheduler import Diff2FlowScheduler

        model = _model(self.model)
        pipe = load_pipeline(model) if isinstance(model, str) else model
        sizes = {"height": self.height, "width": self.width}
        for name, size in sizes.items():
            if size is not None and size % pipe.vae_scale_factor:
                raise RefusedInputError(f"{name} must be a multiple of {pipe.vae_scale_factor}, got {size}")
        if any(sizes.values()):  # given one of them, diffusers would take neither
            own = pipe.unet.config.sample_size
            own_sizes = zip(sizes, own if isinstance(own, list | tuple) else (own, own), strict=True)
            sizes = {name: sizes[name] or side * pipe.vae_scale_factor for name, side in own_sizes}
        if self.lora is not None:
            fuse_adapter(pipe, Path(self.lora), 1.0)
        options: dict[str, Any] = {"method": self.method, "flow_spacing": self.flow_spacing, **self._of_training()}
        try:
            pipe.scheduler = Diff2FlowScheduler.from_config(pipe.scheduler.config, **options)
            pipe.scheduler.set_timesteps(self.num_inference_steps)
        except ValueError as error:
            raise RefusedInputError(str(error)) from error
        pipe.to("cuda" if torch.cuda.is_available() else "cpu")
        return pipe(
            list(self.prompts),
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            # None: SDXL's own empty prompt is zeros, and not the encoded "".
            negative_prompt=[self.negative_prompt] * len(self.prompts) if self.negative_prompt else None,
            **sizes,
            generator=torch.Generator().manual_seed(self.seed),
        ).images

    def _of_training(self) -> dict[str, Any]:
        """Prediction type and shift: those given, else those that the LoRA file or the pipeline's folder tells."""
        from d2f_fast.training.checkpoint import read_json
        from d2f_fast.lora.inject import lora_tags

        source = Path(self.model) / "d2f.json" if self.lora is None else Path(self.lora)
        tags = lora_tags(source) if self.lora is not None else read_json(source) if source.is_file() else {}
        chosen: dict[str, Any] = {"prediction_type": self.prediction_type, "shift": self.shift}
        try:
            if self.shift is None:
                chosen["shift"] = float(tags.get("d2f.shift", 1))
            # Any other type is that of the base, which has it in its own configuration.
            if self.prediction_type is None and tags.get("d2f.prediction_type") == "flow_prediction":
                chosen["prediction_type"] = "flow_prediction"
        except (AttributeError, TypeError, ValueError) as error:
            raise RefusedInputError(f"{source} tells no usable shift ({error}): give --shift") from error
        return {name: value for name, value in chosen.items() if value is not None}

    def _draw_with_onnx(self, folder: str) -> list[Any]:
        """Pictures by ONNX Runtime."""
        from d2f_fast.export.inference import PROVIDERS, OnnxPipeline

        defaults = {option.name: option.default for option in dataclasses.fields(self)}
        for name in ("model", "lora", "prediction_type", "method", "flow_spacing", "shift"):
            if getattr(self, name) != defaults[name]:
                raise RefusedInputError(f"{name} was settled when {folder} was exported: leave it out, or export again")
        providers = None if self.onnx_provider == "auto" else PROVIDERS[self.onnx_provider]
        return OnnxPipeline(folder, providers=providers)(
            self.prompts,
            steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            negative_prompt=self.negative_prompt,
            height=self.height,
            width=self.width,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Demo:
    """Finetune the miniature four ways, sample each by every route, and write report.html.

    Args:
        output_dir: of the report; overwritten.
        seed: of training and sampling.
        dry_run: print the resolved options and stop.
        json: print the result as JSON.
    """

    output_dir: str = "demo"
    seed: int = 0
    dry_run: bool = False
    json: bool = False

    def run(self) -> dict[str, Any]:
        """Run it all, and return where the report is."""
        check_seed(self.seed)
        silence_libraries()
        from d2f_fast.demo.run import run_demo

        return {"output": str(run_demo(self.output_dir, self.seed))}


def silence_libraries() -> None:
    """Turn off the advice and the loading bars of diffusers and transformers: a command has its own.

    Before their pipelines are imported, which is when some of the advice is given.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()


def _model(name: str) -> Any:
    """The embedded miniature by its name, loaded; any other name as it is."""
    if name != MINIATURE:
        return name
    from d2f_fast.miniature import load_miniature

    return load_miniature()


COMMANDS: dict[str, Any] = {"demo": Demo, "train": Train, "sample": Sample}


def with_config_file(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Take `--config FILE` out of the arguments, and read the options in it.

    Raises:
        RefusedInputError: the file is missing, too large, or not a YAML mapping.
    """
    import yaml

    rest, options = list(arguments), {}
    for i, argument in enumerate(arguments):
        if argument == "--config" or argument.startswith("--config="):
            inline = argument.partition("=")[2]
            if not inline and i + 1 >= len(arguments):
                raise RefusedInputError("--config: give the path of a YAML file")
            path = Path(inline or arguments[i + 1])
            del rest[i : i + (1 if inline else 2)]
            try:
                options = yaml.safe_load(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, yaml.YAMLError) as error:
                raise RefusedInputError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
            if not isinstance(options, dict):
                raise RefusedInputError(f"{path} must hold `option: value` lines")
            break
    return rest, options


def parse(arguments: Sequence[str]) -> Any:
    """Command dataclass of an argument list: the file's options first, then those typed.

    Raises:
        RefusedInputError: an option of the configuration file is unknown, or has a wrong type.
        SystemExit: misuse (2), or help (0).
    """
    rest, from_file = with_config_file(arguments)
    typed: list[str] = []
    command = COMMANDS.get(rest[0]) if rest else None
    if from_file and command is not None:
        # Made into arguments, so that they go through the same checks as typed ones, which replace them.
        options = [*dataclasses.fields(command), *(dataclasses.fields(TrainingConfig) if command is Train else ())]
        known = {option.name: option.type for option in options}
        for name, value in from_file.items():
            if name not in known:
                raise RefusedInputError(f"--config: {name} is no option of d2f {rest[0]}: see d2f {rest[0]} --help")
            if any(argument.partition("=")[0].replace("-", "_") == f"__{name}" for argument in rest):
                continue
            if isinstance(value, bool) and known[name] is bool:
                typed.append(f"--{name}" if value else f"--no_{name}")
            elif isinstance(value, bool):  # YAML's yes and no, meant as words
                typed += [f"--{name}", "yes" if value else "no"]
            elif isinstance(value, list):
                typed += [f"--{name}", *map(str, value)]
            else:
                typed += [f"--{name}", str(value)]
        rest = [rest[0], *typed, *rest[1:]]
    return tyro.extras.subcommand_cli_from_dict(
        COMMANDS, prog="d2f", description=__doc__, args=rest, use_underscores=True, sort_subcommands=False
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    try:
        command = parse(sys.argv[1:] if arguments is None else arguments)
        if command.dry_run:
            print(json.dumps(dataclasses.asdict(command), indent=2))
            return 0
        result = command.run()
    except RefusedInputError as error:
        print(f"d2f: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, ValueError) as error:
        # Only those classes of ours that carry an exit code; anything else is a defect and keeps its traceback.
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        print(f"d2f: {error}", file=sys.stderr)
        return int(code)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"d2f: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    print(json.dumps(result) if command.json else result["output"])
    return 0
