"""Cleaning beside pandas and polars; queries are in `benchmarks/data.py`.

    python benchmarks/data_cleaning.py [--rows 1000000] [--pairs 3] [--only clean,dedupe,near,growth] [--limit 600]

Each figure comes from a process of its own, so that its peak memory is its own; all sides take turns, `--pairs` times,
and a ratio is the median of the ratios within a turn. Times leave out imports. polars is measured where it is there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

HEADER = "| figure | ours | other | | ours / other | wanted |\n|---|---|---|---|---|---|"
FLOATS, WHOLES, TEXTS = 12, 3, 4
"""Columns of the wide table beside the key: with a label 20."""
SPACE = r"\s+"
CONTROL = r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]"


@dataclass
class Bench:
    """What all sections share."""

    folder: Path
    rows: int = 1_000_000
    pairs: int = 3
    limit_s: float = 600.0


def wide_rows(rows: int, seed: int = 0) -> pa.Table:
    """Rows of 20 columns and a key: numbers with gaps and far values, text that needs work here and there, copies."""
    generator = np.random.default_rng(seed)
    columns: dict[str, Any] = {}
    for index in range(FLOATS):
        values = generator.normal(index, 1 + index, rows)
        values[generator.integers(0, rows, rows // 2000)] *= 50
        columns[f"f{index}"] = pa.array(values, mask=generator.random(rows) < 0.02)
    for index in range(WHOLES):
        columns[f"n{index}"] = generator.integers(0, 100, rows)
    columns["n0"][generator.integers(0, rows, rows // 1000)] = 999
    words = np.array([f"word{number}" for number in range(5000)])
    odd = [" ", "  two  spaces ", "\ufb01ne", "tab\there", "caf\u00e9", "\x07bell"]
    for index in range(TEXTS):
        parts = [words[generator.integers(0, 5000, rows)] for _ in range(4)]
        texts = pa.array(parts[0])
        for part in parts[1:]:
            texts = pa.compute.binary_join_element_wise(texts, pa.array(part), " ")
        tail = pa.array(np.array(odd)[generator.integers(0, len(odd), rows)])
        worked = pa.array(generator.random(rows) < 0.03)
        columns[f"t{index}"] = pa.compute.if_else(worked, pa.compute.binary_join_element_wise(texts, tail, " "), texts)
    columns["label"] = generator.integers(0, 10, rows)
    table = pa.table(columns)
    order = np.arange(rows)
    copies = generator.integers(0, rows, rows // 20)
    order[copies] = generator.integers(0, rows, len(copies))  # one row in twenty is a copy of some other
    keys = pa.array([f"{row:010d}" for row in range(rows)])
    return table.take(pa.array(order)).add_column(0, "key", keys)


PLAN: dict[str, Any] = {
    "max_quarantine": 0.1,
    "steps": [
        {"normalise": {"columns": [f"t{index}" for index in range(TEXTS)]}},
        {"range": {"columns": ["n0"], "min": 0, "max": 100}},
        {"missing": {"columns": [f"f{index}" for index in range(FLOATS)], "fill": "median"}},
        {"outliers": {"columns": ["f0", "f1", "f2", "f3"], "by": "zscore", "limit": 4}},
        {"duplicates": {}},
    ],
}


def prepare_wide(folder: Path, rows: int) -> None:
    """The wide rows as one Parquet file for pandas, and as a table of a store for us."""
    from lepton_ray.data.tables import ingest
    from lepton_ray.settings import CleaningSettings
    from lepton_ray.storage import open_store

    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "rows.parquet"
    pq.write_table(wide_rows(rows), source, row_group_size=131_072)
    kept = CleaningSettings(drop_duplicates=False, drop_missing=False)
    ingest(open_store(str(folder / "store")), "wide", str(source), cleaning=kept)


def clean_ours(folder: Path) -> dict[str, Any]:
    """The plan on the table, from the files of one version to those of the next."""
    import shutil

    from lepton_ray.data.cleaning.table import clean
    from lepton_ray.settings.cleaning import parse_plan
    from lepton_ray.storage import open_store

    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder / "store", copy)
    store, plan = open_store(str(copy)), parse_plan(PLAN)
    started = time.perf_counter()
    found = clean(store, "wide", plan, on="here")
    return {"seconds": time.perf_counter() - started, "rows": found.rows_written}


def clean_pandas(folder: Path) -> dict[str, Any]:
    """The same in pandas, from a Parquet file to a Parquet file."""
    import pandas as pd

    started = time.perf_counter()
    frame = pd.read_parquet(folder / "rows.parquet")
    for name in (f"t{index}" for index in range(TEXTS)):
        text = frame[name].str.normalize("NFKC").str.replace(CONTROL, "", regex=True)
        frame[name] = text.str.replace(SPACE, " ", regex=True).str.strip()
    frame = frame[frame["n0"].between(0, 100)]
    floats = [f"f{index}" for index in range(FLOATS)]
    frame = frame.fillna(frame[floats].median())
    some = frame[floats[:4]]
    frame = frame[(((some - some.mean()) / some.std(ddof=0)).abs() <= 4).all(axis=1)]
    frame = frame.drop_duplicates([name for name in frame.columns if name != "key"])
    frame.to_parquet(folder / "out.parquet", compression="zstd")
    return {"seconds": time.perf_counter() - started, "rows": len(frame)}


def text_rows(rows: int) -> pa.Array:
    """Texts of 20 to 100 letters, one in five a copy."""
    generator = np.random.default_rng(5)
    words = pa.array([f"word{number}" for number in range(20_000)])
    count = generator.integers(3, 12, rows)
    offsets = np.concatenate([[0], np.cumsum(count)]).astype(np.int32)
    lists = pa.ListArray.from_arrays(
        pa.array(offsets), words.take(pa.array(generator.integers(0, 20_000, offsets[-1])))
    )
    texts = pa.compute.binary_join(lists, " ")
    return texts.take(pa.array(generator.integers(0, rows * 4 // 5, rows)))


def dedupe_ours(folder: Path) -> dict[str, Any]:
    """What the step `duplicates` does with a piece and a bucket."""
    from lepton_ray.data.cleaning.duplicates import hashed, later_ones

    rows = pq.read_table(folder / "texts.parquet")
    started = time.perf_counter()
    kept = np.ones(rows.num_rows, bool)
    kept[later_ones(hashed(rows, np.arange(rows.num_rows), 0, 1))["row"].to_numpy()] = False
    kept = rows.filter(pa.array(kept))
    return {"seconds": time.perf_counter() - started, "rows": kept.num_rows}


def dedupe_pandas(folder: Path) -> dict[str, Any]:
    """`drop_duplicates`."""
    import pandas as pd

    frame = pd.read_parquet(folder / "texts.parquet")
    started = time.perf_counter()
    kept = frame.drop_duplicates()
    return {"seconds": time.perf_counter() - started, "rows": len(kept)}


def dedupe_polars(folder: Path) -> dict[str, Any]:
    """`unique` that keeps the order, as ours does."""
    import polars as pl

    frame = pl.read_parquet(folder / "texts.parquet")
    started = time.perf_counter()
    kept = frame.unique(maintain_order=True, keep="first")
    return {"seconds": time.perf_counter() - started, "rows": len(kept)}


def planted_texts(rows: int) -> tuple[list[str], set[int]]:
    """Texts with near copies (a few words changed, added, left out) and half copies, and the rows of the near ones."""
    generator = np.random.default_rng(11)
    weights = 1 / np.arange(1, 20_001)
    weights /= weights.sum()
    originals = rows * 7 // 10
    texts = [
        [f"word{w}" for w in generator.choice(20_000, generator.integers(40, 120), p=weights)] for _ in range(originals)
    ]
    planted = set()
    for index in range(originals, rows):
        words = list(texts[int(generator.integers(0, originals))])
        if index % 3:
            for at in generator.integers(0, len(words), int(generator.integers(1, 3))).tolist():
                kind, place = int(generator.integers(0, 3)), at % len(words)
                words[place : place + 1] = [[f"new{index}"], [words[place], f"new{index}"], []][kind]
            planted.add(index)
        else:  # much in common, but no near copy
            words[: len(words) // 2] = [f"word{w}" for w in generator.choice(20_000, len(words) // 2, p=weights)]
        texts.append(words)
    return [" ".join(words) for words in texts], planted


def near_ours(folder: Path) -> dict[str, Any]:
    """Recall and precision of the rows left out against those planted."""
    from lepton_ray.data.cleaning.table import clean
    from lepton_ray.data.tables import ingest, open_table
    from lepton_ray.settings import CleaningSettings
    from lepton_ray.settings.cleaning import parse_plan
    from lepton_ray.storage import open_store

    texts, planted = planted_texts(20_000)
    store = open_store(tempfile.mkdtemp(dir=folder))
    rows = pa.table({"key": [f"{row:06d}" for row in range(len(texts))], "text": texts})
    ingest(store, "near", rows, cleaning=CleaningSettings(drop_duplicates=False))
    plan = parse_plan({"steps": [{"near_duplicates": {"column": "text", "threshold": 0.8}}]})
    started = time.perf_counter()
    clean(store, "near", plan, on="here")
    seconds = time.perf_counter() - started
    kept = {int(key) for key in open_table(store, "near").read(["key"])["key"].to_pylist()}
    gone = set(range(len(texts))) - kept
    hit = len(gone & planted)
    return {
        "seconds": seconds, "rows": len(kept), "planted": len(planted),
        "recall": hit / len(planted), "precision": hit / max(1, len(gone)),
    }  # fmt: skip


MEASURED: dict[str, Callable[[Path], dict[str, Any]]] = {
    each.__name__: each for each in (clean_ours, clean_pandas, dedupe_ours, dedupe_pandas, dedupe_polars, near_ours)
}


def measured(bench: Bench, name: str, folder: Path) -> dict[str, Any]:
    """What one process measured, with its peak resident memory in bytes."""
    asked = [sys.executable, __file__, "--measure", name, "--folder", str(folder)]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=bench.limit_s, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed: {done.stderr.strip().splitlines()[-1:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def compared(bench: Bench, one: str, other: str, folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Both sides in turns; they must keep the same number of rows."""
    ours, others = [], []
    for _ in range(bench.pairs):
        ours.append(measured(bench, one, folder))
        others.append(measured(bench, other, folder))
    if {each["rows"] for each in ours} != {each["rows"] for each in others}:
        raise SystemExit(f"{one} keeps {ours[0]['rows']} rows and {other} {others[0]['rows']}")
    return ours, others


