"""What cleaning learns from all rows is right to the last bit, however the rows are cut into pieces."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_ray.data.cleaning import near, quantiles
from lepton_ray.data.cleaning.duplicates import conflicting, hashed, later_ones
from lepton_ray.data.cleaning.fitting import Interpolation, Moments, MostFrequent, Quantiles
from lepton_ray.data.cleaning.media import image_hashes
from lepton_ray.data.images import pack_images
from lepton_ray.errors import UsageError

NUMBERS = st.lists(st.floats(allow_nan=False, allow_infinity=False, width=64), min_size=1, max_size=60)


def learnt(fitting, rows, pieces):
    """What a fitting finds in rows cut into pieces."""
    size = -(-rows.num_rows // pieces)
    parts = [rows.slice(start, size) for start in range(0, rows.num_rows, size)]
    while not fitting.done:
        fitting.narrow([fitting.look(part) for part in parts])
    return fitting.result()


@settings(max_examples=60, deadline=None)
@given(NUMBERS, st.integers(1, 5), st.integers(0, 30))
def test_quantiles_are_those_of_numpy(values, pieces, few):
    """Exactly, whether the search gathers early or counts to the last bit."""
    before, quantiles.FEW = quantiles.FEW, few
    try:
        found = learnt(Quantiles(["a"], (0.0, 0.25, 0.5, 1.0)), pa.table({"a": values}), pieces)["a"]
    finally:
        quantiles.FEW = before
    ordered = np.sort(np.array(values) + 0.0)
    place = 0.25 * (len(values) - 1)

    def between(low, high, part):
        return low if low == high or part == 0 else low * (1 - part) + high * part

    first = between(ordered[int(place)], ordered[min(int(place) + 1, len(values) - 1)], place % 1)
    middle = between(ordered[(len(values) - 1) // 2], ordered[len(values) // 2], 0.5)
    expected = [ordered[0], first, middle, ordered[-1]]
    assert found == [pytest.approx(each, rel=1e-15, abs=0) for each in expected]


def test_moments_do_not_cancel():
    """Numbers far from zero and close to each other; nulls, NaN and infinity do not count."""
    values = [1e9 + 0.25, 1e9 + 0.75, None, float("nan"), float("inf"), 1e9 + 0.5]
    mean, deviation = learnt(Moments(["a"]), pa.table({"a": values}), 3)["a"]
    assert mean == pytest.approx(1e9 + 0.5, abs=1e-6)
    assert deviation == pytest.approx(np.std([0.25, 0.75, 0.5]), rel=1e-6)
    assert learnt(Moments(["a"]), pa.table({"a": pa.array([None], pa.float64())}), 1)["a"] is None


def test_most_frequent_over_pieces():
    """The sum over all pieces decides; of two that stand as often the smaller one."""
    rows = pa.table({"a": ["x", "x", "x", "y", "y", None, "y", "y", "b", "b", "b", "b"]})
    assert learnt(MostFrequent(["a"]), rows, 4) == {"a": "b"}
    assert learnt(MostFrequent(["a"], counts=True), rows, 3) == {"a": {"b": 4, "x": 3, "y": 4}}


def test_interpolation_is_that_of_numpy():
    """Along another column in any order, beyond the ends the nearest value, the same however it is cut."""
    generator = np.random.default_rng(3)
    along, values = generator.permutation(50).astype(float), generator.normal(size=50)
    missing = generator.random(50) < 0.4
    rows = pa.table({"t": along, "a": pa.array(values, mask=missing)})
    order = np.argsort(along[~missing])
    expected = np.interp(along[missing], along[~missing][order], values[~missing][order])
    for pieces in (1, 3, 50):
        line = learnt(Interpolation(["a"], "t"), rows, pieces)["a"]
        assert line.at(along[missing]) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(UsageError, match="no value to learn from"):
        learnt(Interpolation(["a"], "t"), pa.table({"t": [1.0], "a": pa.array([None], pa.float64())}), 1)


def bucketed(rows, reduce, others=None, buckets=3):
    """What comes out of all buckets: (row, of_row), sorted; the rows in two data files."""
    places, half = np.arange(rows.num_rows), rows.num_rows // 2
    lines = pa.concat_tables(
        hashed(rows[low:high], places[: high - low], part, buckets, None if others is None else others[low:high])
        for part, (low, high) in enumerate(((0, half), (half, rows.num_rows)))
    )
    found = []
    for bucket in range(buckets):
        told = reduce(lines.filter(pa.compute.equal(lines["bucket"], bucket))).to_pylist()
        found += [(line["part"] * half + line["row"], line["of_part"] * half + line["of_row"]) for line in told]
    return sorted(found)


def test_duplicates_name_the_first_of_their_kind():
    """Null equals null; the earlier row stays, in whichever data file it is."""
    rows = pa.table({"a": [1, None, 1, 2, None, 1], "b": ["x", "y", "x", "x", "y", "z"]})
    assert bucketed(rows, later_ones) == [(2, 0), (4, 1)]
    assert bucketed(rows.select(["b"]), later_ones) == [(2, 0), (3, 0), (4, 1)]


def test_conflicting_labels_take_all_rows_of_the_group():
    """Equal rows with one label are fine; where labels differ each row names one with another label."""
    rows = pa.table({"a": [1, 1, 2, 2, 3, 2]})
    labels = pa.table({"label": ["x", "x", "x", "y", "z", "x"]})
    assert bucketed(rows, conflicting, labels) == [(2, 3), (3, 2), (5, 3)]


def words(generator, count):
    return [f"w{number}" for number in generator.integers(0, 3000, count)]


def test_pieces_of_texts_are_those_of_the_text_alone():
    """Neighbours in the column and slices do not matter, case does not, short texts are one piece."""
    texts = ["Hello world", "abc", "", "hello WORLD", "abcd\0", "abcd", "nachbar", "äöü"]
    pieces, starts = near.pieces_of(pa.array(["x", *texts, "y"])[1:-1])
    each = [set(pieces[low:high].tolist()) for low, high in itertools.pairwise(starts)]
    alone = [set(near.pieces_of(pa.array([text]))[0].tolist()) for text in texts]
    assert each == alone
    assert each[0] == each[3]
    assert len(each[0]) == 7
    assert len({frozenset(some) for some in each}) == len(texts) - 1


def test_near_texts_are_proposed_and_compared():
    """Banding proposes nearly all pairs above the threshold, and hardly any far below it."""
    generator = np.random.default_rng(0)
    originals = [words(generator, 40) for _ in range(300)]
    copies = [[*some[:20], "changed", *some[21:]] for some in originals]
    texts = pa.array([" ".join(some) for some in originals + copies])
    pieces, starts = near.pieces_of(texts)
    bands = near.band_hashes(pieces, starts, 0.8)
    lines = near.entries(bands, np.zeros(600, np.uint64), np.arange(600), 0, 4)
    pairs = {
        (line["of_row"], line["row"])
        for bucket in range(4)
        for line in near.proposed(lines.filter(pa.compute.equal(lines["bucket"], bucket))).to_pylist()
    }
    distinct = [np.unique(pieces[low:high]) for low, high in itertools.pairwise(starts)]
    assert near.similarity(distinct[0], distinct[300]) == pytest.approx(
        len(set(distinct[0]) & set(distinct[300])) / len(set(distinct[0]) | set(distinct[300]))
    )
    found = {pair for pair in pairs if near.similarity(distinct[pair[0]], distinct[pair[1]]) >= 0.8}
    wanted = {(row, row + 300) for row in range(300) if near.similarity(distinct[row], distinct[row + 300]) >= 0.8}
    assert len(wanted) > 250
    assert found <= wanted
    assert len(found) >= 0.99 * len(wanted)
    assert len(pairs) < 2 * len(wanted)


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.95, 1.0])
def test_bands_keep_their_promise(threshold):
    """A pair at the threshold is missed less than once in 200."""
    bands, rows = near.banding(threshold)
    assert bands * rows <= near.HASHES
    assert 1 - (1 - threshold**rows) ** bands >= near.RECALL


def test_large_bands_do_not_pair_all_with_all():
    """Of 1,000 equal texts every one meets the first, in 2,000 pairs and not in half a million."""
    bands = np.zeros((1000, 1), np.uint64)
    pairs = near.proposed(near.entries(bands, np.zeros(1000, np.uint64), np.arange(1000), 0, 1))
    assert pairs.num_rows < 2000
    assert {line["row"] for line in pairs.to_pylist() if line["of_row"] == 0} == set(range(1, 1000))


def test_images_that_look_alike_have_near_hashes():
    """A brighter, noisier or larger copy is within 4 bits, another image is not; what is no image has no hash."""
    generator = np.random.default_rng(1)
    base = np.kron(generator.integers(20, 200, (8, 8)), np.ones((8, 8))).astype(np.uint8)
    other = np.kron(generator.integers(20, 200, (8, 8)), np.ones((8, 8))).astype(np.uint8)
    noisy = np.clip(base + generator.integers(-4, 5, base.shape), 0, 255).astype(np.uint8)
    rows = pa.table(pack_images(np.stack([base, base + 20, noisy, other, base])))
    rows = rows.set_column(0, "image", pa.array([*rows["image"].to_pylist()[:4], b"short"]))
    hashes, known = image_hashes(rows, "image", raw=True)
    larger, _ = image_hashes(
        pa.table(pack_images(np.kron(base, np.ones((2, 2))).astype(np.uint8)[None])), "image", raw=True
    )
    apart = [int(np.bitwise_count(hashes[0] ^ each)) for each in (*hashes[1:4], larger[0])]
    assert known.tolist() == [True] * 4 + [False]
    assert max(apart[0], apart[1], apart[3]) <= 4 < apart[2]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**64 - 1), st.sets(st.integers(0, 63), max_size=4))
def test_image_bands_agree_within_the_distance(value, flipped):
    """Any two hashes that differ in at most 4 bits share one of 5 bands."""
    other = value
    for bit in flipped:
        other ^= 1 << bit
    one, two = near.image_bands(np.array([value, other], np.uint64), 4)
    assert (one == two).any()
