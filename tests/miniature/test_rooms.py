"""Rendered rooms: exact plane depth, seeds, splits, and the folder that is written."""

from pathlib import Path

import numpy as np
import pytest

from d2f_fast.data.depth_images import DepthImages
from d2f_fast.errors import RefusedInputError
from d2f_fast.miniature.ray_shapes import Box, Sphere
from d2f_fast.miniature.rooms import SPLITS, Material, Scene, random_scene, render_room, write_rooms


def scene(shapes: list[Box | Sphere]) -> Scene:
    """Return a scene that a camera at the origin sees along z."""
    material = Material(np.full(3, 0.5), np.zeros((32, 32, 4)), 1.0)
    return Scene(shapes, [[material]] * len(shapes), np.array([0.0, 0.9, 0.0]), np.zeros(3), np.eye(3), 0.8)


def test_wall_that_faces_the_camera_has_one_depth_in_every_pixel() -> None:
    room = Box(np.zeros(3), np.array([50.0, 50.0, 3.0]), inside=True)
    assert np.abs(scene([room]).depth(16) - 3.0).max() <= 1e-12


def test_floor_and_sphere_have_the_depth_of_their_closed_forms() -> None:
    room, ball = Box(np.zeros(3), np.array([50.0, 1.5, 9.0]), inside=True), Sphere(np.array([0.0, 0.0, 4.0]), 1.0)
    side, focal = 32, 0.8
    depth = scene([room, ball]).depth(side)
    across, down = np.meshgrid(*[((np.arange(side) + 0.5) / side - 0.5) / focal] * 2)
    with np.errstate(divide="ignore"):
        expected = np.minimum(1.5 / np.abs(down), 9.0)
    # The sphere: |t (across, down, 1) - (0, 0, 4)| = 1.
    a = across**2 + down**2 + 1
    inner = 16 - a * 15
    ball_depth = (4 - np.sqrt(np.maximum(inner, 0))) / a
    expected = np.where(inner >= 0, np.minimum(ball_depth, expected), expected)
    assert (inner >= 0).sum() > 20
    assert np.abs(depth - expected).max() <= 1e-9


def test_depth_is_measured_along_the_axis_of_a_turned_camera() -> None:
    found = random_scene(3, "noto")
    assert np.abs(found.turn @ found.turn.T - np.eye(3)).max() <= 1e-12 and found.turn[2, 2] < 1
    point = found.camera + found.depth(8).reshape(-1, 1) * found.rays(8)
    room = found.shapes[0]
    assert isinstance(room, Box)
    assert ((point - found.camera) @ found.turn[2]).reshape(8, 8) == pytest.approx(found.depth(8), nan_ok=True)
    assert np.nanmax(np.abs(point - room.centre) / room.half) <= 1 + 1e-9


def test_lamp_lights_what_it_sees_and_things_throw_shadows() -> None:
    room = Box(np.zeros(3), np.array([5.0, 1.0, 5.0]), inside=True)
    free = scene([room]).colours(32)
    shaded = scene([room, Sphere(np.array([0.0, -0.4, 1.5]), 0.3)]).colours(32)
    darker = (shaded < free - 0.05).all(axis=2) & (scene([room]).depth(32) < 4.9)
    assert darker.any()
    assert shaded.min() >= 0 and free.max() <= 1


def test_seed_decides_the_room_and_splits_share_neither_seeds_nor_emoji() -> None:
    first, again, other = render_room(5), render_room(5), render_room(6)
    assert np.array_equal(first.image, again.image) and np.array_equal(first.depth, again.depth, equal_nan=True)
    assert not np.array_equal(first.depth, other.depth, equal_nan=True)
    fluent = render_room(5, "fluent")
    assert np.array_equal(first.depth, fluent.depth, equal_nan=True) and not np.array_equal(first.image, fluent.image)
    ranges = [range(split.first, split.first + split.scenes) for split in SPLITS.values()]
    assert all(not set(a) & set(b) for i, a in enumerate(ranges) for b in ranges[:i])
    assert SPLITS["train"].style != SPLITS["test"].style


def test_some_pixels_have_no_depth_and_all_others_are_in_the_room() -> None:
    depths = [render_room(seed, side=32).depth for seed in range(12)]
    missing = [np.isnan(depth).mean() for depth in depths]
    assert 0 < max(missing) < 0.2 and min(missing) == 0
    assert all(np.nanmin(depth) > 0.1 and np.nanmax(depth) < 12 for depth in depths)


def test_written_rooms_are_read_with_their_exact_depth(tmp_path: Path) -> None:
    folder = write_rooms(tmp_path / "rooms", "test", 2, side=16)
    images = DepthImages(folder)
    assert len(images) == 2
    room = render_room(SPLITS["test"].first + 1, "fluent", 16)
    assert np.array_equal(images[1].depth, room.depth, equal_nan=True)
    assert np.array_equal(np.asarray(images[1].image), room.image)
    with pytest.raises(RefusedInputError, match="exists"):
        write_rooms(folder, "test", 1)
