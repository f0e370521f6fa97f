"""What stands in the metadata of an Arrow file, read without the Arrow library: nothing is allocated or run for it.

Only as much of the format as the checks need: the length of a message, of its body, and of each compressed buffer.
Arrow columnar format, "Serialization and Interprocess Communication".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from io import BufferedIOBase

from lepton_ray.errors import UsageError

_CONTINUES = b"\xff\xff\xff\xff"
_DICTIONARY, _BATCH = 2, 3


@dataclass(frozen=True)
class Message:
    """One message of a stream."""

    metadata: bytes
    unpacked: int
    """Bytes that its body says it takes in memory."""


def next_message(stream: BufferedIOBase, size: int, most: int, where: str) -> Message | None:
    """The message at the stream's place, which moves behind its body; None at the end.

    Raises UsageError where the bytes are no message.
    """
    head = stream.read(4)
    if head == _CONTINUES:
        head = stream.read(4)
    length = int.from_bytes(head, "little")
    if length == 0:
        return None
    place = stream.tell()
    if len(head) < 4 or length > min(most, size - place):
        raise UsageError(f"{where}: no Arrow file or stream, or the end of one is missing; write it again")
    metadata = stream.read(length)
    body = place + length
    try:
        kind, header, body_length = _message(metadata)
        if not 0 <= body_length <= size - body:
            raise UsageError(
                f"{where}: a batch of {body_length} bytes with {size - body} left in the file; it is cut short"
            )
        unpacked = body_length if kind in (_DICTIONARY, _BATCH) else 0
        for offset, count in _packed_buffers(metadata, kind, header):
            if not 0 <= offset <= body_length - count:
                raise UsageError(f"{where}: a buffer lies outside its batch; the file is damaged")
            stream.seek(body + offset)
            unpacked += max(0, int.from_bytes(stream.read(8), "little", signed=True))
    except struct.error as error:
        raise UsageError(f"{where}: no Arrow file or stream; its metadata cannot be read") from error
    stream.seek(body + body_length)
    return Message(metadata, unpacked)


def _message(data: bytes) -> tuple[int, int, int]:
    """Kind, place of the header, and length of the body."""
    root = struct.unpack_from("<I", data)[0]
    kind = _field(data, root, 1)
    header = _field(data, root, 2)
    body = _field(data, root, 3)
    return (
        data[kind] if 0 < kind < len(data) else 0,
        header + struct.unpack_from("<I", data, header)[0] if header else 0,
        struct.unpack_from("<q", data, body)[0] if body else 0,
    )


def _packed_buffers(data: bytes, kind: int, header: int) -> list[tuple[int, int]]:
    """Place and length of each compressed buffer in the body of a batch."""
    if kind not in (_DICTIONARY, _BATCH) or not header:
        return []
    if kind == _DICTIONARY:
        inner = _field(data, header, 1)
        if not inner:
            return []
        header = inner + struct.unpack_from("<I", data, inner)[0]
    buffers = _field(data, header, 2)
    if not buffers or not _field(data, header, 3):
        return []
    place = buffers + struct.unpack_from("<I", data, buffers)[0]
    count = struct.unpack_from("<I", data, place)[0]
    if count * 16 > len(data):
        raise struct.error("more buffers than the metadata has room for")
    found = [struct.unpack_from("<qq", data, place + 4 + 16 * index) for index in range(count)]
    return [(offset, length) for offset, length in found if length >= 8]


def _field(data: bytes, table: int, index: int) -> int:
    """Place of a field of a flatbuffer's table; 0 where it is not there."""
    entries = table - struct.unpack_from("<i", data, table)[0]
    if entries < 0:
        raise struct.error("a table outside the metadata")
    size = struct.unpack_from("<H", data, entries)[0]
    if 4 + 2 * index >= size:
        return 0
    offset: int = struct.unpack_from("<H", data, entries + 4 + 2 * index)[0]
    return table + offset if offset else 0
