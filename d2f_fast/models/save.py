"""Write a pipeline folder that older versions of transformers, and programs with readers of their own, load too."""

from pathlib import Path
from typing import TYPE_CHECKING

from diffusers import DPMSolverMultistepScheduler

from d2f_fast.files.tensor_file import read_tensors, write_tensors

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from transformers import PreTrainedTokenizerFast

_TEXT_PREFIX = "text_model."
_OUTSIDE_THE_PREFIX = ("text_projection.",)  # It lies beside the text model, and has the same name in every version.


def save_pipeline_folder(pipeline: "DiffusionPipeline", folder: Path) -> None:
    """Write a diffusers pipeline, with the tokenizer files and the text encoder keys that every reader knows.

    Args:
        pipeline: Pipeline to write.
        folder: Folder, which exists.

    Raises:
        CheckpointError: A weight of a text encoder is not finite.
        RefusedInputError: The disk is full.
    """
    pipeline.save_pretrained(folder)
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = getattr(pipeline, name, None)
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder / name)
    for name in ("text_encoder", "text_encoder_2"):
        for path in (folder / name).glob("*.safetensors"):
            _prefix_keys(path)


def stock_flow_scheduler(num_train_timesteps: int, shift: float) -> DPMSolverMultistepScheduler:
    """Return the stock scheduler that samples a network of `flow_prediction` in the pipelines of Stable Diffusion.

    With order 1 it is Euler in flow time. diffusers' own FlowMatchEulerDiscreteScheduler has no `init_noise_sigma` and
    no `scale_model_input`, which these pipelines ask for.

    Args:
        num_train_timesteps: Number T of T * (1 - t), the timestep that the network is fed.
        shift: Factor on (1 - t) / t at each step.
    """
    return DPMSolverMultistepScheduler(
        num_train_timesteps,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
        solver_order=1,
        steps_offset=1,  # It has no effect, but the pipelines ask for it.
        final_sigmas_type="zero",
    )


def save_tokenizer(tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
    """Write the files of a tokenizer, for transformers 5 and for the versions before it.

    Args:
        tokenizer: Tokenizer of CLIP.
        folder: Folder, made when missing.
    """
    tokenizer.save_pretrained(folder)
    # transformers before 5 reads CLIP's tokenizer from the two files written here, vocab.json and merges.txt.
    tokenizer.backend_tokenizer.model.save(str(folder))


def _prefix_keys(path: Path) -> None:
    """Begin the keys of a text encoder's file with "text_model.", which transformers 5 leaves out.

    transformers before 5, ComfyUI and kohya's scripts find no weight without it, and use random ones.
    """
    tensors, header = read_tensors(path)
    keep = (_TEXT_PREFIX, *_OUTSIDE_THE_PREFIX)
    if not all(key.startswith(keep) for key in tensors):
        prefixed = {key if key.startswith(keep) else f"{_TEXT_PREFIX}{key}": tensors[key] for key in tensors}
        write_tensors(path, prefixed, header)
