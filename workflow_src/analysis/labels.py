"""Names beside points in a scatter plot, placed so that they cover neither each other nor the points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Places tried for every label: directions, the preferred first, by gaps between marker and text (points).
ANGLES = np.deg2rad([0, 180, 30, -30, 150, -150, 90, -90, 60, -60, 120, -120, 15, -15, 165, -165])
GAPS = (9, 15, 24, 36, 52, 72)
# Points of free space that a marker, a line and a text need around them.
RADIUS, LINE, MARGIN = 7, 2, 2
# A gap above this gets a leader line.
LEADER = 15
# Labels are placed one after the other, then moved again in the light of the others.
SWEEPS = 4


def place_labels(
    axes: Axes, points: np.ndarray, names: Sequence[str], lines: np.ndarray, fontsize: float = 9.5
) -> None:
    """Write `names` beside `points (n, 2)` (data coordinates), clear of level or upright `lines (m, 2, 2)`.

    Each label takes the place with the least overlap with markers, lines, the frame and other texts, near its own point
    and not nearer to another. The same input gives the same picture. Call it last, on axes with final limits.
    """
    figure = axes.figure
    figure.draw_without_rendering()
    renderer, scale = figure.canvas.get_renderer(), figure.dpi / 72
    texts = [axes.text(*point, name, fontsize=fontsize, ha="center", va="center", zorder=5)
             for point, name in zip(points, names)]  # fmt: skip
    sizes = np.array([(box.width, box.height) for box in (text.get_window_extent(renderer) for text in texts)])
    pixels, ends = axes.transData.transform(points), axes.transData.transform(lines.reshape(-1, 2)).reshape(-1, 4)
    fixed = [np.concatenate([pixels - RADIUS * scale, pixels + RADIUS * scale], 1)]
    fixed.append(ends + np.array([-1, -1, 1, 1]) * LINE * scale)
    others = [artist for artist in (*axes.texts, axes.get_legend()) if artist is not None and artist not in texts]
    fixed.append(np.array([artist.get_window_extent(renderer).extents for artist in others]).reshape(-1, 4))
    centres = _arrange(pixels, sizes + 2 * MARGIN * scale, np.concatenate(fixed), axes.bbox.extents, scale)
    for text, pixel, centre, size in zip(texts, pixels, centres, sizes):
        text.set_position(axes.transData.inverted().transform(centre))
        # The leader ends at the nearest point of the text's box.
        edge = np.clip(pixel, centre - size / 2, centre + size / 2)
        if np.hypot(*(edge - pixel)) > LEADER * scale:
            ends = axes.transData.inverted().transform([pixel, edge])
            axes.plot(*ends.T, color="#888888", linewidth=0.7, zorder=3)


def _arrange(pixels: np.ndarray, sizes: np.ndarray, fixed: np.ndarray, frame: np.ndarray, scale: float) -> np.ndarray:
    """Centres `(n, 2)` of the labels, in pixels."""
    crowd = (1 / (np.hypot(*(pixels[:, None] - pixels[None]).transpose(2, 0, 1)) + 20)).sum(1)
    boxes = np.full((len(pixels), 4), np.nan)
    for _ in range(SWEEPS):
        for i in np.argsort(-crowd, kind="stable"):
            taken = np.concatenate([fixed, np.delete(boxes, i, 0)])
            taken = taken[~np.isnan(taken).any(1)]
            candidates, cost = _candidates(pixels[i], sizes[i], scale)
            cost = cost + _overlap(candidates, taken).sum(1)
            cost += 3 * (sizes[i].prod() - _overlap(candidates, frame[None]).sum(1))
            nearest = np.stack([_distance(candidates, pixel) for pixel in pixels], 1)
            cost += 0.5 * sizes[i].prod() * (nearest[:, i] > nearest.min(1) + 1)
            boxes[i] = candidates[cost.argmin()]
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def _candidates(pixel: np.ndarray, size: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Boxes `(c, 4)` around `pixel` and what each costs for being far, in square pixels like overlaps."""
    gaps, angles = (grid.ravel() for grid in np.meshgrid(GAPS, ANGLES, indexing="ij"))
    direction = np.stack([np.cos(angles), np.sin(angles)], 1)
    # A text is centred on its place, so its own half size in that direction comes on top of the gap.
    centre = pixel + direction * (gaps[:, None] * scale + np.abs(direction) * size / 2)
    preference = np.tile(np.arange(len(ANGLES)), len(GAPS))
    return np.concatenate([centre - size / 2, centre + size / 2], 1), (gaps * scale * 0.15 + preference * 0.1) * size[1]


def _overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Areas `(c, m)` shared by boxes `(c, 4)` and `(m, 4)`."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    return np.clip(high - low, 0, None).prod(-1)


def _distance(boxes: np.ndarray, pixel: np.ndarray) -> np.ndarray:
    return np.hypot(*(np.clip(pixel, boxes[:, :2], boxes[:, 2:]) - pixel).T)
