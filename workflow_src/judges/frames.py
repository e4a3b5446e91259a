"""Which frames of a video a vision-language model is shown, and how they travel."""

from __future__ import annotations

import base64
import hashlib
import io

import numpy as np

QUALITY = 92  # of the JPEG; with full colour resolution, because coloured blocks are a few pixels wide


def shown(length: int, between: int) -> list[int]:
    """Indices of the frames to show of `length`: the first, the last, and up to `between` evenly spaced between them."""
    return sorted(set(np.linspace(0, length - 1, between + 2).round().astype(int).tolist()))


def data_url(frame: np.ndarray, side: int) -> str:
    """A uint8 (H, W, 3) frame as a JPEG data address, its longer side scaled to `side` pixels (0: as it is)."""
    from PIL import Image

    image = Image.fromarray(frame)
    if side and max(image.size) != side:
        scale = side / max(image.size)
        size = tuple(max(1, round(edge * scale)) for edge in image.size)
        image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=QUALITY, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def fingerprint(frames: np.ndarray) -> str:
    """SHA-256 of uint8 (N, H, W, 3) frames as stored: unlike their JPEG, it is the same with every image library."""
    return hashlib.sha256(f"{frames.shape}".encode() + np.ascontiguousarray(frames).tobytes()).hexdigest()
