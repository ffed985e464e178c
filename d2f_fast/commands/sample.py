"""`d2f sample`: generate images of prompts."""

import dataclasses
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from d2f_fast.commands.checks import check_lora_and_output, say_sampling
from d2f_fast.commands.sample_files import check_start, png_entries
from d2f_fast.config import (
    DEFAULT_STEPS,
    MAX_SAMPLING_STEPS,
    MAX_SHIFT,
    MAX_SIDE,
    SamplingMethod,
    Spacing,
    at_least,
    check_guidance,
    check_options,
    check_seed,
    option,
    positive,
)
from d2f_fast.errors import RefusedInputError, printable
from d2f_fast.files.lock import locked_folder
from d2f_fast.lora.source import parse_lora
from d2f_fast.models.library_messages import silence_libraries
from d2f_fast.models.names import MINIATURE
from d2f_fast.models.options import ModelOptions
from d2f_fast.models.tags import chosen_steps
from d2f_fast.sampling.image_options import ImageOptions
from d2f_fast.sampling.options import (
    ChosenGuidance,
    ChosenSteps,
    check_negative_prompt,
    check_steps,
    chosen_guidance,
    guidance_or_default,
    image_size,
)
from d2f_fast.sampling.solver_options import SolverOptions

if TYPE_CHECKING:
    from PIL.Image import Image

# These options are fixed in an exported folder, so that they cannot be given together with --onnx.
# What to do about a network that takes another number of images, without --image and with it.
_CURES = (
    "add --task depth for a model of depth, or --image for InstructPix2Pix, or give a text-to-image model",
    "leave --image out, or give InstructPix2Pix",
)
_FIXED_BY_EXPORT = ("model", "lora", "method", "flow_spacing", "shift", "intermediates", "invert", "noise")


