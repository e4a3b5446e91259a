"""Images as the published policies' own code prepares them. uint8 (H, W, 3) in.

Sizes and filters are part of a policy: it was trained on exactly these pixels.
"""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image


def lanczos(image: np.ndarray, size: int) -> np.ndarray:
    """Resized to uint8 (size, size, 3) by Lanczos-3 with antialiasing, as `tf.image.resize(…, "lanczos3", antialias=True)`.

    Pillow rounds its weights: single values differ by 1.
    """
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS))


def jpeg(image: np.ndarray) -> np.ndarray:
    """As it comes back from a JPEG of quality 95 with halved chroma (`tf.image.encode_jpeg`'s defaults); same shape."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=95, subsampling="4:2:0")
    return np.asarray(Image.open(buffer))


def pad(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 (size, size, 3): bilinear with antialiasing, black bars beside it, as `openpi_client.image_tools` does."""
    height, width = image.shape[:2]
    ratio = max(height, width) / size
    inner = int(width / ratio), int(height / ratio)
    square = Image.new("RGB", (size, size))
    resized = Image.fromarray(image).resize(inner, Image.Resampling.BILINEAR)
    square.paste(resized, (max(0, (size - inner[0]) // 2), max(0, (size - inner[1]) // 2)))
    return np.asarray(square)


def bilinear(image: np.ndarray, size: int) -> np.ndarray:
    """Resized to float32 (size, size, 3), 0 to 255, bilinear without antialiasing, as `tf.image.resize`'s default."""
    rows, columns = (_bilinear_weights(length, size) for length in image.shape[:2])
    return np.einsum("yh,hwc,xw->yxc", rows, image.astype(np.float32), columns, optimize=True)


def area(image: np.ndarray, size: int) -> np.ndarray:
    """Resized to uint8 (size, size, 3); each pixel is the mean of the area it covers, as OpenCV's INTER_AREA shrinks."""
    rows, columns = (_area_weights(length, size) for length in image.shape[:2])
    mean = np.einsum("yh,hwc,xw->yxc", rows, image.astype(np.float32), columns, optimize=True)
    return np.clip(np.rint(mean), 0, 255).astype(np.uint8)


@functools.cache
def _bilinear_weights(length: int, size: int) -> np.ndarray:
    """(size, length): shares of the old pixels in each new one; pixel centres lie at half-integers."""
    place = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
    return np.maximum(0, 1 - np.abs(place[:, None] - np.arange(length))).astype(np.float32)


@functools.cache
def _area_weights(length: int, size: int) -> np.ndarray:
    """(size, length): the part of each new pixel that each old one covers. Where nothing shrinks: bilinear, like OpenCV."""
    if length < size:
        return _bilinear_weights(length, size)
    edges = np.arange(size + 1) * length / size
    old = np.arange(length)
    covered = np.minimum(edges[1:, None], old + 1) - np.maximum(edges[:-1, None], old)
    return (np.maximum(0, covered) * size / length).astype(np.float32)
