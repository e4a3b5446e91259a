"""TFRecord files without TensorFlow: framing and checksums.

A record is: its length (uint64, little endian), the length's masked CRC-32C, the payload, the payload's masked CRC-32C
(https://www.tensorflow.org/tutorials/load_data/tfrecord).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

MASK = 0xA282EAD8


@dataclass(frozen=True)
class Record:
    """Record `number` of a file: its `payload`, or what is `wrong` with it. `end`: bytes up to and with it."""

    number: int
    end: int
    payload: bytes = b""
    wrong: str = ""


def masked_crc(data: bytes) -> int:
    """CRC-32C of `data` as TFRecord stores it: rotated right by 15 bits, plus a constant."""
    import google_crc32c

    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + MASK) & 0xFFFFFFFF


def read_records(path: str | Path) -> Iterator[Record]:
    """The records of a file, one in memory at a time.

    A payload with a wrong checksum is skipped: one record that says what is `wrong`. Behind a damaged length nothing can
    be found: the last record says so.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        number = end = 0
        while header := file.read(12):
            wrong = ""
            if len(header) < 12:
                wrong = f"the file ends within a record's length, at byte {end}"
            else:
                length, crc = struct.unpack("<QI", header)
                if masked_crc(header[:8]) != crc:
                    wrong = f"the record's length is damaged, at byte {end}; nothing behind it can be read"
                elif end + length + 16 > size:
                    wrong = f"the file ends within the record that begins at byte {end}"
            if wrong:
                yield Record(number, size, wrong=wrong)
                return
            payload, (crc,) = file.read(length), struct.unpack("<I", file.read(4))
            end += length + 16
            damaged = masked_crc(payload) != crc
            yield Record(number, end, b"" if damaged else payload, "the record's checksum is wrong" if damaged else "")
            number += 1


def write_records(path: str | Path, payloads: Iterable[bytes]) -> None:
    """Write a TFRecord file."""
    with open(path, "wb") as file:
        for payload in payloads:
            length = struct.pack("<Q", len(payload))
            file.write(
                length + struct.pack("<I", masked_crc(length)) + payload + struct.pack("<I", masked_crc(payload))
            )
