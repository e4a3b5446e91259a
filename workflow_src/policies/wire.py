"""What rollouts and policy servers say to each other: openpi's msgpack with arrays, and a server's first message.

The format is openpi's (`openpi-client` 0.1.2): an array is a map with the byte-string keys `__ndarray__`, `data`,
`dtype`, `shape`, a numpy scalar one with `__npgeneric__`, `data`, `dtype`; nothing is ever pickled. The first message
of a server is its metadata; then observation and reply alternate; a text frame carries a traceback.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np

from workflow_src.common.errors import UserError
from workflow_src.common.files import digest

MAX_MESSAGE = 256 * 2**20  # bytes; a batch of 256 images of 512 x 512 pixels is 192 MiB
ARRAY_KINDS = "biufSU"  # booleans, integers, floats, fixed-width text; never objects, records or complex numbers


class WireError(UserError):
    """A message that is not in the format above."""


def pack(message: Any) -> bytes:
    """Encodes nested dicts, lists, strings, numbers and numpy arrays.

    Raises WireError on anything else or above MAX_MESSAGE.
    """
    try:
        data = msgpack.packb(message, default=_encode)
    except (TypeError, ValueError, OverflowError) as problem:
        raise WireError(f"message cannot be sent: {problem}") from None
    if len(data) > MAX_MESSAGE:
        raise WireError(
            f"message of {len(data)} bytes is above the limit of {MAX_MESSAGE}: send smaller images or batches"
        )
    return data


def unpack(data: bytes) -> Any:
    """Decodes what `pack` or openpi's packer made; arrays come back writable.

    Raises WireError on anything malformed.
    """
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise WireError(f"expected a binary message, got {type(data).__name__}")
    if len(data) > MAX_MESSAGE:
        raise WireError(f"message of {len(data)} bytes is above the limit of {MAX_MESSAGE}")
    try:
        return msgpack.unpackb(data, object_hook=_decode)
    except WireError:
        raise
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as problem:
        raise WireError(f"malformed message: {type(problem).__name__}: {problem}") from None


def _encode(value: Any) -> dict[bytes, Any]:
    if not isinstance(value, (np.ndarray, np.generic)):
        raise TypeError(f"a {type(value).__name__} has no wire format")
    if value.dtype.kind not in ARRAY_KINDS:
        raise TypeError(f"arrays of dtype {value.dtype} have no wire format")
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}


def _decode(mapping: dict) -> Any:
    if b"__ndarray__" in mapping:
        return _array(mapping)
    if b"__npgeneric__" in mapping:
        try:
            return _dtype(mapping.get(b"dtype")).type(mapping[b"data"])
        except (KeyError, TypeError, ValueError, OverflowError) as problem:
            raise WireError(f"malformed scalar: {problem}") from None
    return mapping


def _array(mapping: dict) -> np.ndarray:
    dtype = _dtype(mapping.get(b"dtype"))
    data, shape = mapping.get(b"data"), mapping.get(b"shape")
    if not isinstance(data, bytes) or not isinstance(shape, (list, tuple)):
        raise WireError("malformed array: `data` must be bytes and `shape` a list")
    if any(not isinstance(size, int) or isinstance(size, bool) or size < 0 for size in shape):
        raise WireError(f"malformed array: shape {list(shape)}")
    expected = dtype.itemsize
    for size in shape:
        expected *= size
    if expected != len(data):
        raise WireError(f"malformed array: {len(data)} bytes do not fill shape {list(shape)} of {dtype}")
    # Received buffers are read-only; frameworks (torch above all) want to own and write theirs.
    return np.ndarray(tuple(shape), dtype=dtype, buffer=bytearray(data)) if data else np.empty(tuple(shape), dtype)


def _dtype(name: Any) -> np.dtype:
    try:
        dtype = np.dtype(name if isinstance(name, str) else "")
    except TypeError:
        raise WireError(f"malformed array: unknown dtype {name!r}") from None
    if not isinstance(name, str) or dtype.kind not in ARRAY_KINDS or dtype.fields or dtype.shape:
        raise WireError(f"malformed array: dtype {name!r} is not allowed")
    return dtype


@dataclass(frozen=True)
class Metadata:
    """A server's first message.

    A foreign openpi server sends its own keys: they end up in `extra`, and it counts as unbatched.
    """

    name: str = ""  # policy name
    units: str = "metric"  # metres and radians per control step
    control_rate: float = 0.0  # Hz the policy was trained at; 0: unknown
    chunk: int = 0  # actions per answer; 0: unknown, any number is accepted
    execution: str = "all"  # of a chunk: `all`, `first`, or `ensemble` of overlapping ones; see rollouts/loop.py
    ensemble: float = 0.0  # m of an ensemble's weights exp(-m i), i = 0 the oldest; 0: plain mean
    history: int = 1  # observations the policy looks back on
    gripper: str = "open_fraction"  # convention of the seventh number: 1 open, 0 closed
    batched: bool = False  # takes (N, ...) observations
    batch: int = 1  # rows the network runs at; other counts are padded or split
    image_size: int = 0  # pixels, square; 0: any size is accepted
    revision: str = ""  # what is served: digest of weights and options
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)  # keys this class does not know

    def to_wire(self) -> dict[str, Any]:
        """The message, flat."""
        fields = dataclasses.asdict(self)
        return {**fields.pop("extra"), **fields}

    @classmethod
    def from_wire(cls, message: Any) -> Metadata:
        """Reads a first message. Unknown keys and keys of another type (a foreign server's) are kept in `extra`."""
        if not isinstance(message, dict):
            raise WireError(f"first message must be the metadata (a map), got {type(message).__name__}")
        known, extra = {}, {}
        defaults = {f.name: f.default for f in dataclasses.fields(cls) if f.name != "extra"}
        for key, value in message.items():
            wanted = type(defaults[key]) if key in defaults else None
            if wanted is float and type(value) is int:
                value = float(value)
            (known if type(value) is wanted else extra)[str(key)] = value
        return cls(**known, extra=extra)

    def digest(self) -> str:
        """16 hex digits over everything the server said about itself."""
        return digest(_plain(self.to_wire()))


def _plain(value: Any) -> Any:
    """JSON-able form: a foreign server's metadata may hold arrays and byte strings."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)
