"""Test the captioned images and their divisions."""

import itertools

import pytest
import torch

from d2f_fast.evaluation.accuracy import corner_colours
from d2f_fast.miniature import emoji

PAIRS = list(itertools.product(range(len(emoji.names())), range(len(emoji.BACKGROUNDS))))


@pytest.mark.parametrize("style", emoji.STYLES)
def test_sheets_hold_a_sprite_for_every_name(style: str) -> None:
    sprites = emoji.sprites(style)
    assert sprites.shape == (len(emoji.names()), 4, emoji.SIZE, emoji.SIZE)
    opaque = set((sprites[:, 3].flatten(1).sum(dim=1) > 0).nonzero().squeeze(-1).tolist())
    assert opaque == set(range(len(emoji.names())) if style == "noto" else emoji.names_in_both_styles())


def test_composite_shows_sprites_where_opaque_and_background_elsewhere() -> None:
    rgba = torch.tensor([10, 20, 30, 0, 10, 20, 30, 255], dtype=torch.uint8).view(1, 2, 4).permute(0, 2, 1)[..., None]
    pixels = emoji.composite(rgba, torch.tensor([[255, 0, 51]]))
    expected = torch.tensor([[255, 0, 51], [10, 20, 30]]) / 127.5 - 1
    torch.testing.assert_close(pixels[0, :, :, 0].T, expected)


def test_one_tenth_is_held_out_and_every_name_is_trained() -> None:
    held_out = emoji.held_out_pairs()
    assert held_out < set(PAIRS)
    assert len(held_out) == pytest.approx(len(PAIRS) / 10, rel=0.1)
    assert {name for name, _ in set(PAIRS) - held_out} == set(range(len(emoji.names())))
    assert len(emoji.held_out_names()) == round(len(emoji.names_in_both_styles()) / 10)
    assert emoji.held_out_names() < set(emoji.names_in_both_styles())


def test_corners_of_real_images_have_the_background_colour() -> None:
    chosen = [emoji.Emoji(name, colour) for name, colour in PAIRS if name in emoji.names_with_free_corners()]
    assert len(chosen) > 0.8 * len(PAIRS)
    found = corner_colours(emoji.render(chosen, "noto"), emoji.background_palette())
    assert found.tolist() == [item.colour for item in chosen]


def test_name_is_read_from_each_caption_and_from_no_other_text() -> None:
    for name, colour in [*PAIRS, *((name, None) for name in range(len(emoji.names())))]:
        assert emoji.name_of_caption(emoji.caption(name, colour)) == name
    owl = emoji.names().index("owl")
    assert emoji.name_of_caption(" an owl on a blue background\n") == owl
    for text in (
        "",
        "owl",
        "a owl",
        "an owl on a beach",
        "an owl on a pink background",
        "two owls on a red background",
    ):
        assert emoji.name_of_caption(text) is None
