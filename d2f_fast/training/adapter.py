"""Check the adapter of a run with the headers of its files, before torch is imported and the model is loaded."""

from d2f_fast.config import TrainingConfig
from d2f_fast.lora.fit import starting_layers
from d2f_fast.lora.header import read_lora_header
from d2f_fast.lora.source import parse_lora
from d2f_fast.lora.targets import StatedLayers, check_stated_layers, check_targets
from d2f_fast.models.layers import model_layers
from d2f_fast.models.options import ModelOptions
from d2f_fast.training.teacher_options import check_text_of_start


def stated_layers(config: TrainingConfig) -> StatedLayers:
    """Return the layers and ranks that the options of a run state.

    Args:
        config: options of the run.
    """
    return {
        "rank": config.rank,
        "conv_rank": config.conv_rank,
        "first_last_layers": config.first_last_layers,
        "target_modules": config.target_modules,
    }


def check_adapter(
    config: TrainingConfig, model: str, options: ModelOptions, *, images: int = 0, has_teacher: bool = False
) -> None:
    """Refuse a LoRA to start from that is not one of the model, or that the options contradict, and unknown layers.

    Args:
        config: options of the run.
        model: hub id, pipeline folder, or `.safetensors` file of the base model, whose files were checked.
        options: options of the base model.
        images: number of images whose latents the network sees beside its own.
        has_teacher: whether a teacher is learned from, which knows no other text encoders than the model's.

    Raises:
        ModelError: the LoRA or the names of layers do not fit the model, or the LoRA and the options do not agree.
        CheckpointError: the LoRA is missing, damaged, or a pickle.
    """
    if config.adapter == "full" or (config.init_lora is None and config.target_modules is None):
        return
    header = None if config.init_lora is None else read_lora_header(parse_lora(config.init_lora).path)
    if (layers := model_layers(model, options, images)) is None:
        return
    if header is None:
        check_targets(config.target_modules or (), layers.unet_layers())
        return
    names = starting_layers(header, layers)
    ranks = {
        known.removeprefix("unet."): header.layers[name].shape.rank
        for name, known in names.items()
        if known.startswith("unet.")
    }
    check_stated_layers(header.path, ranks, layers.unet_layers(), **stated_layers(config))
    if has_teacher:
        check_text_of_start(adapts_text=len(ranks) < len(header.layers))
