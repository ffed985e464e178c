"""Intersect rays with boxes, spheres and upright cylinders, all rays at once.

A ray is origin + t · direction, with t > 0. The direction may have any length: with a length of 1 along the axis of a
camera, t is the plane depth. y points upwards, and lengths are metres.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_EPSILON = 1e-6

Array = NDArray[np.float64]


class Hit(NamedTuple):
    """First intersections of rays with a shape.

    Attributes:
        t: Parameter of each ray, [N]; infinite where it misses.
        normal: Unit normal at the intersection, [N, 3].
        uv: Position on the surface in metres, [N, 2].
        face: Number of the face, [N], which chooses the material.
    """

    t: Array
    normal: Array
    uv: Array
    face: NDArray[np.int64]


@dataclass(frozen=True)
class Box:
    """A box that is turned about the vertical axis. The room is one that is seen from inside.

    Args:
        centre: Middle of the box, [3], in metres; y points upwards.
        half: Half of its sides, [3], in metres.
        yaw: Angle about the vertical axis, in radians.
        inside: Whether rays begin in the box, and meet its walls from inside.
    """

    centre: Array
    half: Array
    yaw: float = 0.0
    inside: bool = False

    def hit(self, origin: Array, direction: Array) -> Hit:
        """Return where rays, [N, 3] each, meet the box; faces are 2 · axis, plus 1 on the positive side."""
        turn = turned(self.yaw)
        o, d = np.broadcast_to(origin - self.centre, direction.shape) @ turn, direction @ turn
        d = np.where(np.abs(d) < 1e-12, 1e-12, d)
        ends = np.stack([(-self.half - o) / d, (self.half - o) / d])
        near, far = ends.min(axis=0), ends.max(axis=0)
        enters, leaves = near.max(axis=1), far.min(axis=1)
        axis = far.argmin(axis=1) if self.inside else near.argmax(axis=1)
        t = np.where(enters <= leaves, leaves if self.inside else enters, np.inf)
        t = np.where(t > _EPSILON, t, np.inf)
        rows = np.arange(len(t))
        point = o + np.where(np.isfinite(t), t, 0)[:, None] * d
        side = np.sign(d[rows, axis]) * (1 if self.inside else -1)
        normal = np.zeros_like(d)
        normal[rows, axis] = -side if self.inside else side
        others = np.array([[2, 1], [0, 2], [0, 1]])[axis]
        return Hit(t, normal @ turn.T, np.take_along_axis(point, others, axis=1), 2 * axis + (side > 0))


@dataclass(frozen=True)
class Sphere:
    """A sphere.

    Args:
        centre: Its centre, [3], in metres.
        radius: Its radius, in metres.
    """

    centre: Array
    radius: float

    def hit(self, origin: Array, direction: Array) -> Hit:
        """Return where rays, [N, 3] each, meet the sphere, which has one face."""
        o = np.broadcast_to(origin - self.centre, direction.shape)
        a, b, c = (direction**2).sum(1), (o * direction).sum(1), (o**2).sum(1) - self.radius**2
        t = _nearer_root(a, b, c)
        normal = (o + np.where(np.isfinite(t), t, 0)[:, None] * direction) / self.radius
        longitude, latitude = np.arctan2(normal[:, 0], normal[:, 2]), np.arcsin(normal[:, 1].clip(-1, 1))
        uv = np.stack([longitude, latitude], axis=1) * self.radius
        return Hit(t, normal, uv, np.zeros(len(t), np.int64))


@dataclass(frozen=True)
class Cylinder:
    """An upright cylinder.

    Args:
        base: Middle of its lower end, [3], in metres.
        radius: Its radius, in metres.
        height: Its height, in metres.
    """

    base: Array
    radius: float
    height: float

    def hit(self, origin: Array, direction: Array) -> Hit:
        """Return where rays, [N, 3] each, meet the cylinder: face 0 is its side, and face 1 its upper end."""
        o, d = np.broadcast_to(origin - self.base, direction.shape), direction
        a, b = (d[:, [0, 2]] ** 2).sum(1), (o[:, [0, 2]] * d[:, [0, 2]]).sum(1)
        side = _nearer_root(np.maximum(a, 1e-12), b, (o[:, [0, 2]] ** 2).sum(1) - self.radius**2)
        y = o[:, 1] + np.where(np.isfinite(side), side, 0) * d[:, 1]
        side = np.where((y >= 0) & (y <= self.height), side, np.inf)
        top = (self.height - o[:, 1]) / np.where(np.abs(d[:, 1]) < 1e-12, 1e-12, d[:, 1])
        across = o[:, [0, 2]] + top[:, None] * d[:, [0, 2]]
        top = np.where((top > _EPSILON) & ((across**2).sum(1) <= self.radius**2), top, np.inf)
        is_top = top < side
        t = np.minimum(side, top)
        point = o + np.where(np.isfinite(t), t, 0)[:, None] * d
        around = point * [1, 0, 1] / self.radius
        angle = np.arctan2(point[:, 0], point[:, 2]) * self.radius
        normal = np.where(is_top[:, None], [0.0, 1.0, 0.0], around)
        uv = np.where(is_top[:, None], point[:, [0, 2]], np.stack([angle, point[:, 1]], axis=1))
        return Hit(t, normal, uv, is_top.astype(np.int64))


Shape = Box | Sphere | Cylinder


def _nearer_root(a: Array, b: Array, c: Array) -> Array:
    """Return the smaller positive root of a t² + 2 b t + c, infinite where there is none."""
    inner = b**2 - a * c
    root = np.sqrt(np.maximum(inner, 0))
    near, far = (-b - root) / a, (-b + root) / a
    t = np.where(near > _EPSILON, near, far)
    return np.where((inner >= 0) & (t > _EPSILON), t, np.inf)


def turned(yaw: float) -> Array:
    """Return the matrix whose columns are the axes of a frame that is turned about the vertical axis."""
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
