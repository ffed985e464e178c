"""Render rooms with exact depth, to train and to measure depth without a download.

python -m d2f_fast.miniature.rooms rooms/train --split train
python -m d2f_fast.miniature.rooms rooms/test --split test

A room is a box with boxes, spheres and cylinders on its floor, under one lamp that throws shadows. Its surfaces are
tiled with emoji. A ray leaves the camera for each pixel; its direction has the length 1 along the optical axis, so that
the ray's parameter at the first surface is the plane depth of that surface, exactly. Windows and a few other pixels
have no depth (NaN). The scenes of the three splits come from other seeds, and those of "test" have other emoji.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from d2f_fast.files.atomic import StrPath, atomic_folder
from d2f_fast.miniature.emoji import names_in_both_styles, sprites
from d2f_fast.miniature.ray_shapes import Array, Box, Cylinder, Hit, Shape, Sphere, turned

SIDE = 64  # pixels
_SAMPLES = 2  # colours are the mean of so many rays along each side of a pixel
_AMBIENT = 0.4


class Split(NamedTuple):
    """Scenes that belong together.

    Attributes:
        first: Seed of the first scene; the others follow.
        scenes: Usual number of scenes.
        style: Style of the emoji on the surfaces.
    """

    first: int
    scenes: int
    style: str


SPLITS = {
    "train": Split(0, 4000, "noto"),
    "validation": Split(1_000_000, 100, "noto"),
    "test": Split(2_000_000, 500, "fluent"),
}


class Room(NamedTuple):
    """A rendered room.

    Attributes:
        image: RGB, [side, side, 3] uint8.
        depth: Plane depth in metres, [side, side] float32; NaN where there is none.
    """

    image: NDArray[np.uint8]
    depth: NDArray[np.float32]


@dataclass(frozen=True)
class Material:
    """What a surface looks like.

    Args:
        colour: Colour between the emoji, [3] in [0, 1].
        emoji: Pixels of an emoji, [32, 32, 4] in [0, 1], alpha last.
        tile: Side of one emoji, in metres.
    """

    colour: Array
    emoji: Array
    tile: float

    def at(self, uv: Array) -> Array:
        """Return the colour at positions on the surface, [N, 2] in metres, as [N, 3]."""
        cells = (uv / self.tile) % 1.0
        side = len(self.emoji)
        column, row = (np.minimum((cells * side).astype(np.int64), side - 1)).T
        texel = self.emoji[side - 1 - row, column]
        alpha = texel[:, 3:]
        colour: Array = texel[:, :3] * alpha + self.colour * (1 - alpha)
        return colour


@dataclass(frozen=True)
class Scene:
    """A room, what stands in it, and the camera.

    Args:
        shapes: The room, which is the first, and the things in it.
        materials: Materials of the faces of each shape; a shape with fewer materials than faces repeats them.
        lamp: Position of the lamp, [3], in metres.
        camera: Position of the camera, [3], in metres.
        turn: Directions of the camera to the right, upwards and forwards, [3, 3].
        focal: Focal length, as a multiple of the side of the image.
        window: Face of the room that has a window, and the window's lowest and highest position on it, [2] each; None
            for none.
    """

    shapes: list[Shape]
    materials: list[list[Material]]
    lamp: Array
    camera: Array
    turn: Array
    focal: float
    window: tuple[int, Array, Array] | None = None

    def rays(self, side: int) -> Array:
        """Return the direction of the ray of each pixel of a square image, [side², 3], of length 1 along the axis."""
        position = (np.arange(side) + 0.5) / side - 0.5
        across, down = np.meshgrid(position, position)
        local = np.stack([across.ravel(), -down.ravel(), np.full(side * side, self.focal)], axis=1) / self.focal
        return local @ self.turn

    def depth(self, side: int) -> Array:
        """Return the plane depth of each pixel of a square image, [side, side]; NaN in the window."""
        hits = [shape.hit(self.camera, self.rays(side)) for shape in self.shapes]
        t = np.stack([hit.t for hit in hits])
        seen = np.where(self._in_window(hits[0]) & (t.argmin(axis=0) == 0), np.nan, t.min(axis=0))
        return seen.reshape(side, side)

    def colours(self, side: int) -> Array:
        """Return the colour of each pixel of a square image, [side, side, 3] in [0, 1], one ray for each."""
        direction = self.rays(side)
        hits = [shape.hit(self.camera, direction) for shape in self.shapes]
        first = np.stack([hit.t for hit in hits]).argmin(axis=0)
        colour = np.zeros((side * side, 3))
        for number, (hit, materials) in enumerate(zip(hits, self.materials, strict=True)):
            for face, material in enumerate(materials):
                own = (first == number) & (hit.face % len(materials) == face)
                if own.any():
                    point = self.camera + hit.t[own, None] * direction[own]
                    colour[own] = material.at(hit.uv[own]) * self._light(point, hit.normal[own])[:, None]
        colour[self._in_window(hits[0]) & (first == 0)] = (0.8, 0.9, 1.0)
        return colour.reshape(side, side, 3).clip(0, 1)

    def _light(self, point: Array, normal: Array) -> Array:
        """Return the light at points on surfaces, [N]: the lamp's, unless something is in its way, and a rest."""
        to_lamp = self.lamp - point
        distance = np.linalg.norm(to_lamp, axis=1)
        facing = ((normal * to_lamp).sum(1) / distance).clip(0, 1)
        start = point + 1e-4 * normal
        free = np.ones(len(point), bool)
        for shape in self.shapes[1:]:
            free &= shape.hit(start, self.lamp - start).t > 1
        light: Array = _AMBIENT + (1 - _AMBIENT) * facing * free * 1.4 / (1 + 0.04 * distance**2)
        return light

    def _in_window(self, hit: Hit) -> NDArray[np.bool_]:
        """Return which rays meet the room where its window is."""
        if self.window is None:
            return np.zeros(len(hit.t), bool)
        face, low, high = self.window
        inside: NDArray[np.bool_] = (hit.face == face) & ((hit.uv >= low) & (hit.uv <= high)).all(axis=1)
        return inside


