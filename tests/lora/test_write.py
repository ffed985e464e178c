"""LoRA files as they are shared: every stock pipeline loads the adapter that was trained."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from d2f_fast.errors import CheckpointError, ModelError
from d2f_fast.files import atomic
from d2f_fast.files.tensor_file import read_tensors
from d2f_fast.lora import reload, write
from d2f_fast.lora.inject import inject_lora, lora_layers
from d2f_fast.lora.layer_weights import LoraLayerWeights
from d2f_fast.lora.merge import fuse_adapter
from d2f_fast.lora.read import read_lora
from d2f_fast.lora.source import LORA_FILE
from d2f_fast.lora.start import inject_start, read_start
from d2f_fast.lora.write import save_lora

TEXT = "encoder.layers.0.self_attn.q_proj"
# diffusers recognises the text encoder's keys of a kohya file by its out_proj alone, and gives all one alpha.
TEXT_SHAPES = {"self_attn.q_proj": (16, 16), "self_attn.out_proj": (16, 16), "mlp.fc1": (32, 16)}
TEXT_LAYERS = {
    f"text_encoder.encoder.layers.0.{name}": LoraLayerWeights(torch.randn(2, columns), torch.randn(rows, 2), 2.0)
    for name, (rows, columns) in TEXT_SHAPES.items()
}


def stock_pipeline(tiny_folder: Path) -> Any:
    return StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)


@pytest.mark.parametrize(
    ("options", "exact"),
    [
        ({"rank": 4}, True),
        ({"rank": 2, "conv_rank": 3, "first_last_layers": True}, True),
        ({"rank": 4, "alpha": 3.0}, False),
        ({"rank": 2, "alpha": 0.7, "conv_rank": 5, "first_last_layers": True}, False),
    ],
    ids=["uniform", "mixed ranks", "alpha", "alpha and mixed ranks"],
)
@pytest.mark.parametrize("with_metadata", [True, False])
def test_stock_pipeline_loads_the_same_adapter(
    tiny_folder: Path,
    tmp_path: Path,
    unet: Any,
    options: dict[str, Any],
    exact: bool,
    with_metadata: bool,
    forward: Any,
    randomize: Any,
    relative: Any,
) -> None:
    base = forward(unet)
    inject_lora(unet, **options)
    randomize(unet)
    path = save_lora(unet, tmp_path, {"d2f.objective": "diff2flow"})
    expected = forward(unet)
    assert relative(expected - base, base) > 0.01
    if not with_metadata:
        save_file(load_file(path), path)
    pipeline = stock_pipeline(tiny_folder)
    pipeline.load_lora_weights(tmp_path)
    got = forward(pipeline.unet)
    assert relative(got - expected, expected) <= 1e-6
    if exact:
        assert torch.equal(got, expected)


def test_file_of_another_rank_is_hot_swapped_in_a_stock_pipeline(
    tiny_folder: Path, tmp_path: Path, forward: Any, randomize: Any, relative: Any
) -> None:
    outputs = []
    for rank in (4, 8):  # 4 is the rank of the last layer, too
        unet = stock_pipeline(tiny_folder).unet
        inject_lora(unet, rank, conv_rank=8, first_last_layers=True)
        randomize(unet)
        save_lora(unet, tmp_path / str(rank))
        outputs.append(forward(unet))
    pipeline = stock_pipeline(tiny_folder)
    pipeline.enable_lora_hotswap(target_rank=36)
    for rank, expected in zip((4, 8), outputs, strict=True):
        pipeline.load_lora_weights(tmp_path / str(rank), adapter_name="style", hotswap=rank == 8)
        assert relative(forward(pipeline.unet) - expected, expected) <= 1e-6
    assert relative(outputs[1] - outputs[0], outputs[0]) > 0.01


def test_file_has_peft_keys_folded_scale_and_header(tmp_path: Path, unet: Any, randomize: Any) -> None:
    inject_lora(unet, 2, alpha=3.0, conv_rank=5, first_last_layers=True)
    randomize(unet)
    tensors, header = read_tensors(save_lora(unet, tmp_path, {"d2f.objective": "fm"}))
    layers: dict[str, Any] = lora_layers(unet)
    assert set(tensors) == {f"unet.{name}.lora_{kind}.weight" for name in layers for kind in "AB"}
    for name, layer in layers.items():
        a, b = tensors[f"unet.{name}.lora_A.weight"], tensors[f"unet.{name}.lora_B.weight"]
        assert torch.equal(a, layer.lora_A["default"].weight)
        torch.testing.assert_close(b, layer.lora_B["default"].weight * (3.0 / 2), rtol=1e-6, atol=0)
    metadata = json.loads(header["lora_adapter_metadata"])
    assert header["format"] == "pt" and header["d2f.objective"] == "fm"
    assert metadata["unet.r"] == metadata["unet.lora_alpha"] == 2
    assert metadata["unet.rank_pattern"] == metadata["unet.alpha_pattern"]
    assert metadata["unet.rank_pattern"]["conv_in"] == 36 and metadata["unet.rank_pattern"]["conv_out"] == 4


def test_saving_leaves_the_network_unchanged(tmp_path: Path, unet: Any, forward: Any, randomize: Any) -> None:
    trainable = inject_lora(unet, 2, conv_rank=2)
    randomize(unet)
    expected, keys = forward(unet), list(unet.state_dict())
    unet.train()
    save_lora(unet, tmp_path)
    assert unet.training and list(unet.state_dict()) == keys
    assert {name for name, parameter in unet.named_parameters() if parameter.requires_grad} == set(trainable)
    assert torch.equal(forward(unet), expected)
    assert (tmp_path / LORA_FILE).stat().st_mode & 0o044


def test_adapter_of_a_half_precision_base_is_saved_in_float32(tmp_path: Path, unet: Any, randomize: Any) -> None:
    unet.to(torch.bfloat16)
    inject_lora(unet, 2, alpha=3.0)
    randomize(unet)
    tensors, _ = read_tensors(save_lora(unet, tmp_path))
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


@pytest.mark.parametrize(
    ("factor", "difference"), [(1 / 1.5, r"\d\.\de-0[12]"), (1.001, r"\d\.\de-0[45]")], ids=["scale", "rounding"]
)
def test_file_that_reloads_to_another_output_is_refused(
    tmp_path: Path, unet: Any, monkeypatch: pytest.MonkeyPatch, factor: float, difference: str, randomize: Any
) -> None:
    inject_lora(unet, 2, alpha=3.0)
    randomize(unet)
    before = save_lora(unet, tmp_path).read_bytes()
    state_dict = write.lora_state_dict

    def wrong(unet: nn.Module, text_layers: None) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors, header = state_dict(unet)
        return {key: value * factor if ".lora_B" in key else value for key, value in tensors.items()}, header

    monkeypatch.setattr(write, "lora_state_dict", wrong)
    sentence = rf"does not reload to the same output \(relative difference {difference}\): not shareable"
    with pytest.raises(ModelError, match=sentence):
        save_lora(unet, tmp_path)
    (kept,) = tmp_path.iterdir()
    assert kept.read_bytes() == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_never_written(tmp_path: Path, unet: Any, bad: float) -> None:
    trainable = inject_lora(unet, 2)
    good = save_lora(unet, tmp_path).read_bytes()
    with torch.no_grad():
        next(iter(trainable.values()))[0, 0] = bad
    with pytest.raises(CheckpointError, match=r"unet\.\S+ holds NaN or infinity and is not written"):
        save_lora(unet, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LORA_FILE]
    assert (tmp_path / LORA_FILE).read_bytes() == good


@pytest.mark.parametrize("lora_format", ["diffusers", "kohya", "both"])
def test_format_chooses_the_files_that_are_written(tmp_path: Path, unet: Any, lora_format: Any, randomize: Any) -> None:
    inject_lora(unet, 2, alpha=3.0)
    randomize(unet)
    folder = tmp_path / "my.run"
    first = save_lora(unet, folder, {"d2f.shift": "2.0"}, lora_format=lora_format, prediction_type="v_prediction")
    files = {"diffusers": [LORA_FILE], "kohya": ["my.run_kohya.safetensors"]}
    expected = files.get(lora_format, files["diffusers"] + files["kohya"])
    assert sorted(path.name for path in folder.iterdir()) == sorted(expected)
    assert first == folder / expected[0]
    assert read_lora(folder).path == first and read_lora(folder).header["d2f.shift"] == "2.0"
    if lora_format != "diffusers":
        _, header = read_tensors(folder / files["kohya"][0])
        assert header["modelspec.title"] == "my.run" and header["modelspec.prediction_type"] == "v"


@pytest.mark.parametrize("count", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_saves_of_one_adapter_are_equal_byte_for_byte(
    count: int, tmp_path: Path, unet: Any, randomize: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inject_lora(unet, 2, conv_rank=3, first_last_layers=True)
    randomize(unet)
    for check in ("check_peft_file", "check_kohya_file"):  # They only read, and would take most of the time.
        monkeypatch.setattr(write, check, lambda unet, path: None)
    monkeypatch.setattr(atomic, "sync_to_disk", lambda path: None)  # It takes most of the rest.
    tags = {f"d2f.{letter}": letter for letter in "zyxabc"}
    hashes = set()
    for number in range(count):
        folder = tmp_path / str(number) / "run"
        save_lora(unet, folder, tags, lora_format="both", text_layers=TEXT_LAYERS)
        hashes.add(tuple(hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())))
    assert len(hashes) == 1 and len(hashes.pop()) == 2


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_text_encoders_are_written_beside_the_adapter(
    form: Any, tmp_path: Path, tiny_folder: Path, unet: Any, randomize: Any
) -> None:
    """Check against diffusers' own loading of the file into a whole pipeline."""
    inject_lora(unet, 2, target_modules=("to_q",))
    randomize(unet)
    path = save_lora(unet, tmp_path, lora_format=form, text_layers=TEXT_LAYERS)
    ours, theirs = (StableDiffusionPipeline.from_pretrained(tiny_folder) for _ in range(2))
    weight = next(module.weight for name, module in ours.text_encoder.named_modules() if name.endswith(TEXT))
    expected = weight.detach() + TEXT_LAYERS[f"text_encoder.{TEXT}"].delta(weight.detach())
    fuse_adapter(ours, path, 1.0)
    torch.testing.assert_close(weight.detach(), expected)
    theirs.load_lora_weights(path)
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs.text_encoder(tokens)[0], ours.text_encoder(tokens)[0], rtol=1e-4, atol=1e-5)


