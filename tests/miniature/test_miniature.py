"""The embedded miniature as any user meets it: a stock pipeline folder, its tokenizer, its pictures, its judge."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from d2f_fast.miniature import MINIATURE, build_denoiser, load_miniature, pictures
from d2f_fast.miniature.build_classifier import background_colours, names_with_free_corners
from d2f_fast.miniature.classifier import load_classifier

PAIRS = list(itertools.product(range(len(pictures.names())), range(len(pictures.BACKGROUNDS))))


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    pipe = load_miniature()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(MINIATURE / "tokenizer")


def draw(pipe: StableDiffusionPipeline, caption: str, seed: int, steps: int = 2) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    return pipe(caption, num_inference_steps=steps, generator=generator, output_type="np").images[0]


def test_stock_pipeline_draws_the_same_picture_from_the_same_seed(pipe: StableDiffusionPipeline) -> None:
    stock = StableDiffusionPipeline.from_pretrained(MINIATURE, dtype=torch.float32, local_files_only=True)
    stock.set_progress_bar_config(disable=True)
    first = draw(stock, "a dog on a red background", seed=3)
    assert first.shape == (pictures.SIZE, pictures.SIZE, 3)
    assert np.array_equal(first, draw(pipe, "a dog on a red background", seed=3))
    assert not np.array_equal(first, draw(pipe, "a dog on a red background", seed=4))


def test_pipeline_has_the_parts_and_the_noise_schedule_of_stable_diffusion(pipe: StableDiffusionPipeline) -> None:
    assert all(p.dtype == torch.float32 for p in (*pipe.unet.parameters(), *pipe.vae.parameters()))
    assert pipe.safety_checker is None and pipe.feature_extractor is None
    assert pipe.scheduler.config.prediction_type == "epsilon"
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    np.testing.assert_allclose(pipe.scheduler.alphas_cumprod, np.cumprod(1 - betas), rtol=1e-4)


def test_background_is_the_captioned_colour(pipe: StableDiffusionPipeline) -> None:
    drawn = [draw(pipe, f"a teacup without handle on a {c} background", seed=0, steps=10) for c in pictures.BACKGROUNDS]
    found = background_colours(torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2) * 2 - 1)
    assert (found == torch.arange(len(pictures.BACKGROUNDS))).sum() >= 7


def test_every_weight_is_finite_and_half_precision() -> None:
    files = sorted(MINIATURE.parent.rglob("*.safetensors"))
    assert len(files) == 4
    for path in files:
        for key, tensor in load_file(path).items():
            if tensor.is_floating_point():
                assert tensor.dtype == torch.float16, f"{path}: {key}"
                assert tensor.isfinite().all(), f"{path}: {key}"


def test_package_stays_small_and_names_no_local_path() -> None:
    files = [path for path in MINIATURE.parent.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 16e6
    for path in MINIATURE.rglob("*config.json"):
        assert "_name_or_path" not in path.read_text(), path


def test_every_caption_fits_without_truncation(tokenizer: CLIPTokenizer) -> None:
    captions = build_denoiser.all_captions()
    lengths = [len(ids) for ids in tokenizer(captions).input_ids]
    assert max(lengths) == tokenizer.model_max_length
    assert len(captions) == len(set(captions)) == len(pictures.names()) * 9 + 1
    assert len(tokenizer) <= 2000


def test_tokens_read_back_as_the_caption(tokenizer: CLIPTokenizer) -> None:
    for name, colour in PAIRS[:: len(PAIRS) // 100]:
        caption = pictures.caption(name, colour)
        read = tokenizer.decode(tokenizer(caption).input_ids, skip_special_tokens=True)
        assert read.replace(" ", "") == caption.replace(" ", "")  # CLIP's decoder sets hyphens apart


@pytest.mark.parametrize(
    "text", ["", "quetzalcoatl", "ein Bär 🐻 auf 赤い背景", "\x00 \u200d \U0010ffff", "<|x|> " * 30]
)
def test_any_text_becomes_known_tokens_of_the_full_length(tokenizer: CLIPTokenizer, text: str) -> None:
    length = tokenizer.model_max_length
    ids = tokenizer(text, padding="max_length", truncation=True, max_length=length).input_ids
    assert len(ids) == length
    assert ids[0] == tokenizer.bos_token_id and tokenizer.eos_token_id in ids
    words = tokenizer(text, add_special_tokens=False, padding=False, truncation=False).input_ids
    assert tokenizer.eos_token_id not in words  # the unknown token is the end token, as in CLIP


@pytest.mark.parametrize("style", pictures.STYLES)
def test_sheets_hold_a_picture_for_every_name(style: str) -> None:
    sprites = pictures.sprites(style)
    assert sprites.shape == (len(pictures.names()), 4, pictures.SIZE, pictures.SIZE)
    drawn = set((sprites[:, 3].flatten(1).sum(dim=1) > 0).nonzero().squeeze(-1).tolist())
    assert drawn == set(range(len(pictures.names())) if style == "noto" else pictures.names_in_both_styles())


def test_composite_is_the_background_where_transparent_and_the_sprite_where_opaque() -> None:
    rgba = torch.tensor([10, 20, 30, 0, 10, 20, 30, 255], dtype=torch.uint8).view(1, 2, 4).permute(0, 2, 1)[..., None]
    pixels = pictures.composite(rgba, torch.tensor([[255, 0, 51]]))
    expected = torch.tensor([[255, 0, 51], [10, 20, 30]]) / 127.5 - 1
    torch.testing.assert_close(pixels[0, :, :, 0].T, expected)


def test_held_out_shares_are_a_tenth_and_leave_every_name_trained() -> None:
    held_out = pictures.held_out_pairs()
    assert held_out < set(PAIRS)
    assert len(held_out) == pytest.approx(len(PAIRS) / 10, rel=0.1)
    assert {name for name, _ in set(PAIRS) - held_out} == set(range(len(pictures.names())))
    assert len(pictures.held_out_names()) == round(len(pictures.names_in_both_styles()) / 10)
    assert pictures.held_out_names() < set(pictures.names_in_both_styles())


def test_background_is_read_from_the_corners_of_real_pictures() -> None:
    chosen = [pictures.Picture(name, colour) for name, colour in PAIRS if name in names_with_free_corners()]
    assert len(chosen) > 0.8 * len(PAIRS)
    found = background_colours(pictures.draw(chosen, "noto"))
    assert found.tolist() == [picture.colour for picture in chosen]


@pytest.mark.parametrize(("style", "share"), [("noto", 0.95), ("fluent", 0.95)])
def test_classifier_names_real_pictures(style: str, share: float) -> None:
    classifier = load_classifier()
    chosen = [pictures.Picture(name, name % 8) for name in pictures.names_in_both_styles()[::4]]
    pixels = pictures.draw(chosen, style)
    with torch.inference_mode():
        guesses = classifier(pixels).topk(5).indices
        assert classifier.features(pixels).shape == (len(chosen), 64)
    right = (guesses == torch.tensor([picture.name for picture in chosen])[:, None]).any(dim=1)
    assert right.float().mean() >= share


def test_interrupted_training_ends_as_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_denoiser, "cached_latents", lambda vae, device: torch.ones(874, 8, 2, 2, 4, 8, 8))
    monkeypatch.setattr(build_denoiser, "save_pipeline", lambda networks, scheduler: None)
    monkeypatch.setattr(build_denoiser, "cosine", lambda step, steps: 1.0)

    def train(steps: int, state: Path) -> None:
        build_denoiser.build_denoiser(steps, 4, 1e-3, "cpu", state, save_every_s=1e9)

    train(3, tmp_path / "whole.safetensors")
    train(2, tmp_path / "parts.safetensors")
    train(3, tmp_path / "parts.safetensors")
    whole, parts = load_file(tmp_path / "whole.safetensors"), load_file(tmp_path / "parts.safetensors")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_samples_of_the_stage_are_those_of_the_stock_pipeline(pipe: StableDiffusionPipeline) -> None:
    from d2f_fast.miniature.build_classifier import sample

    assert isinstance(pipe.scheduler, DDIMScheduler)
    ours = sample(pipe, ["a cat on a blue background"], guidance=3.0, steps=5, seed=7)
    generator = torch.Generator().manual_seed(7)
    theirs = pipe(
        "a cat on a blue background", num_inference_steps=5, guidance_scale=3.0, generator=generator, output_type="pt"
    ).images
    torch.testing.assert_close(ours.add(1).div(2), theirs, atol=1e-5, rtol=0)
