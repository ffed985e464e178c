"""Say how to generate images with the result of a run: in its model card, and in the lines that the run prints."""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCardData

from d2f_fast.config import DEFAULT_RANK, TrainingConfig
from d2f_fast.files.atomic import StrPath, atomic_path
from d2f_fast.lora.source import KOHYA_ENDING, LORA_FILE
from d2f_fast.lora.tags import CAPTIONS, SOURCE_NOISE, predicts_depth, starts_from_image, starts_from_zeros
from d2f_fast.training.summary import recommended_steps

CARD_FILE = "README.md"
# A card that has this line is replaced by the next run into the folder; any other README.md is somebody's own.
_MARK = "<!-- Written by d2f_fast. A later run into this folder replaces this file. -->"
_WORDS = {1: "one step", 2: "two steps", 4: "four steps"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def recipe(folder: StrPath, tags: Mapping[str, str], name: str | None = None) -> list[str]:
    """Return how to generate images with a result in few steps, one line for each program.

    Args:
        folder: Folder of the run, with LoRA files or a folder `pipeline`.
        tags: Entries of the result's header; see `tags_of`.
        name: How the lines call the folder; None for its path.
    """
    folder = Path(folder)
    name = str(folder) if name is None else name
    is_lora = not (folder / "pipeline").is_dir()
    sigmas, shift = tags["d2f.recommended_sigmas"], tags["d2f.shift"]
    steps, built_in = recommended_steps(tags), tags.get("d2f.recommended_guidance") == "1.0"
    guidance, cfg = (", guidance_scale=1", ", CFG scale 1") if built_in else ("", "")
    predicts_flow = tags["d2f.prediction_type"] == "flow_prediction"
    model = f"--model BASE --lora {shlex.quote(name)}" if is_lora else f"--model {shlex.quote(f'{name}/pipeline')}"
    if predicts_depth(tags):
        return _depth_recipe(name, model, steps, from_zeros=starts_from_zeros(tags))
    if starts_from_image(tags):
        prompts = " --prompts TEXT" if tags.get(CAPTIONS) == "true" else ""
        command = f"d2f sample --task image_to_image {model} --image IMAGE{prompts} --num_inference_steps {steps}"
        return [f"d2f_fast: `{command}`"]
    lines = [f"d2f_fast: `d2f sample {model} --prompts TEXT --num_inference_steps {steps}`"]
    if tags.get("d2f.fm_form") == "published":
        return lines  # No other program feeds the network the flow time itself.
    nodes = (
        f"ModelSamplingSD3 (shift {shift}) and KSampler (euler, simple)"
        if predicts_flow
        else f"ManualSigmas (`{sigmas}`) and SamplerCustom (euler)"
    ) + (", with cfg 1" if built_in else "")
    if not is_lora:
        taken = f"num_inference_steps={steps}" if predicts_flow else f"sigmas=[{sigmas}]"
        lines.append(f'diffusers: `DiffusionPipeline.from_pretrained("{name}/pipeline")(TEXT, {taken}{guidance})`')
        if predicts_flow:
            even = ", ".join(f"{1 - step / steps:.6g}" for step in range(steps))
            lines.append(
                "diffusers, exactly (its own scheduler starts at 0.999 and rounds timesteps, which changes latents by"
                f" about 1 %): `pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift={shift})`,"
                " `pipe.scheduler.init_noise_sigma = 1.0`,"
                " `pipe.scheduler.scale_model_input = lambda sample, t: sample`, then"
                f" `pipe(TEXT, sigmas=[{even}]{guidance})`"
            )
        single_file = shlex.quote(f"{folder.resolve().name}.safetensors")
        lines.append(
            f"ComfyUI: `d2f convert {shlex.quote(f'{name}/pipeline')} {single_file}`, that file in"
            f" models/checkpoints; the nodes CheckpointLoaderSimple, {nodes}"
        )
        if not predicts_flow:
            lines.append(f"A1111, Forge: the same file in models/Stable-diffusion; sampler Euler{cfg}")
    elif (folder / LORA_FILE).is_file():
        shifted = "" if shift == "1.0" else f", shift={shift}"
        if predicts_flow:  # A single file of the base model does not say so.
            shifted = f', prediction_type="flow_prediction", shift={shift}'
        lines.append(
            f'diffusers: `pipe.load_lora_weights("{name}", weight_name="{LORA_FILE}")`, then'
            f" `pipe.scheduler = Diff2FlowScheduler.from_config(pipe.scheduler.config{shifted})`"
            + (f" and `pipe(TEXT, num_inference_steps={steps}{guidance})`" if built_in else "")
        )
    for file in folder.glob(f"*{KOHYA_ENDING}") if is_lora else ():
        lines.append(f"ComfyUI: `{file.name}` in models/loras; the nodes LoraLoaderModelOnly, {nodes}")
        if not predicts_flow:
            lines.append(
                f"A1111, Forge: `{file.name}` in models/Lora; `<lora:{file.stem}:1>` in the prompt, sampler Euler{cfg}"
            )
    return lines


def _placeholders(tags: Mapping[str, str], is_lora: bool) -> str:
    """Return what the words in capitals of the recipe stand for."""
    if predicts_depth(tags):
        return "IMAGE is the file of an image; in diffusers, the image itself."
    if starts_from_image(tags):
        named = ["BASE is the base model"] if is_lora else []
        named.append("IMAGE is the file of the image to start from")
        named += ["TEXT is the caption of the result"] if tags.get(CAPTIONS) == "true" else []
        return " ".join(f"{sentence}." for sentence in named)
    return "BASE is the base model, and TEXT the caption." if is_lora else "TEXT is the caption."


def _depth_recipe(name: str, model: str, steps: int, *, from_zeros: bool) -> list[str]:
    """Return how to predict depth with a result: in this package, and in diffusers."""
    loaded = f'MarigoldDepthPipeline.from_pretrained("{name}/pipeline")'
    latents, where = "", ""
    if from_zeros:  # The pipeline starts from noise unless it is given the start.
        latents = ", latents=torch.zeros(1, 4, h, w)"
        where = ", where h and w are the sides of the processed image, divided by 8 and rounded up"
    return [
        f"d2f_fast: `d2f sample --task depth {model} --image IMAGE --num_inference_steps {steps}`",
        f"diffusers: `{loaded}(IMAGE, num_inference_steps={steps}{latents}).prediction`{where}",
    ]


def write_model_card(
    folder: StrPath, base_model: str, config: TrainingConfig, tags: Mapping[str, str], result: Mapping[str, object]
) -> Path | None:
    """Write the model card `README.md` into the folder of a run, in the form of the Hugging Face Hub.

    Args:
        folder: Folder of the run, which exists.
        base_model: Model that the run started from. It is named in the card where it is a hub id, not where it is a
            path of this machine.
        config: Options of the run.
        tags: Entries of the result's header; see `tags_of`.
        result: Number of "steps" of the run, and of "images_per_step", over all processes and passes, and where they
            were measured the "validation_losses".

    Returns:
        The file, or None where the folder holds a README.md that no run wrote, which is kept.

    Raises:
        RefusedInputError: The disk is full.
    """
    path = Path(folder) / CARD_FILE
    if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return None
    text = "\n".join(_card(Path(folder), base_model, config, tags, result)) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _card(
    folder: Path, base_model: str, config: TrainingConfig, tags: Mapping[str, str], result: Mapping[str, object]
) -> Sequence[str]:
    """Return the lines of the card."""
    is_lora, steps = config.adapter == "lora", recommended_steps(tags)
    published = base_model if _HUB_ID.fullmatch(base_model) and not Path(base_model).exists() else None
    data = ModelCardData(
        base_model=published,
        library_name="diffusers",
        pipeline_tag=_pipeline_tag(tags),
        tags=["diff2flow", "flow-matching", "stable-diffusion", *(["lora"] if is_lora else [])],
    )
    kind = "full finetuning"
    if is_lora:
        rank = config.rank or (DEFAULT_RANK if config.init_lora is None else None)
        kind = "LoRA that went on from another one" if rank is None else f"LoRA of rank {rank}"
    settings = {
        "base model": published or "a local model",
        "objective": tags["d2f.objective"],
        "prediction type": tags["d2f.prediction_type"],
        "trained": kind,
        "steps": result["steps"],
        "images per step": result["images_per_step"],
        "resolution": f"{tags['d2f.resolution']} px",
        "learning rate": config.learning_rate,
        **({"trained on pairs with guidance": tags["d2f.pairs_guidance"]} if "d2f.pairs_guidance" in tags else {}),
        **({"LPIPS in the loss": f"{config.lpips_weight:g} ({config.lpips_net})"} if config.lpips_weight else {}),
        **({"share of noise at the start": tags[SOURCE_NOISE]} if starts_from_image(tags) else {}),
        **({"start": "zeros in place of noise, one step"} if starts_from_zeros(tags) else {}),
        **_validation_row(result.get("validation_losses")),
        "shift in training": tags["d2f.training_shift"],
        "shift for sampling": tags["d2f.shift"],
        "seed": config.seed,
    }
    return [
        "---",
        data.to_yaml(),
        "---",
        _MARK,
        "",
        f"# {folder.resolve().name}",
        "",
        f"A {kind}, trained with the flow-matching loss of [Diff2Flow](https://arxiv.org/abs/2506.02221) by `d2f_fast`."
        if tags["d2f.objective"] == "diff2flow"
        else f"A {kind}, trained by `d2f_fast` on the objective `{tags['d2f.objective']}`.",
        "",
        f"## {_purpose(tags)} in {_WORDS.get(steps, f'{steps} steps')}",
        "",
        *(f"- {line}" for line in recipe(folder, tags, folder.resolve().name)),
        "",
        _placeholders(tags, is_lora),
        "",
        "## Training",
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in settings.items()),
    ]


def _pipeline_tag(tags: Mapping[str, str]) -> str:
    """Return the task of the Hugging Face Hub that a result belongs to."""
    if predicts_depth(tags):
        return "depth-estimation"
    return "image-to-image" if starts_from_image(tags) else "text-to-image"


def _purpose(tags: Mapping[str, str]) -> str:
    """Return what a result does, as the start of a heading."""
    if predicts_depth(tags):
        return "Predict depth"
    return "Change images" if starts_from_image(tags) else "Generate images"


def _validation_row(losses: object) -> dict[str, str]:
    """Return the row of the card that holds the loss on held-out samples; empty where none was measured."""
    if not isinstance(losses, list):
        return {}
    by_time = ", ".join(f"{loss:.4g}" for loss in losses)
    mean = sum(losses) / len(losses)
    return {"loss on held-out samples": f"{mean:.4g}; in {len(losses)} parts of time from noise to image {by_time}"}
