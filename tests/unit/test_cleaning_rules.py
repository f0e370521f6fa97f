"""Every rule of a cleaning plan finds what is wrong, and nothing else."""

from __future__ import annotations

import datetime as dt
import io
import wave

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_ray.data.cleaning import media, rules
from lepton_ray.data.cleaning.expressions import Rule
from lepton_ray.data.cleaning.text import normalise, normalised
from lepton_ray.data.images import pack_images
from lepton_ray.errors import UsageError
from lepton_ray.settings.cleaning import Normalise

ALL = Normalise(columns=["a"], html=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain text", "plain text"),
        ("  two   words ", "two words"),
        ("\ufb01ne \uff21", "fine A"),
        ("a\x00b\x1bc\td", "abc d"),
        ("<p>one</p><br/>two &amp; three", "one two & three"),
        ("&amp;lt;b&amp;gt;deep&amp;lt;/b&amp;gt;", "deep"),
        ("<script>if (a < b) { x() }</script>kept<style>p {}</style>", "kept"),
        ("a < b and b > c", "a < b and b > c"),
        ("", ""),
    ],
)
def test_text_is_brought_into_one_form(text, expected):
    """Unicode, control characters, HTML and white space, also where one hides another."""
    values, changed = normalise(pa.array([text, None, "same"]), ALL)
    assert values.to_pylist() == [expected, None, "same"]
    assert changed.tolist() == [text != expected, False, False]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.one_of(st.none(), st.text(max_size=30), st.text("<>&;ab /amp", max_size=20)), max_size=8), st.booleans()
)
def test_normalising_again_changes_nothing(texts, html):
    """Also for values sliced out of a longer array; the column way and the single way agree."""
    how = Normalise(columns=["a"], html=html, case="lower")
    column = pa.array(["first", *texts], pa.string())[1:]
    once, changed = normalise(column, how)
    assert once.to_pylist() == [None if text is None else normalised(text, how) for text in texts]
    assert changed.tolist() == [one != other for one, other in zip(texts, once.to_pylist(), strict=True)]
    twice, again = normalise(once, how)
    assert twice.equals(once)
    assert not again.any()


@pytest.mark.parametrize(
    ("to", "values", "expected"),
    [
        ("int64", ["1", "+2", " -3 ", "1.0", "x", "", "9" * 19], [1, 2, -3, None, None, None, None]),
        ("float64", ["1e3", ".5", "2.", "nan", "inf", "0x1", "1,5"], [1000.0, 0.5, 2.0, None, None, None, None]),
        ("bool", ["Yes", "no", "1", "0", "T", "maybe"], [True, False, True, False, True, None]),
        ("date", ["2024-02-29", "2023-02-29", "29.2.2024"], [dt.date(2024, 2, 29), None, None]),
    ],
)
def test_text_becomes_another_type_or_is_wrong(to, values, expected):
    """What is no value of the type is null and marked; missing values are neither."""
    made, wrong = rules.converted(pa.array([*values, None]), to)
    assert made.to_pylist() == [*expected, None]
    assert wrong.tolist() == [each is None for each in expected] + [False]


def test_times_are_read_with_and_without_a_zone():
    """UTC where none is given; a time that does not exist is wrong."""
    texts = ["2024-01-02", "2024-01-02T03:04:05Z", "2024-01-02 03:04:05+02:00", "2024-01-02 25:00"]
    made, wrong = rules.converted(pa.array(texts), "timestamp")
    hours = [None if each is None else (each.day, each.hour) for each in made.to_pylist()]
    assert hours == [(2, 0), (2, 3), (2, 1), None]
    assert wrong.tolist() == [False, False, False, True]


def test_numbers_are_never_cut():
    """2.5 is no whole number, 2 is no truth value."""
    assert rules.converted(pa.array([1.0, 2.5]), "int64")[1].tolist() == [False, True]
    assert rules.converted(pa.array([0, 1, 2]), "bool")[1].tolist() == [False, False, True]
    with pytest.raises(UsageError, match="is not turned into"):
        rules.converted(pa.array([b"x"]), "int64")


def test_ranges_bind_numbers_dates_and_the_infinite():
    """Both ends count as inside; missing values pass; infinity is never inside."""
    assert rules.outside(pa.array([1, 2, 8, 9, None]), 2, 8).tolist() == [True, False, False, True, False]
    assert rules.outside(pa.array([1.0, float("inf"), float("nan"), None]), None, None).tolist() == [
        False,
        True,
        True,
        False,
    ]
    days = pa.array([dt.date(2024, 1, 1), dt.date(2024, 1, 3)])
    assert rules.outside(days, "2024-01-02", None).tolist() == [True, False]
    with pytest.raises(UsageError, match="is a number"):
        rules.outside(days, 5, None)


