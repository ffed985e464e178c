"""Say how to generate images with the result of a run: in this package, in diffusers, in ComfyUI, A1111 and Forge."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from d2f_fast.files.atomic import StrPath
from d2f_fast.image_sizes import first_size, side_multiple
from d2f_fast.lora.family import Family
from d2f_fast.lora.source import KOHYA_ENDING, LORA_FILE
from d2f_fast.lora.tags import (
    CAPTIONS,
    DISTILLED,
    SOURCE_NOISE,
    predicts_depth,
    starts_from_image,
    starts_from_zeros,
)
from d2f_fast.models.names import MINIATURE, is_single_file
from d2f_fast.training.summary import recommended_guidance, recommended_steps

# The noise of `d2f sample`, whose default seed is 0.
_SAME_NOISE = "generator=torch.manual_seed(0)"
_FLOW_SCHEDULER = "d2f_fast", "Diff2FlowScheduler"


class Way(NamedTuple):
    """One way to use a result.

    Attributes:
        words: Program, and what to do in it unless there are statements.
        statements: Statements of Python that do it; empty for another program.
    """

    words: str
    statements: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """Return the way in one line, in which the statements can be copied together."""
        return f"{self.words}: `{'; '.join(self.statements)}`" if self.statements else self.words

    @property
    def markdown(self) -> list[str]:
        """Return the way as the lines of an item of a list in Markdown, with the statements in a block of code."""
        if not self.statements:
            return [f"- {self.words}"]
        block = ["```python", *self.statements, "```"]
        return [f"- {self.words}:", "", *(f"  {line}" for line in block), ""]


class Result(NamedTuple):
    """The result of a run, and how the lines about it call its parts.

    Attributes:
        folder: Folder of the run, with LoRA files or a folder `pipeline`.
        tags: Entries of the result's header; see `tags_of`.
        family: Family of the model; None for one that only diffusers loads.
        name: Name of the folder in the lines.
        base: Name of the base model in the lines: a hub id, a path, or "miniature"; None for the placeholder BASE.
    """

    folder: Path
    tags: Mapping[str, str]
    family: Family | None
    name: str
    base: str | None

    @property
    def is_lora(self) -> bool:
        """Return whether the result is a LoRA, which is used with the base model."""
        return not (self.folder / "pipeline").is_dir()

    @property
    def steps(self) -> int:
        """Return the number of sampling steps."""
        return recommended_steps(self.tags)

    @property
    def guidance(self) -> str:
        """Return the guidance scale as text."""
        return f"{recommended_guidance(self.tags):g}"

    @property
    def predicts_flow(self) -> bool:
        """Return whether the network predicts the velocity of the flow."""
        return self.tags["d2f.prediction_type"] == "flow_prediction"

    @property
    def options(self) -> str:
        """Return the options of `d2f sample` that name the model."""
        if self.is_lora:
            base = "BASE" if self.base is None else shlex.quote(self.base)
            return f"--model {base} --lora {shlex.quote(self.name)}"
        return f"--model {shlex.quote(f'{self.name}/pipeline')}"

    @property
    def source(self) -> tuple[str, str]:
        """Return the module and the name of what loads the pipeline of diffusers."""
        if self.is_lora and self.base == MINIATURE:
            return "d2f_fast", "load_miniature"
        if self.is_lora and self.base is not None and is_single_file(self.base):
            return "diffusers", "StableDiffusionXLPipeline" if self.family == "sdxl" else "StableDiffusionPipeline"
        return "diffusers", "DiffusionPipeline"

    @property
    def loading(self) -> list[str]:
        """Return the statements that load the result into a pipeline `pipe`, with what `source` names."""
        _, loader = self.source
        if not self.is_lora:
            return [f"pipe = {loader}.from_pretrained({json.dumps(f'{self.name}/pipeline')})"]
        if self.base == MINIATURE:
            pipe = f"{loader}()"
        elif self.base is None:
            pipe = f"{loader}.from_pretrained(BASE)"
        else:
            method = "from_single_file" if is_single_file(self.base) else "from_pretrained"
            pipe = f"{loader}.{method}({json.dumps(self.base)})"
        return [f"pipe = {pipe}", f'pipe.load_lora_weights({json.dumps(self.name)}, weight_name="{LORA_FILE}")']

    @property
    def flow_scheduler(self) -> str:
        """Return the statement that gives the pipeline the scheduler of this package."""
        options = ["pipe.scheduler.config"]
        if self.predicts_flow:  # The base model of a LoRA does not say so.
            options.append('prediction_type="flow_prediction"')
        if self.tags.get("d2f.fm_form") == "published":
            options.append('fm_form="published"')
        if self.predicts_flow or self.tags["d2f.shift"] != "1.0":
            options.append(f"shift={self.tags['d2f.shift']}")
        return f"pipe.scheduler = Diff2FlowScheduler.from_config({', '.join(options)})"

    def call(self, steps: str, *more: str) -> str:
        """Return the statement that generates an image of TEXT, at the size at which `d2f sample` does.

        Args:
            steps: Argument that gives the steps.
            more: Further arguments.
        """
        arguments = ["TEXT", steps, f"guidance_scale={self.guidance}"]
        height, width = first_size(self.tags["d2f.resolution"])
        # A saved pipeline has the size of its training, if that is a square; a base model has its own size.
        if (self.is_lora or height != width) and not (height % side_multiple(1) or width % side_multiple(1)):
            arguments += [f"height={height}", f"width={width}"]
        return f"image = pipe({', '.join([*arguments, *more])}).images[0]"


def recipe(
    folder: StrPath, tags: Mapping[str, str], family: Family | None, name: str | None = None, base: str | None = None
) -> list[Way]:
    """Return how to generate images with a result in few steps, in each program that can.

    Args:
        folder: Folder of the run, with LoRA files or a folder `pipeline`.
        tags: Entries of the result's header; see `tags_of`.
        family: Family of the model; None for one that only diffusers loads.
        name: Name of the folder in the lines; None for its path.
        base: Name of the base model in the lines: a hub id, a path, or "miniature"; None for the placeholder BASE.
    """
    result = Result(Path(folder), tags, family, str(folder) if name is None else name, base)
    if predicts_depth(tags):
        return _depth_ways(result)
    if starts_from_image(tags):
        return _image_to_image_ways(result)
    sampling = f"--num_inference_steps {result.steps} --guidance_scale {result.guidance}"
    ways = [Way(f"d2f_fast: `d2f sample {result.options} --prompts TEXT {sampling}`")]
    if tags.get("d2f.fm_form") == "published":
        return ways  # No other program feeds the network the flow time itself.
    if not result.is_lora or (result.folder / LORA_FILE).is_file():
        ways += _diffusers_ways(result)
    if family is None:
        return [*ways, Way("ComfyUI, A1111 and Forge load SD1.x, SD2.x and SDXL only, and not this model")]
    return ways + _other_programs(result)


def placeholders(tags: Mapping[str, str], *, names_base: bool) -> str:
    """Return what the words in capitals of the recipe stand for.

    Args:
        tags: Entries of the result's header; see `tags_of`.
        names_base: Whether the lines have the placeholder BASE.
    """
    words = ["BASE is the base model, in quotes"] if names_base else []
    if predicts_depth(tags):
        return "IMAGE is the file of an image; in Python, the RGB image itself."
    if starts_from_image(tags):
        words.append(
            "IMAGE is the file of the image to start from; in Python, the RGB image itself, with sides that are"
            " multiples of 8"
        )
        words += ["TEXT is the caption of the result, in quotes"] if tags.get(CAPTIONS) == "true" else []
    else:
        words.append("TEXT is the caption, in quotes")
    return " ".join(f"{sentence}." for sentence in words)


def _imports(*names: tuple[str, str]) -> list[str]:
    """Return the statements that import names, each given with its module: one statement for each module."""
    by_module: dict[str, list[str]] = {}
    for module, name in sorted(names):
        by_module.setdefault(module, []).append(name)
    return [f"from {module} import {', '.join(found)}" for module, found in by_module.items()]


def _diffusers_ways(result: Result) -> list[Way]:
    """Return how to generate images in diffusers."""
    steps, counted = result.steps, f"num_inference_steps={result.steps}"
    ways = []
    if result.is_lora:
        statements = ["import torch", *_imports(_FLOW_SCHEDULER, result.source), *result.loading]
        statements += [result.flow_scheduler, result.call(counted, _SAME_NOISE)]
        ways.append(Way("diffusers, the image of `d2f sample`, with the scheduler of d2f_fast", tuple(statements)))
    elif result.predicts_flow:
        ways.append(Way("diffusers", (*_imports(result.source), *result.loading, result.call(counted))))
    if result.predicts_flow:
        even = ", ".join(f"{1 - step / steps:.6g}" for step in range(steps))
        statements = [
            "import torch",
            *_imports(("diffusers", "FlowMatchEulerDiscreteScheduler"), result.source),
            *result.loading,
            f"pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift={result.tags['d2f.shift']})",
            "pipe.scheduler.init_noise_sigma = 1.0",
            "pipe.scheduler.scale_model_input = lambda sample, t: sample",
            result.call(f"sigmas=[{even}]", _SAME_NOISE),
        ]
        words = "diffusers, the image of `d2f sample`, with a scheduler of diffusers"
        if not result.is_lora:
            words += " (the saved one starts at 0.999 and rounds timesteps, which changes latents by about 1 %)"
        return [*ways, Way(words, tuple(statements))]
    stock = [*_imports(result.source), *result.loading]
    if result.is_lora:  # A saved pipeline has this scheduler.
        scheduler = 'EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")'
        stock = [*_imports(("diffusers", "EulerDiscreteScheduler"), result.source), *result.loading]
        stock.append(f"pipe.scheduler = {scheduler}")
    call = result.call(f"sigmas=[{result.tags['d2f.recommended_sigmas']}]")
    words = "diffusers, with a scheduler of diffusers" if result.is_lora else "diffusers"
    return [*ways, Way(words, (*stock, call))]


def _other_programs(result: Result) -> list[Way]:
    """Return how to generate images in ComfyUI, A1111 and Forge."""
    steps, guidance, shift = result.steps, result.guidance, result.tags["d2f.shift"]
    nodes = (
        f"ModelSamplingSD3 (shift {shift}) and KSampler ({steps} steps, cfg {guidance}, euler, simple)"
        if result.predicts_flow
        else f"ManualSigmas (`{result.tags['d2f.recommended_sigmas']}`) and SamplerCustom (euler, cfg {guidance})"
    )
    # These two programs have no field for a list of sigmas. One step is all that a distilled model was trained for.
    has_webui = not result.predicts_flow and result.tags.get(DISTILLED) != "true"
    webui = f"A1111, Forge (in 20 steps or more, not in {steps}, because they take no list of sigmas)"
    sampler = f"sampler Euler, 20 steps, CFG scale {guidance}"
    ways = []
    if not result.is_lora:
        folder, file = shlex.quote(f"{result.name}/pipeline"), f"{result.folder.resolve().name}.safetensors"
        ways.append(
            Way(
                f"ComfyUI: `d2f convert {folder} {shlex.quote(file)}`, that file in models/checkpoints; the nodes"
                f" CheckpointLoaderSimple, {nodes}"
            )
        )
        if has_webui:
            ways.append(Way(f"{webui}: the same file in models/Stable-diffusion; {sampler}"))
    for lora in result.folder.glob(f"*{KOHYA_ENDING}") if result.is_lora else ():
        ways.append(Way(f"ComfyUI: `{lora.name}` in models/loras; the nodes LoraLoaderModelOnly, {nodes}"))
        if has_webui:
            ways.append(Way(f"{webui}: `{lora.name}` in models/Lora; `<lora:{lora.stem}:1>` in the prompt, {sampler}"))
    return ways


def _image_to_image_ways(result: Result) -> list[Way]:
    """Return how to change images: in this package, and in diffusers."""
    tags, has_captions = result.tags, result.tags.get(CAPTIONS) == "true"
    sampling = f"--num_inference_steps {result.steps} --guidance_scale {result.guidance}"
    prompts = " --prompts TEXT" if has_captions else ""
    command = f"d2f sample --task image_to_image {result.options} --image IMAGE{prompts} {sampling}"
    ways = [Way(f"d2f_fast: `{command}`")]
    if result.is_lora and not (result.folder / LORA_FILE).is_file():
        return ways
    noise = float(tags[SOURCE_NOISE])
    statements = ["import torch"] if noise else []
    statements += [*_imports(_FLOW_SCHEDULER, result.source), *result.loading, result.flow_scheduler]
    statements += [
        "pixels = pipe.image_processor.preprocess(IMAGE)",
        "latents = pipe.vae.encode(pixels).latent_dist.mean.detach() * pipe.vae.config.scaling_factor",
    ]
    if noise:
        sampled = "torch.randn(latents.shape, generator=torch.manual_seed(0))"
        statements.append(f"latents = {1 - noise:g} * latents + {noise:g} * {sampled}")
    sides = "latents=latents, height=IMAGE.height, width=IMAGE.width"
    sampling = f"num_inference_steps={result.steps}, guidance_scale={result.guidance}"
    prompt = "TEXT" if has_captions else '""'
    statements.append(f"image = pipe({prompt}, {sides}, {sampling}).images[0]")
    words = "diffusers, the image of `d2f sample`, with the scheduler of d2f_fast"
    return [*ways, Way(words, tuple(statements))]


def _depth_ways(result: Result) -> list[Way]:
    """Return how to predict depth: in this package, and in diffusers."""
    command = f"d2f sample --task depth {result.options} --image IMAGE --num_inference_steps {result.steps}"
    loaded = f"MarigoldDepthPipeline.from_pretrained({json.dumps(f'{result.name}/pipeline')})"
    statements, start = ["import torch", "from diffusers import MarigoldDepthPipeline", f"pipe = {loaded}"], _SAME_NOISE
    if starts_from_zeros(result.tags):  # The pipeline starts from noise unless it is given the start.
        statements += [
            "pixels = pipe.image_processor.preprocess(IMAGE, pipe.default_processing_resolution)[0]",
            "sides = (side // pipe.vae_scale_factor for side in pixels.shape[-2:])",
            "latents = torch.zeros(1, pipe.vae.config.latent_channels, *sides)",
        ]
        start = "latents=latents"
        if result.predicts_flow and result.tags.get("d2f.fm_form") != "published":
            # The saved scheduler starts just after the time that was trained.
            statements.append("from diffusers import FlowMatchEulerDiscreteScheduler")
            statements.append("pipe.scheduler = FlowMatchEulerDiscreteScheduler()")
    statements.append(f"depth = pipe(IMAGE, num_inference_steps={result.steps}, {start}).prediction")
    return [Way(f"d2f_fast: `{command}`"), Way("diffusers, the depth of `d2f sample`", tuple(statements))]