def test_file_that_lost_a_text_encoder_is_refused(tmp_path: Path, unet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inject_lora(unet, 2, target_modules=("to_q",))
    state_dict = write.lora_state_dict
    monkeypatch.setattr(write, "lora_state_dict", lambda unet, text_layers: state_dict(unet))
    with pytest.raises(ModelError, match=rf"does not hold text_encoder\.{TEXT} as it was written: not shareable"):
        save_lora(unet, tmp_path, text_layers=TEXT_LAYERS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_peft_to_kohya_to_peft_gives_the_same_tensors(
    family: str, tmp_path: Path, make_family_unet: Any, randomize: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that the kohya file, read and started from, is written again with the tensors of the first peft file."""
    depth = {"transformer_layers_per_block": 1} if family == "sdxl" else {}
    first, again = (make_family_unet(family, **depth) for _ in range(2))
    inject_lora(first, 2, alpha=3.0, conv_rank=3, first_last_layers=True)
    randomize(first)
    for check in ("check_peft_file", "check_kohya_file"):
        monkeypatch.setattr(write, check, lambda unet, path: None)
    save_lora(first, tmp_path / "first", lora_format="both")
    start = read_start(str(tmp_path / "first" / "first_kohya.safetensors"), SimpleNamespace(unet=again))
    inject_start(again, start)
    save_lora(again, tmp_path / "again")
    before, _ = read_tensors(tmp_path / "first" / LORA_FILE)
    after, _ = read_tensors(tmp_path / "again" / LORA_FILE)
    assert before.keys() == after.keys()
    error = max(float((after[key] - value).norm() / value.norm()) for key, value in before.items())
    print(f"\n{family}: round trip error {error:.1e}")
    assert error <= 1e-6


def test_files_that_fail_their_check_leave_both_old_files(
    tmp_path: Path, unet: Any, monkeypatch: pytest.MonkeyPatch, randomize: Any
) -> None:
    inject_lora(unet, 2)
    randomize(unet)
    save_lora(unet, tmp_path, lora_format="both")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    state_dict = write.kohya_state_dict

    def without_a_layer(unet: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(list(state_dict(unet, tensors).items())[3:])

    monkeypatch.setattr(write, "kohya_state_dict", without_a_layer)
    randomize(unet)
    with pytest.raises(ModelError, match=r"_kohya\.safetensors lacks the layer \S+: not shareable"):
        save_lora(unet, tmp_path, lora_format="both")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_diffusers_loads_both_files_of_every_family(
    tmp_path: Path, make_family_unet: Any, randomize: Any, family: str
) -> None:
    depth = {"transformer_layers_per_block": 1} if family == "sdxl" else {}
    network = make_family_unet(family, **depth)
    base = reload._probe(network)
    inject_lora(network, 2, alpha=3.0, conv_rank=3, first_last_layers=True)
    randomize(network)
    save_lora(network, tmp_path, lora_format="both")
    expected = reload._probe(network)
    for path in tmp_path.iterdir():
        other = make_family_unet(family, **depth)
        tensors, alphas = StableDiffusionPipeline.lora_state_dict(path, unet_config=other.config)
        other.load_lora_adapter(tensors, prefix="unet", network_alphas=alphas)
        error = (reload._probe(other) - expected).norm() / (expected - base).norm()
        print(f"\n{family} {path.name}: effect error {error:.1e}")
        assert error <= 1e-4, path.name