@dataclass(frozen=True)
class Sample:
    """Generate images of prompts with a Stable Diffusion model.

    Required: --prompts. Without --model the miniature generates, a tiny model of 32-pixel emoji inside this package.
    Everything is computed in float32, on an NVIDIA GPU or else on the CPU, and all prompts together: give fewer at
    once if the memory does not suffice.

    The options for predicting depth are listed by `d2f sample --task depth --help`, and those for changing images by
    `d2f sample --task image_to_image --help`.

    Args:
        prompts: One or more prompts; one image is generated for each. A prompt that is given several times gives
            different images.
        model: Model that generates: a Hugging Face id, a diffusers pipeline folder, or one .safetensors file. Default:
            miniature, the tiny model.
        lora: LoRA that are merged into the model, each as PATH or PATH:SCALE, where 1 is the usual scale. PATH is the
            folder of a run or of its checkpoint-N, or a .safetensors file in the format of diffusers, peft, kohya or
            LyCORIS (DoRA, LoHa and LoKr included). Default: none.
        output_dir: Folder for the images, 000.png and so on, and metrics.json; it is created if needed. No image is
            replaced: the numbers go on from those in the folder. Each image says in its file how it was generated.
        num_inference_steps: Number of sampling steps. A model that was not trained for few steps, by reflow, looks
            better with more, such as 25. Each step evaluates the network once with "euler" and "euler_maruyama", twice
            with "midpoint", "heun" (but once in their last step) and "stochastic_heun", and four times with "rk4".
            "midpoint" and "heun" need 2 steps or more. "dopri5" chooses its own steps and uses this number only for
            --intermediates. With --onnx it must be one of the exported numbers. Default: the number saved with the LoRA
            (the highest of several) or else with the model, which is 2 after training on pairs, or else 4; 4 with
            --invert.
        guidance_scale: Strength of classifier-free guidance. Larger values follow the prompt more closely. 1 and 0 turn
            it off, which halves the time. Default: the lowest value saved with the model and LoRA, which is 1 after
            training on pairs, or else 3; 1 with --invert.
        seed: Seed of the noise. The same seed and options give the same images on one machine.
        task: What the model does. "text" generates images of prompts. For "depth" and "image_to_image" see `d2f sample
            --task depth --help` and `d2f sample --task image_to_image --help`.
        model_options: Options of the base model.
        onnx: Folder that export/to_onnx.py wrote, which ONNX Runtime runs in place of a model. What the export has
            settled is then an error: the model and its options, --lora, --method and its options, --flow_spacing,
            --shift, --intermediates, --invert and --noise. Default: none.
        onnx_provider: What runs the graphs of --onnx, which it needs. Default: "auto", which is CUDA if ONNX Runtime
            has it and there is an NVIDIA driver, and else the CPU.
        negative_prompt: Prompt to steer away from, the same for all images. It needs a guidance scale above 1. Default:
            none.
        method: Integration method. "euler" is best for few steps; "midpoint", "heun" and "rk4" are more exact for the
            same number of evaluations from about 10 on. "dopri5" chooses its steps by --rtol and --atol, and needs the
            package torchdiffeq. "euler_maruyama" and "stochastic_heun" add noise on the way and take it out again,
            which needs 50 steps and more.
        solver_options: Options of solvers and guidance.
        flow_spacing: Spacing of the steps. "uniform" takes even steps in flow time. "trailing" takes the times of
            diffusers' DDIM with trailing timesteps, to compare with it. Both start from pure noise.
        shift: Factor on the ratio of noise to image, (1 - t) / t, at each step. Values above 1 spend more steps on
            noisy images; 1 changes nothing. Default: --sampling_shift of the training, as saved with the LoRA or model;
            or that of the model's own flow-matching scheduler; or 1.
        height: Height of the images in pixels, a multiple of 8. Default: that of the training, as saved with the LoRA
            or model; or the model's own.
        width: Width of the images in pixels, a multiple of 8. Default: that of the training, as saved with the LoRA
            or model; or the model's own.
        image_options: Images that the network sees.
        intermediates: Also write each image as it is before the first and after each step, as 000_00.png and so on.
        invert: Image files, one for each prompt, to find the noise that they come from; the prompt describes the image.
            The noise is written as 000_noise.safetensors, and 000.png is generated from it again. It needs many exact
            steps, such as --method rk4 --num_inference_steps 50. Default: none.
        noise: Noise files of --invert to start from, one for each prompt. Default: random noise of the seed.
        dry_run: Check the options and the files, print all options as JSON, and stop. Nothing is downloaded, computed
            or written. An option that was left open is printed as null.
        json: Print the result (method, steps, number and paths of the images) as one line of JSON, in place of the path
            of the folder.

    Examples:
        d2f sample --prompts "an owl on a blue background"
        d2f sample --model MODEL --prompts "a red fox" --num_inference_steps 25 --guidance_scale 5
        d2f sample --model MODEL --lora run:0.8 --prompts "a red fox" "a lighthouse" --seed 1
        d2f sample --model timbrooks/instruct-pix2pix --prompts "make it snow" --image photo.jpg
    """

    prompts: tuple[str, ...] = field(metadata={"group": "essential"})
    model: str | None = option("essential", None, metavar="MODEL")
    lora: tuple[str, ...] = option("essential", (), metavar="PATH[:SCALE]")
    output_dir: str = option("essential", "d2f-samples", metavar="FOLDER")
    num_inference_steps: int | None = option("essential", None, at_least(1, MAX_SAMPLING_STEPS))
    guidance_scale: float | None = option("essential", None, check_guidance)
    seed: int = option("essential", 0, check_seed)
    task: Literal["text"] = option("essential", "text", metavar="{text,depth,image_to_image}")
    model_options: ModelOptions = field(default_factory=ModelOptions)
    onnx: str | None = option("ONNX", None, metavar="FOLDER")
    onnx_provider: Literal["auto", "cpu", "cuda", "tensorrt"] | None = option("ONNX", None)
    negative_prompt: str = option("image", "")
    method: SamplingMethod = option("sampling", "euler")
    solver_options: SolverOptions = field(default_factory=SolverOptions)
    flow_spacing: Spacing = option("sampling", "uniform")
    shift: float | None = option("sampling", None, positive(MAX_SHIFT))
    height: int | None = option("image", None, at_least(8, MAX_SIDE))
    width: int | None = option("image", None, at_least(8, MAX_SIDE))
    image_options: ImageOptions = field(default_factory=ImageOptions)
    intermediates: bool = option("image", False)
    invert: tuple[str, ...] | None = option("image", None, metavar="FILE")
    noise: tuple[str, ...] | None = option("image", None, metavar="FILE")
    dry_run: bool = option("other", False)
    json: bool = option("other", False)

    def check(self) -> None:
        """Refuse, before the slow imports and the sampling, what would be refused after them.

        Raises:
            RefusedInputError: An option, the model, the LoRA file or the output folder cannot be used.
        """
        from d2f_fast.models.configs import check_seen_images, downsampling_of, read_configs

        if not self.prompts or not all(self.prompts):
            raise RefusedInputError("prompts: give at least one prompt, none of them empty")
        check_options(self)
        guidance_scale = guidance_or_default(self.guidance_scale, self._own_guidance)
        guidance_scale = max(guidance_scale, self.image_options.image_guidance_scale)
        check_negative_prompt(self.negative_prompt, guidance_scale)
        self.solver_options.check(self.method, guidance_scale)
        self.image_options.check(len(self.prompts))
        check_start(self.invert, self.noise, len(self.prompts), self.method)
        if self.onnx is not None:
            self._check_onnx(self.onnx)
        elif self.onnx_provider is not None:
            raise RefusedInputError("onnx_provider needs --onnx: add --onnx FOLDER, or leave onnx_provider out")
        elif (configs := read_configs(self._model, self.model_options)) is not None:
            images = int(self.image_options.image is not None)
            check_seen_images(self._model, configs, _CURES[images], images)
            image_size(self.height, self.width, configs.unet.get("sample_size"), downsampling_of(configs.vae))
        model = None if self.onnx is not None else self._model
        check_lora_and_output(self.lora, self.output_dir, self.shift, model=model, options=self.model_options)
        if self.onnx is None:
            check_steps(self.method, self._steps_of(self._model).number)

    def run(self) -> dict[str, Any]:
        """Generate the images, write them, and return what was generated and where it was written.

        Raises:
            RefusedInputError: An option, the model, the LoRA file or the output folder cannot be used.
        """
        self.check()
        output = Path(self.output_dir)
        with locked_folder(output):  # Two commands would mix their images.
            return self._generate(output, earlier_rows(output))

    def _generate(self, output: Path, earlier: list[Any]) -> dict[str, Any]:
        """Generate the images, and write them into a folder that no other command uses."""
        started = time.monotonic()
        from d2f_fast.files.atomic import atomic_path
        from d2f_fast.files.run_record import write_run_record
        from d2f_fast.sampling.png_text import png_text

        first = _next_number(output)
        images, taken = self._with_diffusers(output, first) if self.onnx is None else self._with_onnx(self.onnx)
        files = [output / f"{first + i:03d}.png" for i in range(len(images))]
        row = self._row(taken, images[0])
        for position, (file, image, prompt) in enumerate(zip(files, images, self.prompts, strict=True)):
            text = png_text(prompt, self.negative_prompt, png_entries(row, position))
            with atomic_path(file) as temporary:
                image.save(temporary, pnginfo=text)
        seconds = time.monotonic() - started
        rows = [*earlier, row | {"files": [file.name for file in files]}]
        write_run_record(output, "d2f sample", self.seed, seconds, rows)
        return row | {"files": [str(file) for file in files], "output": str(output)}

    def _row(self, taken: Mapping[str, Any], image: "Image") -> dict[str, Any]:
        """Return how the images were generated, as metrics.json records it; `taken` is what the model's files say."""
        found = {
            "sampler": "flow",
            "method": self.method,
            "flow_spacing": self.flow_spacing,
            "steps": taken["steps"],
            **{name: taken.get(name) for name in ("shift", "prediction_type", "fm_form")},
            **self.solver_options.given(),
            "guidance_scale": guidance_or_default(self.guidance_scale, taken.get("guidance_scale")),
            **self.image_options.given(),
            "seed": self.seed,
            "height": image.height,
            "width": image.width,
            "model": self._model if self.onnx is None else None,
            "lora": list(self.lora),
            "onnx": self.onnx,
            "prompts": list(self.prompts),
            "negative_prompt": self.negative_prompt,
            "inverted": None if self.invert is None else list(self.invert),
            "round_trip_error": taken.get("round_trip_error"),
            "noise": None if self.noise is None else list(self.noise),
            "samples": len(self.prompts),
        }
        fixed = ("method", "flow_spacing", "lora") if self.onnx is not None else ()
        return {name: value for name, value in found.items() if value is not None and name not in fixed}

    @property
    def _model(self) -> str:
        """Return the name of the model, which is not used with `onnx`."""
        return MINIATURE if self.model is None else self.model

    def _steps_of(self, model: str) -> ChosenSteps:
        """Return the number of sampling steps of a model, which is not used with `onnx`."""
        given = self.num_inference_steps
        if given is None and self.invert is not None:  # The numbers that are saved are too few for an inversion.
            return ChosenSteps(DEFAULT_STEPS, "the default with --invert")
        return chosen_steps(given, model, [parse_lora(entry).path for entry in self.lora])

    @property
    def _own_guidance(self) -> float | None:
        """Return the guidance scale that comes before the saved one where none is given."""
        return 1.0 if self.invert is not None else None

    def _check_onnx(self, folder: str) -> None:
        """Refuse a folder that does not exist, and options that were settled when it was exported."""
        if not Path(folder).is_dir():
            raise RefusedInputError(f"onnx: {printable(folder)} is not a folder: give one of export/to_onnx.py")
        nested = self.model_options, self.solver_options
        given = {name: getattr(self, name) for name in _FIXED_BY_EXPORT}
        given |= {name: value for part in nested for name, value in dataclasses.asdict(part).items()}
        defaults = {part.name: part.default for options in (self, *nested) for part in dataclasses.fields(options)}
        for name, value in given.items():
            if value != defaults[name]:
                raise RefusedInputError(
                    f"{name} was settled when {printable(folder)} was exported: leave it out, or export again"
                )

    def _with_diffusers(self, output: Path, first: int) -> "tuple[list[Image], Mapping[str, Any]]":
        """Generate the images with diffusers, and return them and what the files of the weights said about sampling.

        Args:
            output: Folder that receives the states on the way, and the noise of inverted images.
            first: Number of the first image.
        """
        silence_libraries()
        import torch

        from d2f_fast.commands.load_model import load_with_lora
        from d2f_fast.commands.sample_files import read_images, read_noise, write_noise, write_states
        from d2f_fast.models.base_model import BaseModel
        from d2f_fast.models.image_context import encode_context
        from d2f_fast.models.solve import Sampling, generate_images, images_size, invert_images

        loaded = load_with_lora(self._model, self.lora, self.model_options, self.shift)
        print(f"d2f: Model {printable(self._model)}: {loaded.facts}", file=sys.stderr)
        steps, guidance = self._steps_of(loaded.source), chosen_guidance(self.guidance_scale, loaded.guidance_scale)
        if self.guidance_scale is None and self._own_guidance is not None:
            guidance = ChosenGuidance(self._own_guidance, "the default with --invert")
        say_sampling(steps, guidance, loaded.guidance_scale)
        model = BaseModel(loaded.pipeline, self.model_options, loaded.facts)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        sampling = Sampling(
            self.method,
            self.solver_options,
            steps.number,
            guidance.scale,
            self.negative_prompt,
            self.height,
            self.width,
            self.flow_spacing,
            loaded.scheduler_options,
            self.image_options.image_guidance_scale,
        )
        shift = float(loaded.flow_scheduler(self.flow_spacing).config["shift"])
        taken = {**loaded.scheduler_options, "shift": shift, "guidance_scale": guidance.scale, "steps": steps.number}
        context = None
        if self.image_options.image is not None:
            if type(loaded.pipeline).__name__.startswith("Marigold"):
                raise RefusedInputError(f"{self._model} predicts depth: add --task depth, and leave --prompts out")
            context = encode_context(model, read_images(self.image_options.image), *images_size(model, sampling))
        noise = None if self.noise is None else read_noise(self.noise)
        if self.invert is not None:
            noise, error = invert_images(model, read_images(self.invert), self.prompts, sampling, context)
            taken["round_trip_error"] = error
            print(f"d2f: latents generated again differ by {error:.2g} of their norm", file=sys.stderr)
            write_noise(output, first, noise)
        on_state = partial(write_states, output, first) if self.intermediates else None
        generator = torch.Generator().manual_seed(self.seed)
        return generate_images(model, self.prompts, sampling, generator, noise, on_state, context), taken

    def _with_onnx(self, folder: str) -> "tuple[list[Image], dict[str, Any]]":
        """Generate the images with ONNX Runtime, from an exported folder."""
        from d2f_fast.commands.sample_files import read_images
        from d2f_fast.export.inference import OnnxPipeline
        from d2f_fast.export.sessions import PROVIDERS

        providers = None if self.onnx_provider in ("auto", None) else PROVIDERS[self.onnx_provider]
        pipeline = OnnxPipeline(folder, providers=providers)
        given, guidance = self.num_inference_steps, pipeline.recommended_guidance
        steps = pipeline.default_steps if given is None else ChosenSteps(given, "as given")
        say_sampling(steps, chosen_guidance(self.guidance_scale, guidance))
        seen = self.image_options.image
        if seen is not None and not pipeline.sees_image:
            raise RefusedInputError(f"the network of {printable(folder)} sees no image: leave --image out")
        images = pipeline(
            self.prompts,
            steps=steps.number,
            guidance_scale=self.guidance_scale,
            negative_prompt=self.negative_prompt,
            height=self.height,
            width=self.width,
            seed=self.seed,
            image=None if seen is None else read_images(seen),
            image_guidance_scale=self.image_options.image_guidance_scale,
        )
        return images, {"shift": pipeline.report.get("shift"), "guidance_scale": guidance, "steps": steps.number}


def earlier_rows(output: Path) -> list[Any]:
    """Return the rows of the images that are in the output folder already.

    Args:
        output: Output folder of the command.

    Raises:
        RefusedInputError: The folder holds the record of another command, which would be lost.
    """
    from d2f_fast.files.json_file import read_json

    path = output / "metrics.json"
    if not path.exists():
        return []
    record = read_json(path)
    if not isinstance(record, dict) or record.get("command") != "d2f sample":
        raise RefusedInputError(f"{printable(path)} is the record of another command: choose another output_dir")
    rows = record.get("results")
    return rows if isinstance(rows, list) else []


def _next_number(output: Path) -> int:
    """Return the number after the largest one of an image in the output folder; 0 where there is none."""
    found = [re.fullmatch(r"(\d{3,9})\.png", path.name) for path in output.iterdir()]
    return max((int(match[1]) for match in found if match), default=-1) + 1
