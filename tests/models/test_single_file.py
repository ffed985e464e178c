"""Single files of the three families: the weights of diffusers, what the file says of its model, and refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from d2f_fast.errors import ModelError
from d2f_fast.models.base_model import BaseModel
from d2f_fast.models.load import load_model, load_pipeline
from d2f_fast.models.options import ModelOptions
from d2f_fast.models.single_file import family_table, read_single_file

FAMILIES = ("sd1", "sd2", "sdxl")
EMPTY = torch.empty(0)


def add(*names: str) -> Callable[[dict[str, Tensor]], None]:
    """Return the change that adds empty tensors."""
    return lambda tensors: tensors.update(dict.fromkeys(names, EMPTY))


def remove(prefix: str) -> Callable[[dict[str, Tensor]], None]:
    """Return the change that removes all tensors whose key begins with `prefix`."""

    def change(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(prefix)]:
            del tensors[key]

    return change


@pytest.mark.parametrize(
    ("family", "dtype"), [*((family, torch.float32) for family in FAMILIES), ("sd1", torch.bfloat16)], ids=str
)
def test_single_file_gives_the_weights_that_it_was_made_from(
    narrow: Any, write_file: Any, tokenizer: str, family: str, dtype: torch.dtype
) -> None:
    pipeline, facts = load_model(write_file(family), dtype, ModelOptions(tokenizer_name_or_path=tokenizer))
    expected = narrow(family)
    assert type(pipeline) is type(expected)
    assert facts.family == {"sd1": "SD1.x", "sd2": "SD2.x", "sdxl": "SDXL"}[family]
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if (want := getattr(expected, name, None)) is not None:
            state = getattr(pipeline, name).state_dict()
            assert state.keys() == want.state_dict().keys()
            assert all(torch.equal(state[key], value.to(dtype)) for key, value in want.state_dict().items())
    assert not any(parameter.is_meta for parameter in pipeline.unet.parameters())
    assert pipeline.tokenizer("ab").input_ids == expected.tokenizer("ab").input_ids


def test_unet_of_a_single_file_keeps_its_half_precision_type_where_wanted(
    narrow: Any, write_file: Any, tokenizer: str
) -> None:
    def halve(tensors: dict[str, Tensor]) -> None:
        for key, value in tensors.items():
            if key.startswith("model.diffusion_model."):
                tensors[key] = value.half()

    options = ModelOptions(tokenizer_name_or_path=tokenizer)
    pipeline: Any = load_model(write_file("sdxl", halve), options=options, unet_as_stored=True).pipeline
    expected = narrow("sdxl").unet.state_dict()
    assert all(torch.equal(value, expected[key].half()) for key, value in pipeline.unet.state_dict().items())
    assert {value.dtype for value in pipeline.text_encoder.parameters()} == {torch.float32}


@pytest.mark.parametrize("family", FAMILIES)
def test_pipeline_of_a_single_file_generates_images(write_file: Any, tokenizer: str, family: str) -> None:
    pipeline: Any = load_pipeline(write_file(family), options=ModelOptions(tokenizer_name_or_path=tokenizer))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("ab", num_inference_steps=1, height=32, width=32, output_type="latent").images
    assert images.shape == (1, 4, 4, 4) and images.isfinite().all()


EPSILON, V = "epsilon", "v_prediction"
ASSUMED = "assumed for SD1.x, as the file has no marker"
# (keys that are added, entries of the header, options) -> (prediction type, its source, zero SNR, its source)
STATEMENTS: dict[str, tuple[tuple[str, ...], dict[str, str], tuple[str | None, bool | None], tuple[Any, ...]]] = {
    "ε by the family": ((), {}, (None, None), (EPSILON, ASSUMED, False, ASSUMED)),
    "ε by header": (
        (),
        {"modelspec.prediction_type": "epsilon"},
        (None, None),
        (EPSILON, "header modelspec.prediction_type", False, ASSUMED),
    ),
    "ε by option": (("v_pred",), {}, (EPSILON, None), (EPSILON, "option --prediction_type", False, ASSUMED)),
    "v by marker": (("v_pred",), {}, (None, None), (V, "marker v_pred", False, ASSUMED)),
    "v by header": (
        (),
        {"modelspec.prediction_type": "v"},
        (None, None),
        (V, "header modelspec.prediction_type", False, ASSUMED),
    ),
    "v by option": ((), {}, (V, None), (V, "option --prediction_type", False, ASSUMED)),
    "v with zero SNR by marker": (("v_pred", "ztsnr"), {}, (None, None), (V, "marker v_pred", True, "marker ztsnr")),
    "v with zero SNR by header": (
        (),
        {"modelspec.prediction_type": "v", "d2f.zero_snr": "true"},
        (None, None),
        (V, "header modelspec.prediction_type", True, "header d2f.zero_snr"),
    ),
    "v with zero SNR by option": (
        (),
        {},
        (V, True),
        (V, "option --prediction_type", True, "option --rescale_betas_zero_snr"),
    ),
    "marker before header": (
        ("v_pred", "ztsnr"),
        {"modelspec.prediction_type": "epsilon", "d2f.zero_snr": "false"},
        (None, None),
        (V, "marker v_pred", True, "marker ztsnr"),
    ),
    "option before marker": (
        ("v_pred", "ztsnr"),
        {},
        (None, False),
        (V, "marker v_pred", False, "option --no_rescale_betas_zero_snr"),
    ),
    "option before an unknown word": (
        (),
        {"modelspec.prediction_type": "score"},
        (EPSILON, None),
        (EPSILON, "option --prediction_type", False, ASSUMED),
    ),
}


@pytest.mark.parametrize("case", STATEMENTS)
def test_prediction_type_and_zero_snr_are_read_in_their_order(write_file: Any, tokenizer: str, case: str) -> None:
    keys, header, (prediction_type, zero_snr), expected = STATEMENTS[case]
    path = write_file("sd1", add(*keys), header)
    model = BaseModel.load(path, options=ModelOptions(prediction_type, zero_snr, tokenizer))  # type: ignore[arg-type]
    facts = model.facts
    found = facts.prediction_type, facts.prediction_source, facts.zero_snr, facts.zero_snr_source
    assert found == expected
    config = model.pipeline.scheduler.config
    assert (config.prediction_type, bool(config.get("rescale_betas_zero_snr"))) == (expected[0], expected[2])
    assert model.alignment.prediction_type == expected[0]
    assert model.alignment.schedule.zero_terminal_snr == expected[2]


def test_sd2_without_a_marker_is_taken_for_v_prediction_and_the_line_says_how_to_state_another(
    write_file: Any, tokenizer: str
) -> None:
    path = write_file("sd2")
    assert str(load_model(path, options=ModelOptions(tokenizer_name_or_path=tokenizer)).facts) == (
        "SD2.x, v-prediction (assumed for SD2.x, as the file has no marker; state --prediction_type epsilon for a"
        " relative of SD2-base), no zero terminal SNR (assumed for SD2.x, as the file has no marker)"
    )
    stated = load_model(path, options=ModelOptions("epsilon", tokenizer_name_or_path=tokenizer))
    assert stated.pipeline.scheduler.config.prediction_type == "epsilon"


def test_zero_snr_of_sd1_is_kept_in_a_scheduler_that_has_it(write_file: Any, tokenizer: str) -> None:
    path = write_file("sd1", add("v_pred", "ztsnr"))
    model = BaseModel.load(path, options=ModelOptions(tokenizer_name_or_path=tokenizer))
    assert model.alignment.schedule.zero_terminal_snr and model.facts.zero_snr


HALF = {f"foreign.{i}": EMPTY for i in range(2000)}
REFUSALS: dict[str, tuple[str, Any, dict[str, str], str]] = {
    "EDM": ("sdxl", add("edm_vpred.sigma_max"), {}, r"it predicts v in the EDM form \(edm_vpred\)"),
    "Playground": ("sdxl", add("edm_mean", "edm_std"), {}, "Playground 2.5"),
    "refiner": ("sdxl", add("conditioner.embedders.0.model.text_projection"), {}, "it is the refiner of SDXL"),
    "no autoencoder": ("sd1", remove("first_stage_model."), {}, "holds no autoencoder .* --pretrained_vae_model_name"),
    "no text encoder": ("sd1", remove("cond_stage_model."), {}, "holds no text encoder"),
    "no first text encoder": ("sdxl", remove("conditioner.embedders.0."), {}, r"holds no conditioner.embedders.0"),
    "no UNet": ("sd2", remove("model.diffusion_model."), {}, "is not in the original layout of Stable Diffusion"),
    "half of the keys foreign": (
        "sd1",
        lambda tensors: tensors.update(HALF),
        {},
        "is not in the original layout of Stable Diffusion: 2000 of its .* keys are unknown, such as foreign",
    ),
    "unknown word": (
        "sd1",
        None,
        {"modelspec.prediction_type": "score"},
        "modelspec.prediction_type in its header is score, which is not known: state --prediction_type",
    ),
    "text of another family": (
        "sd1",
        lambda tensors: tensors.update({key: torch.zeros(8, 12) for key in tensors if ".attn2.to_k.weight" in key}),
        {},
        "takes text of width 12, and that of SD1.x, whose text encoder the file holds, is 8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_unusable_single_file_is_refused_in_one_line(write_file: Any, tokenizer: str, case: str) -> None:
    family, change, header, sentence = REFUSALS[case]
    path = write_file(family, change, header)
    with pytest.raises(ModelError, match=sentence) as caught:
        load_pipeline(path, options=ModelOptions(tokenizer_name_or_path=tokenizer))
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_lora_file_is_not_taken_for_a_model(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"lora_unet_x.lora_down.weight": EMPTY}, tmp_path / "lora.safetensors")
    with pytest.raises(ModelError, match="is a LoRA file, and not a model"):
        read_single_file(tmp_path / "lora.safetensors")


# Published: 686 and 1680 tensors of the UNet, 248 of the autoencoder; 860, 866 and 2567 million parameters of the UNet.
PARAMETERS = {"sd1": 859_520_964, "sd2": 865_910_724, "sdxl": 2_567_463_684}
TEXT_PARAMETERS = {"sd1": (123_060_480,), "sd2": (340_387_840,), "sdxl": (123_060_480, 694_659_840)}
TENSORS = {"sd1": 686, "sd2": 686, "sdxl": 1680}


@pytest.mark.parametrize("family", FAMILIES)
def test_configuration_of_a_family_gives_the_published_number_of_parameters(family: Any) -> None:
    table = family_table(family)
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel.from_config(table["unet"]), AutoencoderKL.from_config(table["vae"])
        encoders = [CLIPTextModel(CLIPTextConfig(**table["text_encoder"]))]
        if family == "sdxl":
            encoders.append(CLIPTextModelWithProjection(CLIPTextConfig(**table["text_encoder_2"])))

    def count(module: Any) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    assert count(unet) == PARAMETERS[family] and len(unet.state_dict()) == TENSORS[family]
    assert count(vae) == 83_653_863 and len(vae.state_dict()) == 248
    assert tuple(count(encoder) for encoder in encoders) == TEXT_PARAMETERS[family]
    classes = {
        "StableDiffusionPipeline": StableDiffusionPipeline,
        "StableDiffusionXLPipeline": StableDiffusionXLPipeline,
    }
    parts = set(table) - {"model_index", "pad_tokens"} | set(table["pad_tokens"])
    index = table["model_index"]
    assert parts == {name for name, value in index.items() if isinstance(value, list) and value[0] is not None}
    assert parts <= set(classes[index["_class_name"]].__init__.__annotations__)
    json.dumps(table)