def random_scene(seed: int, style: str) -> Scene:
    """Return a random scene.

    Args:
        seed: Seed of the scene, 0 or larger.
        style: Style of the emoji on its surfaces.
    """
    random = np.random.default_rng(seed)

    def material() -> Material:
        number = random.choice(names_in_both_styles())
        emoji = sprites(style)[int(number)].permute(1, 2, 0).numpy() / 255.0
        return Material(random.uniform(0.25, 0.95, 3), emoji, float(random.uniform(0.3, 1.2)))

    half = np.array([random.uniform(1.5, 3.5), random.uniform(1.15, 1.6), random.uniform(2.0, 4.0)])
    room = Box(np.array([0.0, half[1], 0.0]), half, inside=True)
    shapes: list[Shape] = [room]
    for _ in range(random.integers(2, 7)):
        place = np.array([random.uniform(-0.8, 0.8) * half[0], 0.0, random.uniform(-0.3, 0.85) * half[2]])
        kind, size = random.integers(3), random.uniform(0.2, 0.6)
        if kind == 0:
            sides = np.array([size, random.uniform(0.2, 0.9), random.uniform(0.2, 0.6)])
            shapes.append(Box(place + sides * [0, 1, 0], sides, float(random.uniform(0, np.pi))))
        elif kind == 1:
            shapes.append(Sphere(place + np.array([0, size, 0]), float(size)))
        else:
            shapes.append(Cylinder(place, float(size * 0.7), float(random.uniform(0.4, 2.0))))
    camera = np.array([random.uniform(-0.5, 0.5) * half[0], random.uniform(0.8, 1.8), -half[2] + 0.3])
    # What would stand around the camera is left out.
    shapes = [room, *(shape for shape in shapes[1:] if _distance(shape, camera) > 0.9)]
    yaw, pitch = random.uniform(-0.5, 0.5), random.uniform(-0.3, 0.1)
    tilt = np.array([[1, 0, 0], [0, np.cos(pitch), -np.sin(pitch)], [0, np.sin(pitch), np.cos(pitch)]])
    window = None
    if random.random() < 0.5:
        low = np.array([random.uniform(-0.8, 0.2) * half[0], random.uniform(-0.3, 0.1) * half[1]])
        window = (5, low, low + random.uniform(0.4, 1.0, 2) * [1.2, 0.8])
    return Scene(
        shapes,
        [[material() for _ in range(6 if shape is room else 2)] for shape in shapes],
        np.array([random.uniform(-0.6, 0.6) * half[0], 2 * half[1] - 0.15, random.uniform(-0.6, 0.6) * half[2]]),
        camera,
        tilt @ turned(yaw).T,
        float(random.uniform(0.6, 0.9)),
        window,
    )


def render_room(seed: int, style: str = "noto", side: int = SIDE) -> Room:
    """Render a random room.

    Args:
        seed: Seed of the room, 0 or larger.
        style: Style of the emoji on its surfaces.
        side: Side of the square image, in pixels.
    """
    scene = random_scene(seed, style)
    fine = scene.colours(side * _SAMPLES).reshape(side, _SAMPLES, side, _SAMPLES, 3).mean(axis=(1, 3))
    depth = scene.depth(side)
    random = np.random.default_rng([seed, 1])
    if random.random() < 0.5:  # a patch that a sensor would not have measured
        top, left = random.integers(side, size=2)
        height, width = random.integers(1, side // 8 + 1, size=2)
        depth[top : top + height, left : left + width] = np.nan
    return Room((fine * 255).round().astype(np.uint8), depth.astype(np.float32))


def write_rooms(folder: StrPath, split: str, count: int | None = None, side: int = SIDE) -> Path:
    """Render the rooms of a split into a folder, rgb/<number>.png and depth/<number>.npy in metres.

    Args:
        folder: Folder, which must not exist; it appears whole or not at all.
        split: Name of the split, of `SPLITS`.
        count: Number of rooms; None for the usual one.
        side: Side of the square images, in pixels.

    Returns:
        The folder.

    Raises:
        RefusedInputError: The folder exists, or cannot be written.
    """
    chosen = SPLITS[split]
    with atomic_folder(folder) as temporary:
        for name in ("rgb", "depth"):
            (temporary / name).mkdir()
        for number in range(chosen.scenes if count is None else count):
            room = render_room(chosen.first + number, chosen.style, side)
            Image.fromarray(room.image).save(temporary / "rgb" / f"{number:05d}.png")
            np.save(temporary / "depth" / f"{number:05d}.npy", room.depth)
    return Path(folder)


def _distance(shape: Shape, point: Array) -> float:
    """Return the horizontal distance of a point from the middle of a shape, in metres."""
    middle = shape.base if isinstance(shape, Cylinder) else shape.centre
    return float(np.linalg.norm((middle - point)[[0, 2]]))


def main() -> None:
    """Write the rooms that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to write, which must not exist")
    parser.add_argument("--split", choices=SPLITS, default="train", help="which scenes (default %(default)s)")
    parser.add_argument("--count", type=int, help="number of rooms (default: all of the split)")
    parser.add_argument("--side", type=int, default=SIDE, help="side of the images in pixels (default %(default)s)")
    options = parser.parse_args()
    print(write_rooms(options.folder, options.split, options.count, options.side))


if __name__ == "__main__":
    main()