def middle(runs: list[dict[str, Any]], what: str) -> float:
    """Median of one side."""
    return statistics.median(run[what] for run in runs)


def row(name: str, ours: list[dict[str, Any]], others: list[dict[str, Any]], what: str, other: str, wanted: str) -> str:
    """A line of the table; the ratio is the median of ours / other within a turn."""
    ratio = statistics.median(one[what] / two[what] for one, two in zip(ours, others, strict=True))
    one, two = (middle(runs, what) / (1e6 if what == "peak" else 1) for runs in (ours, others))
    return f"| {name} | {one:,.4g} | {two:,.4g} | {other} | {ratio:.2f} | {wanted} |"


def section_clean(bench: Bench) -> list[str]:
    """Clean and normalise 20 columns beside pandas."""
    folder = bench.folder / "wide"
    prepare_wide(folder, bench.rows)
    ours, others = compared(bench, "clean_ours", "clean_pandas", folder)
    return [
        row(f"clean + normalise {bench.rows:,} x 20, s", ours, others, "seconds", "pandas", "<= 0.5"),
        row("its peak memory, MB", ours, others, "peak", "pandas", "<= 0.5"),
    ]


def section_dedupe(bench: Bench) -> list[str]:
    """Exact duplicates among texts beside pandas and polars."""
    folder = bench.folder / "texts"
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": text_rows(bench.rows)}), folder / "texts.parquet")
    lines = []
    for other, wanted in (("pandas", "-"), ("polars", "<= 1.0")):
        if importlib.util.find_spec(other) is None:
            lines.append(f"| exact dedupe of {bench.rows:,} texts, s | | | {other}: not installed | | {wanted} |")
            continue
        ours, others = compared(bench, "dedupe_ours", f"dedupe_{other}", folder)
        lines.append(row(f"exact dedupe of {bench.rows:,} texts, s", ours, others, "seconds", other, wanted))
    return lines