def test_patterns_match_the_whole_text():
    """An alternative at either end is bound, too."""
    assert rules.unmatched(pa.array(["ab", "b", "a", "abx", None]), "a|ab").tolist() == [
        False,
        True,
        False,
        True,
        False,
    ]


def test_sets_do_not_mix_types():
    """1 is not "1", and true is not 1."""
    assert rules.not_among(pa.array(["1", "2", None]), [1, "2"]).tolist() == [True, False, False]
    assert rules.not_among(pa.array([1, 2]), [True, 2, 2.5]).tolist() == [True, False]


ROWS = pa.table({"a": [1, 2, None], "b": [2, 1, 1], "s": ["x", "yy", None], "d d": [0.5, 0.0, 2.0]})


@pytest.mark.parametrize(
    ("rule", "failing"),
    [
        ("a <= b", [False, True, False]),
        ("0 < a < b", [False, True, False]),
        ("a <= b or s == 'yy'", [False, False, False]),
        ("not a > 1", [False, True, False]),
        ("s in ('x', 'z')", [False, True, False]),
        ("s not in ['yy']", [False, True, False]),
        ("missing(a) or length(s) == a", [False, False, False]),
        ("a * 2 - b >= 1 and -a < 0", [True, False, False]),
        ('b / column("d d") > 3', [False, False, True]),
        ("true_never == 1", None),
        ("missing(s)", [True, True, False]),
    ],
)
def test_a_rule_over_columns(rule, failing):
    """As SQL's CHECK: a row fails where the rule is false, not where a value is missing."""
    if failing is None:
        with pytest.raises(UsageError, match="no column"):
            Rule(rule).check(ROWS.schema)
        return
    made = Rule(rule)
    made.check(ROWS.schema)
    assert made.failing(ROWS).tolist() == failing


@pytest.mark.parametrize(
    "rule",
    ["__import__('os')", "a.b", "a", "lambda: 1", "a if b else s", "a < 'x'", "(", "[x for x in a]", "a ** 9", "f'{a}'",
     "length(a, b)", "s in b", "a := 1", "x" * 3000, "(" * 500 + "a" + ")" * 500],
)  # fmt: skip
def test_what_is_no_rule_is_refused(rule):
    """In one line that names the rule; nothing of it is run."""
    with pytest.raises(UsageError) as caught:
        Rule(rule).check(ROWS.schema)
    assert "\n" not in str(caught.value)


def recording(frames: int) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((1, 2, 8000, frames, "NONE", ""))
        sound.writeframes(b"\1\2" * frames)
    return file.getvalue()


def test_recordings_that_cannot_be_read():
    """Whole, cut off, empty, and not one at all; samples of 32 bit floats, whole and cut off."""
    whole = recording(100)
    found = media.faults(pa.array([whole, whole[:-50], recording(0), b"no sound", None]), "audio", 1)
    assert found == [None, "recording cut off", "recording without a sample", "no recording that can be read", None]
    floats = bytearray(whole)
    floats[20:22], floats[32:36] = (3).to_bytes(2, "little"), bytes([4, 0, 32, 0])  # coding, bytes and bits of a frame
    found = media.faults(pa.array([bytes(floats), bytes(floats[:-50])]), "audio", 1)
    assert found == [None, "no recording that can be read"]


def picture(kind: str, size: tuple[int, int] = (20, 10)) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("CMYK" if kind == "cmyk" else "RGB", size, 7).save(file, "JPEG" if kind == "cmyk" else kind)
    return file.getvalue()


def test_images_that_cannot_be_read():
    """A truncated one and text fail, CMYK and one pixel do not; a bomb fails by its header alone."""
    png = picture("PNG")
    bomb = png[:16] + (60_000).to_bytes(4, "big") * 2 + png[24:]
    images = [png, picture("PNG", (1, 1)), picture("cmyk"), picture("JPEG")[:300], b"<html>", bomb]
    found = media.faults(pa.array(images), "image", 1_000_000)
    assert [fault is None for fault in found] == [True, True, True, False, False, False]


def test_raw_images_of_the_wrong_length():
    """The bytes must be height x width x channels, and sizes must be sizes."""
    rows = pa.table(pack_images(np.zeros((4, 2, 3), np.uint8)))
    rows = rows.set_column(0, "image", pa.array([b"123456", b"12345", b"123456", b"123456"]))
    rows = rows.set_column(1, "height", pa.array([2, 2, 0, 2**31 - 1], pa.int32()))
    wrong = np.zeros(4, bool)
    for _, mask in media.raw_faults(rows, 10**6):
        wrong |= mask.fill_null(False).to_numpy()
    assert wrong.tolist() == [False, True, True, True]
