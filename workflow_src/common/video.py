"""Short videos on disk: lossless where judges and training shall see the very pixels that were rendered."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from workflow_src.common.errors import UserError
from workflow_src.common.files import atomic_path

LOSSLESS = {"qp": "0", "preset": "ultrafast"}
LOSSY = {"crf": "18", "preset": "veryfast", "x264-params": "rc-lookahead=0:mbtree=0"}


def write_video(path: str | Path, frames: np.ndarray, fps: float, lossless: bool = True, keyframes: int = 0) -> None:
    """Write uint8 `(T, H, W, 3)` RGB frames as an H.264 mp4.

    `lossless` stores RGB exactly (4:4:4, quantiser 0). Otherwise yuv420p, which every browser plays; height and width must
    then be even. At least every `keyframes`-th frame can be decoded without others; 0: the encoder's choice. One encoder
    thread and no look-ahead (which now and then decides otherwise on small frames): the bytes are the same on every run.
    """
    import av

    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise ValueError(f"frames must be uint8 (T>0, H, W, 3), got {frames.dtype} {frames.shape}")
    with atomic_path(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        options = LOSSLESS if lossless else LOSSY
        if keyframes:
            options = {**options, "g": str(keyframes), "bf": "0"}
        codec = "libx264rgb" if lossless else "libx264"
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1000), options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "rgb24" if lossless else "yuv420p"
        stream.codec_context.thread_count = 1
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode())


def read_video(path: str | Path) -> np.ndarray:
    """All frames of a video as uint8 `(T, H, W, 3)` RGB. Raises `UserError` naming a missing or damaged file."""
    import av

    try:
        with av.open(str(path)) as container:
            container.streams.video[0].codec_context.thread_count = 1
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (av.FFmpegError, IndexError, OSError) as error:
        raise UserError(f"{path}: not a readable video ({error}); delete it and run again") from error
    if not frames:
        raise UserError(f"{path}: holds no frame; delete it and run again")
    return np.stack(frames)


def read_frames(path: str | Path, numbers: Sequence[int]) -> np.ndarray:
    """The frames numbered `numbers`, in that order, as uint8 `(n, H, W, 3)` RGB: those that `read_video` gives, bit by bit.

    Only what lies between the keyframe before the first of them and the last of them is decoded. Raises `UserError` naming
    a missing or damaged file, or one that has no such frame.
    """
    import av

    found: dict[int, np.ndarray] = {}
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            # Without seeking, whose precision depends on the container: packets are small, it is decoding that costs.
            packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
            shown = sorted(packet.pts for packet in packets)
            wanted = {shown[number]: int(number) for number in numbers if 0 <= number < len(shown)}
            keys = [place for place, packet in enumerate(packets)
                    if packet.is_keyframe and packet.pts <= min(wanted, default=0)]  # fmt: skip
            for packet in [*packets[max(keys, default=0) :], None]:  # None: what the decoder still holds back
                for frame in stream.decode(packet):
                    if frame.pts in wanted:
                        found[wanted[frame.pts]] = frame.to_ndarray(format="rgb24")
                if len(found) == len(wanted):
                    break
    except (av.FFmpegError, IndexError, TypeError, OSError) as error:
        raise UserError(f"{path}: not a readable video ({error}); delete it and run again") from error
    missing = [int(number) for number in numbers if int(number) not in found]
    if missing:
        raise UserError(f"{path}: frame {missing[0]} cannot be read, of {len(shown)}; delete it and run again")
    return np.stack([found[int(number)] for number in numbers])


def probe_video(path: str | Path) -> tuple[int, int, int]:
    """Number of frames, height and width, without decoding. Raises `UserError` naming a missing or damaged file."""
    import av

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frames = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
            return frames, stream.height, stream.width
    except (av.FFmpegError, IndexError, OSError) as error:
        raise UserError(f"{path}: not a readable video ({error}); delete it and run again") from error


def frame_times(path: str | Path) -> np.ndarray:
    """When each frame is shown, float64 seconds (T,), in the order of `read_video`. Raises `UserError` as it does."""
    import av

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            shown = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
            return np.sort(np.array(shown, np.float64)) * float(stream.time_base)
    except (av.FFmpegError, IndexError, TypeError, OSError) as error:
        raise UserError(f"{path}: not a readable video ({error}); delete it and run again") from error


def enlarge(clip: np.ndarray, height: int) -> np.ndarray:
    """Scale uint8 `(T, h, w, 3)` frames smoothly by a whole factor (at least 1) to at most `height`; crop to even."""
    from PIL import Image

    factor = max(1, height // clip.shape[1])
    size = (clip.shape[2] * factor, clip.shape[1] * factor)
    scaled = np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)) for frame in clip])
    return scaled[:, : size[1] // 2 * 2, : size[0] // 2 * 2]


def write_gif(path: str | Path, frames: np.ndarray, fps: float, scale: int = 1) -> None:
    """Write uint8 `(T, H, W, 3)` frames as an endless GIF, each pixel enlarged `scale` times."""
    import imageio.v3 as imageio

    enlarged = frames.repeat(scale, axis=1).repeat(scale, axis=2)
    with atomic_path(path) as temporary:
        imageio.imwrite(temporary, enlarged, plugin="pillow", extension=".gif", duration=round(1000 / fps), loop=0)