def section_near(bench: Bench) -> list[str]:
    """Near duplicates among 20,000 texts with planted ones."""
    found = measured(bench, "near_ours", bench.folder)
    return [
        f"| near duplicates, recall of {found['planted']:,} planted | {found['recall']:.4f} | | | | >= 0.95 |",
        f"| near duplicates, precision | {found['precision']:.4f} | | in {found['seconds']:.1f} s | | >= 0.99 |",
    ]


def section_growth(bench: Bench) -> list[str]:
    """The same plan on 1x, 2x and 4x as many rows."""
    lines, first = [], None
    for times in (1, 2, 4):
        rows = bench.rows * times // 4
        folder = bench.folder / f"growth{times}"
        prepare_wide(folder, rows)
        runs = [measured(bench, "clean_ours", folder) for _ in range(bench.pairs)]
        seconds, peak = middle(runs, "seconds"), middle(runs, "peak")
        first = first or (seconds, peak)
        then = f"{first[0]:.2f}, {first[1] / 1e6:,.0f}"
        grown = f"{seconds / first[0]:.2f}, {peak / first[1]:.2f}"
        what = f"growth: {rows:,} rows, s and MB"
        lines.append(f"| {what} | {seconds:.2f}, {peak / 1e6:,.0f} | {then} | {times}x | {grown} | <= {times}, flat |")
    return lines


SECTIONS: dict[str, Callable[[Bench], list[str]]] = {
    "clean": section_clean,
    "dedupe": section_dedupe,
    "near": section_near,
    "growth": section_growth,
}


def peak_bytes() -> int:
    """Peak resident memory of this process; getrusage would count that of the process it was forked from."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--only", default=",".join(SECTIONS))
    parser.add_argument("--limit", type=float, default=600.0, help="seconds a process may take")
    parser.add_argument("--measure", choices=sorted(MEASURED), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.measure:
        found = MEASURED[told.measure](told.folder)
        print(json.dumps({**found, "peak": peak_bytes()}))
        return
    with tempfile.TemporaryDirectory(prefix="lepton-bench-") as folder:
        bench = Bench(Path(folder), told.rows, told.pairs, told.limit)
        print(HEADER)
        for name in told.only.split(","):
            for line in SECTIONS[name](bench):
                print(line, flush=True)


if __name__ == "__main__":
    main()
