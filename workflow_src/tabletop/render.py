"""Images without OpenGL: MuJoCo casts the rays, numpy shades them.

One point light stands above the table at x = 0. Its shadow under the gripper tells one camera how high the gripper is.
During an episode only the gripper and the blocks move, so only pixels that they or their shadows may touch are cast
again; the result is bitwise that of casting all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import mujoco
import numpy as np

from workflow_src.tabletop.scene import MOVING_GROUP, STATIC_GROUP, STATIC_HEIGHT
from workflow_src.tabletop.simulator import load_model

CAMERA = np.array([0.0, -0.46, 0.44])
LOOK_AT = np.array([0.0, 0.030, 0.056])
FIELD_OF_VIEW = 35.0  # degrees, both directions
LIGHT = np.array([0.0, -0.20, 1.10])
AMBIENT, FILL, DIFFUSE = 0.36, 0.28, 0.46  # FILL: a lamp at the camera, which casts no visible shadow
BIAS = 0.002  # metres: a surface does not shadow itself
EVERYTHING, STILL = None, np.array([int(group == STATIC_GROUP) for group in range(6)], np.uint8)


@dataclass(frozen=True)
class _Rays:
    """Directions of all rays of an image, `(size² · supersample², 3)`, grouped by pixel, in the world frame."""

    directions: np.ndarray
    axes: np.ndarray  # rows: right, up, forward
    half: float  # tangent of half the field of view


@lru_cache
def _rays(size: int, supersample: int) -> _Rays:
    forward = (LOOK_AT - CAMERA) / np.linalg.norm(LOOK_AT - CAMERA)
    right = np.array([1.0, 0.0, 0.0])  # the camera looks along the mirror plane
    axes = np.stack([right, np.cross(right, forward), forward])
    half = np.tan(np.radians(FIELD_OF_VIEW / 2))
    n = size * supersample
    # Mirrored columns get bitwise mirrored directions.
    centres = (2 * np.arange(n) + 1 - n) / n * half
    y, x = np.meshgrid(-centres, centres, indexing="ij")
    grid = np.stack([x, y, np.ones_like(x)], -1).reshape(size, supersample, size, supersample, 3)
    directions = grid.transpose(0, 2, 1, 3, 4).reshape(-1, 3) @ axes
    return _Rays(np.ascontiguousarray(directions / np.linalg.norm(directions, axis=1, keepdims=True)), axes, half)


class Renderer:
    """Renders `size × size` images of one scene, averaging `supersample²` rays per pixel."""

    def __init__(self, scene: str, size: int, supersample: int = 2):
        self.model = load_model(scene)
        self.size, self.samples = size, supersample**2
        self.rays = _rays(size, supersample)
        self._colours = np.vstack([self.model.geom_rgba[:, :3], np.zeros(3)]).astype(np.float32) * 255
        moving = np.flatnonzero(self.model.geom_group == MOVING_GROUP)
        self._moving = moving
        # Half sizes of boxes; a cylinder (radius, half height) fits the box (radius, radius, half height).
        sizes = self.model.geom_size[moving].copy()
        cylinders = self.model.geom_type[moving] == mujoco.mjtGeom.mjGEOM_CYLINDER
        sizes[cylinders] = sizes[cylinders][:, [0, 0, 1]]
        signs = np.stack(np.meshgrid([-1, 1], [-1, 1], [-1, 1], indexing="ij"), -1).reshape(8, 3)
        self._corners = signs * sizes[:, None]
        self._background_key: bytes | None = None
        self._background = np.zeros((size * size, 3), np.uint8)

    def render(self, data: mujoco.MjData, full: bool = False) -> np.ndarray:
        """uint8 `(H, W, 3)` of the positions in `data`. `full` casts every ray: the tested reference."""
        if full:
            return self._shade(data, None, EVERYTHING).reshape(self.size, self.size, 3)
        key = data.mocap_pos.tobytes()
        if key != self._background_key:
            self._background, self._background_key = self._shade(data, None, STILL), key
        image = self._background.copy()
        pixels = self._touched(data)
        image[pixels] = self._shade(data, pixels, EVERYTHING)
        return image.reshape(self.size, self.size, 3)

    def _shade(self, data: mujoco.MjData, pixels: np.ndarray | None, groups: np.ndarray | None) -> np.ndarray:
        """uint8 colours `(P, 3)` of these pixels (all: None), seeing only geoms of `groups`."""
        rays = self.rays.directions
        if pixels is not None:
            rays = rays.reshape(-1, self.samples, 3)[pixels].reshape(-1, 3)
        geoms, distances, normals = self._cast(data, CAMERA, rays, groups, normals=True)
        hits = CAMERA + rays * distances[:, None]
        to_hits = hits - LIGHT
        length = np.sqrt(np.einsum("ij,ij->i", to_hits, to_hits))
        # Rays of length 1 = the way from the light to the hit point.
        reach = self._cast(data, LIGHT, to_hits, groups)[1]
        lit = reach * length >= length - BIAS
        lambert = np.maximum(-np.einsum("ij,ij->i", normals, to_hits) / length, 0.0)
        facing = np.maximum(-np.einsum("ij,ij->i", normals, rays), 0.0)
        brightness = (AMBIENT + FILL * facing + DIFFUSE * lambert * lit).astype(np.float32)
        colours = self._colours[geoms] * brightness[:, None]
        # Saturate before averaging, as a camera's pixel would after; +0.5 rounds.
        mean = np.minimum(colours, 255).reshape(-1, self.samples, 3).mean(1)
        return (mean + 0.5).astype(np.uint8)

    def _cast(self, data, origin, directions, groups, normals: bool = False):
        count = len(directions)
        geoms, distances = np.empty((count, 1), np.int32), np.empty((count, 1))
        found = np.empty((count * 3, 1)) if normals else None
        mujoco.mj_multiRay(
            self.model, data, origin[:, None], np.ascontiguousarray(directions).reshape(-1, 1), groups, 1, -1,
            geoms, distances, found, count, mujoco.mjMAXVAL,
        )  # fmt: skip
        # A ray into the void has distance -1.
        return geoms[:, 0], distances[:, 0], None if found is None else found.reshape(-1, 3)

    def _touched(self, data: mujoco.MjData) -> np.ndarray:
        """Indices of the pixels that a moving geom or its shadow may touch."""
        rotations = data.geom_xmat[self._moving].reshape(-1, 1, 3, 3)
        corners = (rotations @ self._corners[..., None])[..., 0] + data.geom_xpos[self._moving][:, None]
        # Where the light carries the corners to the table, and to the top of whatever stands on it: shadows fall
        # between.
        down = corners - LIGHT
        shadows = [LIGHT + down * ((z - LIGHT[2]) / down[..., 2:]) for z in (0.0, STATIC_HEIGHT)]
        boxes = np.stack([self._box(corners), self._box(np.concatenate(shadows, 1))]).reshape(-1, 4)
        mask = np.zeros((self.size, self.size), bool)
        for left, right, top, bottom in boxes.tolist():
            mask[top:bottom, left:right] = True
        return np.flatnonzero(mask)

    def _box(self, points: np.ndarray) -> np.ndarray:
        """Pixel bounds `(G, [left, right, top, bottom])`, right and bottom excluded, of points `(G, K, 3)`."""
        seen = (points - CAMERA) @ self.rays.axes.T
        flat = seen[..., :2] / (seen[..., 2:] * self.rays.half)
        columns = (flat[..., 0] + 1) * (self.size / 2)
        rows = (1 - flat[..., 1]) * (self.size / 2)
        bounds = np.stack([columns.min(1), columns.max(1) + 1, rows.min(1), rows.max(1) + 1], -1)
        return np.clip(np.floor(bounds), 0, self.size).astype(int)
