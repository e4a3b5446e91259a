"""Photographs as first frames: any picture a camera or a phone writes, upright, RGB, 8 bits, at the world model's size."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from workflow_src.common.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg")
Fit = Literal["as_is", "letterbox", "crop", "stretch"]
BACKGROUND = (255, 255, 255)  # behind transparent pixels


def read_picture(path: Path) -> np.ndarray:
    """uint8 (H, W, 3): turned as its EXIF says, transparency over white, 16 bits scaled to 8.

    Raises `UserError` that names a file that is no picture.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(_rgb(ImageOps.exif_transpose(image)))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is not a readable image ({error})") from None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow clips what is above 255 instead of scaling it.
        return Image.fromarray(np.uint8(np.clip(np.asarray(image, np.int64) // 257, 0, 255))).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        below = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        return Image.alpha_composite(below, image).convert("RGB")
    return image.convert("RGB")


def fit(image: np.ndarray, size: int, how: Fit) -> np.ndarray:
    """uint8 (H, W, 3) as a square of `size` pixels, resized by Lanczos-3 with antialiasing.

    `letterbox`: all of it, black bars beside it; `crop`: the largest square in the middle; `stretch`: distorted, as the
    converters of BridgeData V2 made 256x256 of 640x480. `as_is` changes nothing.
    """
    if how == "as_is":
        return image
    height, width = image.shape[:2]
    picture = Image.fromarray(image)
    if how == "crop":
        side = min(height, width)
        left, top = (width - side) // 2, (height - side) // 2
        picture = picture.crop((left, top, left + side, top + side))
    elif how == "letterbox":
        side = max(height, width)
        square = Image.new("RGB", (side, side))
        square.paste(picture, ((side - width) // 2, (side - height) // 2))
        picture = square
    if picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(picture)
