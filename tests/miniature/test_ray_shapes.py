"""Intersections of rays: closed forms, and the equations of the surfaces."""

from collections.abc import Callable

import numpy as np
import pytest

from d2f_fast.miniature.ray_shapes import Array, Box, Cylinder, Shape, Sphere

COS, SIN = np.cos(0.6), np.sin(0.6)
FORWARD = np.array([[0.0, 0.0, 1.0]])


def test_distances_along_an_axis_are_exact() -> None:
    origin = np.array([0.0, 0.5, 0.0])
    cases: list[tuple[Shape, float, list[float]]] = [
        (Box(np.array([0.0, 0.5, 5.0]), np.array([1.0, 1.0, 2.0])), 3.0, [0, 0, -1]),
        (Box(np.array([0.0, 0.5, 0.0]), np.array([1.0, 1.0, 2.0]), inside=True), 2.0, [0, 0, -1]),
        (Box(np.array([0.0, 0.5, 5.0]), np.array([1.0, 1.0, 2.0]), yaw=np.pi / 2), 4.0, [0, 0, -1]),
        (Sphere(np.array([0.0, 0.5, 4.0]), 1.5), 2.5, [0, 0, -1]),
        (Cylinder(np.array([0.0, 0.0, 4.0]), 0.5, 2.0), 3.5, [0, 0, -1]),
    ]
    for shape, distance, normal in cases:
        hit = shape.hit(origin, FORWARD)
        assert hit.t == pytest.approx([distance], abs=1e-12)
        assert hit.normal[0] == pytest.approx(normal, abs=1e-12)
        assert shape.hit(origin, 0.5 * FORWARD).t == pytest.approx([2 * distance], abs=1e-12)


def test_ray_that_misses_or_looks_away_has_no_distance() -> None:
    shapes: list[Shape] = [
        Box(np.array([0.0, 0.0, 5.0]), np.ones(3)),
        Sphere(np.array([0.0, 0.0, 5.0]), 1.0),
        Cylinder(np.array([0.0, -1.0, 5.0]), 1.0, 2.0),
    ]
    for shape in shapes:
        directions = np.array([[0.0, 0.0, -1.0], [1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
        assert np.isinf(shape.hit(np.zeros(3), directions).t).all()


SURFACES: dict[str, tuple[Shape, Callable[[Array], Array]]] = {
    "box": (
        Box(np.array([0.3, 0.5, 0.2]), np.array([0.5, 0.7, 0.9]), yaw=0.6),
        lambda p: (
            (
                np.abs(
                    (p - [0.3, 0.5, 0.2])
                    @ np.array([[np.cos(0.6), 0, np.sin(0.6)], [0, 1, 0], [-np.sin(0.6), 0, np.cos(0.6)]])
                )
                / [0.5, 0.7, 0.9]
            ).max(axis=1)
            - 1
        ),
    ),
    "sphere": (Sphere(np.array([0.3, 0.5, 0.2]), 0.8), lambda p: np.linalg.norm(p - [0.3, 0.5, 0.2], axis=1) - 0.8),
    "cylinder": (
        Cylinder(np.array([0.3, 0.1, 0.2]), 0.6, 1.2),
        lambda p: np.maximum(
            np.linalg.norm((p - [0.3, 0.1, 0.2])[:, [0, 2]], axis=1) - 0.6, np.abs(p[:, 1] - 0.7) - 0.6
        ),
    ),
}


@pytest.mark.parametrize("name", SURFACES)
def test_ray_ends_on_the_surface_and_meets_nothing_before(name: str) -> None:
    shape, outside = SURFACES[name]
    random = np.random.default_rng(0)
    origin = np.array([0.2, 1.8 if name == "cylinder" else 0.9, -3.0])  # from above, the upper end is seen, too
    direction = np.stack([random.normal(0, 0.25, 400), random.normal(-0.2, 0.25, 400), np.ones(400)], axis=1)
    hit = shape.hit(origin, direction)
    meets = np.isfinite(hit.t)
    assert 50 < meets.sum() < 350
    point = origin + hit.t[meets, None] * direction[meets]
    assert np.abs(outside(point)).max() <= 1e-9
    assert np.abs(np.linalg.norm(hit.normal[meets], axis=1) - 1).max() <= 1e-9
    assert (outside(point + 1e-3 * hit.normal[meets]) > 0).all()
    assert (outside(point - 1e-3 * hit.normal[meets]) < 0).all()
    for share in np.linspace(0.05, 0.99, 40):
        assert (outside(origin + share * hit.t[meets, None] * direction[meets]) > 0).all()
    for t in np.linspace(0.1, 8, 80):
        assert (outside(origin + t * direction[~meets]) > 0).all()


def test_faces_and_positions_name_the_place_on_a_box() -> None:
    room = Box(np.zeros(3), np.array([1.0, 2.0, 3.0]), inside=True)
    directions = np.array([[-1.0, 0, 0], [1.0, 0, 0], [0, -1.0, 0], [0, 1.0, 0], [0, 0, -1.0], [0.1, 0.2, 1.0]])
    hit = room.hit(np.zeros(3), directions)
    assert hit.face.tolist() == [0, 1, 2, 3, 4, 5]
    assert hit.uv[5] == pytest.approx([0.3, 0.6])
