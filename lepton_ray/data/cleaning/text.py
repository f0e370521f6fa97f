"""Text in one form: Unicode normal form, control characters, HTML and white space, over Arrow arrays.

Why not a library: the standard library does the work on one value (`unicodedata`, `html`); what is ours is to find,
over the bytes of a whole column at once, the few values that need it. Text that is plain ASCII already costs a look-up
per byte and no Python.
"""

from __future__ import annotations

import html
import re
import unicodedata
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lepton_ray.settings.cleaning import Normalise

Mask = npt.NDArray[np.bool_]

_TAG = re.compile(r"<(?:[a-zA-Z/!?][^<>]*)>")
_HIDDEN = re.compile(r"<(script|style)\b[^<>]*>", re.IGNORECASE)
_CONTROL: dict[int, str | None] = dict.fromkeys((*range(32), *range(127, 160))) | dict.fromkeys(
    (9, 10, 11, 12, 13, 0x85), " "
)
"""Nothing for a control character, a space for one that separates."""
_MAX_ROUNDS = 100
"""Each round that changes a value takes one level of entities off it; nobody means more than this."""


def normalise(values: pa.Array, how: Normalise) -> tuple[pa.Array, Mask]:
    """The values in the form asked for, and which of them it changed.

    Args:
        values: strings; nulls stay null.
        how: the form.

    Doing it again changes nothing.
    """
    odd = _odd(values, how)
    changed = np.zeros(len(values), bool)
    if not odd.any():
        return values, changed
    coded = values.filter(pa.array(odd)).dictionary_encode()
    before = coded.dictionary.to_pylist()
    after = pa.array([normalised(text, how) for text in before], values.type)
    differs = np.array([one != other for one, other in zip(before, after.to_pylist(), strict=True)], bool)
    codes = coded.indices.to_numpy(zero_copy_only=False)
    changed[odd] = differs[codes]
    if not changed.any():
        return values, changed
    return pc.replace_with_mask(values, pa.array(odd), after.take(coded.indices)), changed


def normalised(text: str, how: Normalise) -> str:
    """One value in the form asked for."""
    for _ in range(_MAX_ROUNDS):
        before, text = text, _once(text, how)
        if text == before:
            break
    return text


def _once(text: str, how: Normalise) -> str:
    if how.html and ("<" in text or "&" in text):
        text = html.unescape(_TAG.sub(" ", _without_hidden(text)))
    if how.unicode:
        form: Literal["NFC", "NFKC"] = how.unicode
        text = unicodedata.normalize(form, text)
    if how.control and not text.isprintable():
        text = text.translate(_CONTROL)
    if how.whitespace:
        text = " ".join(text.split())
    return text.lower() if how.case == "lower" else text.upper() if how.case == "upper" else text


def _without_hidden(text: str) -> str:
    """Without scripts and style sheets, whose text nobody reads."""
    pieces, start = [], 0
    folded = text.lower() if "<" in text else ""
    while (found := _HIDDEN.search(text, start)) is not None:
        end = folded.find(f"</{found[1].lower()}", found.end()) if len(folded) == len(text) else -1
        if end < 0:
            break
        pieces.append(text[start : found.start()])
        start = end
    return " ".join([*pieces, text[start:]])


def _odd(values: pa.Array, how: Normalise) -> Mask:
    """Values that may need work: everything but plain ASCII that already has the form."""
    wide = values.cast(pa.large_binary())
    offsets = np.frombuffer(wide.buffers()[1], np.int64)[wide.offset : wide.offset + len(wide) + 1]
    odd = np.zeros(len(values), bool)
    if wide.buffers()[2] is None or len(values) == 0:
        return odd
    first = int(offsets[0])
    data = np.frombuffer(wide.buffers()[2], np.uint8)[first : int(offsets[-1])]
    if len(data) == 0:
        return odd
    # comparisons of bytes, which the processor does dozens at a time; all but printable ASCII is worth a look
    suspicious = (data - np.uint8(32)) >= 95
    if how.html:
        suspicious |= (data == ord("<")) | (data == ord("&"))
    if how.case:
        suspicious |= (data - np.uint8(ord("A" if how.case == "lower" else "a"))) < 26
    starts, ends = offsets[:-1] - first, offsets[1:] - first
    filled = ends > starts
    if how.whitespace:
        space = data == 32
        suspicious[1:] |= space[1:] & space[:-1]  # may straddle two values: then both are looked at for nothing
        odd[filled] = space[starts[filled]] | space[ends[filled] - 1]
    places = np.flatnonzero(suspicious)
    if len(places):
        odd[np.searchsorted(ends, places, side="right")] = True
    return odd
