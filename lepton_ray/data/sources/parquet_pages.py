"""How long a text of a Parquet column can be, told before rows are decoded: the dictionary page says it.

A page begins with a header in Thrift's compact protocol, of which the first three fields are read here: kind, unpacked
and packed length. Apache Parquet format, "Data Pages" and "Plain encoding".
"""

from __future__ import annotations

from io import BufferedIOBase

import pyarrow as pa
import pyarrow.parquet as pq

_CODECS = {"SNAPPY": "snappy", "GZIP": "gzip", "ZSTD": "zstd", "BROTLI": "brotli", "LZ4_RAW": "lz4_raw"}
_SMALL_BYTES = 16_384
"""A dictionary of fewer bytes cannot make much of any number of rows."""
_HEADER_BYTES = 64


def longest_text(column: pq.ColumnChunkMetaData, stream: BufferedIOBase) -> int:
    """Bytes of the longest text that stands for others in a column chunk, or an upper bound; 0 where none does.

    Args:
        column: of byte arrays.
        stream: the file; its place changes.
    """
    unpacked = int(column.total_uncompressed_size)
    if "DELTA_BYTE_ARRAY" in column.encodings:  # each value may be all of the one before it
        return unpacked
    if not column.has_dictionary_page or unpacked <= _SMALL_BYTES:
        return 0
    try:
        return _longest_in_dictionary(column, stream)
    except (IndexError, ValueError, OSError):  # no page as we know them: the reader will say so
        return unpacked


def _longest_in_dictionary(column: pq.ColumnChunkMetaData, stream: BufferedIOBase) -> int:
    stream.seek(column.dictionary_page_offset)
    head = stream.read(_HEADER_BYTES)
    place, sizes = 0, []
    for _ in range(3):
        if head[place] != 0x15:  # the next field, a 32-bit number
            raise ValueError("unknown page header")
        number, place = _number(head, place + 1)
        sizes.append(number)
    _, unpacked, packed = sizes
    total = int(column.total_uncompressed_size)
    if not 0 <= unpacked <= total or not 0 <= packed <= int(column.total_compressed_size):
        return total
    if unpacked <= _SMALL_BYTES:
        return unpacked
    # the header goes on with fields of its own; the data page's offset tells where the page ends
    stream.seek(column.data_page_offset - packed)
    data = stream.read(packed)
    if column.compression != "UNCOMPRESSED":
        if column.compression not in _CODECS:
            return unpacked
        data = pa.Codec(_CODECS[column.compression]).decompress(data, unpacked, asbytes=True)
    longest, at = 0, 0
    while at + 4 <= len(data):
        length = int.from_bytes(data[at : at + 4], "little")
        longest = max(longest, length)
        at += 4 + length
    return min(longest, unpacked)


def _number(data: bytes, place: int) -> tuple[int, int]:
    """A number of variable length, and the place behind it."""
    value, shift = 0, 0
    while True:
        value |= (data[place] & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if not data[place - 1] & 0x80:
            return (value >> 1) ^ -(value & 1), place
