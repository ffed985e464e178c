"""Single files of the three families: the weights of diffusers, what the file says of its model, and refusals."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from d2f_fast.errors import ModelError
from d2f_fast.models.base_model import BaseModel
from d2f_fast.models.load import load_model, load_pipeline
from d2f_fast.models.options import ModelOptions

FAMILIES = ("sd1", "sd2", "sdxl")
EMPTY = torch.empty(0)


def add(*names: str) -> Callable[[dict[str, Tensor]], None]:
    """Return the change that adds empty tensors."""
    return lambda tensors: tensors.update(dict.fromkeys(names, EMPTY))


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


def test_unknown_prediction_type_of_a_header_is_refused(write_file: Any, tokenizer: str) -> None:
    path = write_file("sd1", None, {"modelspec.prediction_type": "score"})
    with pytest.raises(ModelError, match=r"modelspec\.prediction_type in its header is score, .* state --pred"):
        load_pipeline(path, options=ModelOptions(tokenizer_name_or_path=tokenizer))
