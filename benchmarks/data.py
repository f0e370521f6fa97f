"""Queries beside pyarrow.dataset in one Markdown table; cleaning is in `benchmarks/data_cleaning.py`.

    python benchmarks/data.py [--pairs 5] [--only query] [--query-rows 10000000]

Each measurement is a process of its own, and all sides take turns, `--pairs` times: the noise of the machine falls on
all alike. A ratio is the median of the ratios within a turn, best on a machine that does nothing else. Times leave out
imports. Each run ends after `--limit` seconds at the latest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from by_turns import turns

HEADER = "| figure | ours | other | | other / ours | wanted |\n|---|---|---|---|---|---|"
REGIONS = 50
BATCH = 500_000
"""Rows made at a time."""
REPEATS = 5
"""Queries of one measurement, of which the median counts; the files are in the page cache."""
QUERIES: dict[str, tuple[str, pc.Expression]] = {
    "one partition and a range": (
        "SELECT key, amount FROM t WHERE region = 'r07' AND amount > 990",
        (pc.field("region") == "r07") & (pc.field("amount") > 990),
    ),
    "a range over all partitions": (
        "SELECT key, amount FROM t WHERE amount > 999",
        pc.field("amount") > 999,
    ),
    "a range of the column that the rows came by": (
        "SELECT key, amount FROM t WHERE day BETWEEN 100 AND 102",
        (pc.field("day") >= 100) & (pc.field("day") <= 102),
    ),
}  # fmt: skip
"""By name: our statement, and the same as pyarrow's filter."""


@dataclass
class Bench:
    """What all sections share."""

    folder: Path
    pairs: int
    limit_s: float
    query_rows: int

    def child(self, part: str, *arguments: str) -> dict[str, Any]:
        """One measurement in a process of its own: what `PARTS[part]` returns there."""
        command = [sys.executable, __file__, "--part", part, *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=self.limit_s, check=False)
        except subprocess.TimeoutExpired:
            sys.exit(f"{part} took longer than {self.limit_s:g} s")
        if done.returncode:
            sys.exit(f"{part} failed:\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found


def row(name: str, ours: list[float], other: list[float], against: str, wanted: str, unit: str) -> str:
    """One line of the table from the figures of all turns, where less is better."""
    ratio = statistics.median(b / a for a, b in zip(ours, other, strict=True))
    mine, theirs = (f"{statistics.median(values):,.4g} {unit}" for values in (ours, other))
    return f"| {name} | {mine} | {theirs} | {against} | {ratio:.2f} | {wanted} |"


def sales(rows: int) -> Iterator[pa.Table]:
    """Rows by day, of one of 50 regions each, with an amount below 1,000."""
    random = np.random.default_rng(0)
    regions = pa.array([f"r{number:02d}" for number in range(REGIONS)])
    for start in range(0, rows, BATCH):
        count = min(BATCH, rows - start)
        numbers = np.arange(start, start + count)
        yield pa.table(
            {
                "key": pc.utf8_lpad(pa.array(numbers).cast(pa.string()), 9, "0"),
                "region": regions.take(pa.array(random.integers(0, REGIONS, count))),
                "day": pa.array(numbers * 365 // rows, pa.int32()),
                "amount": random.uniform(0, 1000, count),
                "items": random.integers(1, 100, count),
            }
        )


def prepare_query(folder: str, rows: str) -> dict[str, Any]:
    """A table partitioned by region for us, and the same rows in the same way for pyarrow."""
    from lepton_ray.data.tables import ingest
    from lepton_ray.storage import open_store

    base = Path(folder)
    source = base / "sales.parquet"
    writer = None
    for batch in sales(int(rows)):
        writer = writer or pq.ParquetWriter(source, batch.schema)
        writer.write_table(batch)
    assert writer is not None  # noqa: S101 - there are rows
    writer.close()
    report = ingest(open_store((base / "store").as_uri()), "sales", str(source), partition_by=["region"])
    written = ds.ParquetFileFormat().make_write_options(compression="zstd")
    ds.write_dataset(
        ds.dataset(source), base / "pyarrow", format="parquet", file_options=written,
        partitioning=ds.partitioning(pa.schema([("region", pa.string())]), flavor="hive"),
    )  # fmt: skip
    return {"rows": report.rows_written}


def _timed(query: Callable[[], pa.Table]) -> dict[str, Any]:
    took, found = [], -1
    for _ in range(REPEATS + 1):
        begun = time.perf_counter()
        found = query().num_rows
        took.append(time.perf_counter() - begun)
    return {"seconds": statistics.median(took[1:]), "rows": found}


def query_ours(folder: str, name: str) -> dict[str, Any]:
    """`open_table(...).query(...)`, the reading of the log included."""
    from lepton_ray.data.tables import open_table
    from lepton_ray.storage import open_store

    store = open_store((Path(folder) / "store").as_uri())
    return _timed(lambda: open_table(store, "sales").query(QUERIES[name][0]))


def query_pyarrow(folder: str, name: str) -> dict[str, Any]:
    """`pyarrow.dataset`, the listing of the files included."""
    path = Path(folder) / "pyarrow"
    wanted = QUERIES[name][1]
    return _timed(lambda: ds.dataset(path, partitioning="hive").to_table(columns=["key", "amount"], filter=wanted))


def query(bench: Bench) -> Iterator[str]:
    """SELECT with a filter on a partitioned table against pyarrow.dataset."""
    folder = str(bench.folder / "query")
    Path(folder).mkdir()
    rows = bench.child("prepare_query", folder, str(bench.query_rows))["rows"]
    for name in QUERIES:
        mine, theirs = turns(
            bench.pairs,
            partial(bench.child, "query_ours", folder, name),
            partial(bench.child, "query_pyarrow", folder, name),
        )
        counts = {found["rows"] for found in (*mine, *theirs)}
        if len(counts) != 1:
            sys.exit(f"query, {name}: the sides found {counts} rows")
        yield row(
            f"query, {rows:,} rows, {name} ({counts.pop():,} found)", [found["seconds"] * 1e3 for found in mine],
            [found["seconds"] * 1e3 for found in theirs], "pyarrow.dataset", ">= 1", "ms",
        )  # fmt: skip


SECTIONS: dict[str, Callable[[Bench], Iterator[str]]] = {"query": query}
"""Each yields lines of the table."""
PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "prepare_query": prepare_query, "query_ours": query_ours, "query_pyarrow": query_pyarrow,
}  # fmt: skip
"""What is measured in processes of their own."""


def main() -> None:
    """Measure the sections that were asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="turns")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, by comma")
    parser.add_argument("--query-rows", type=int, default=10_000_000)
    parser.add_argument("--limit", type=float, default=900.0, help="seconds of one run at most")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(PARTS[options.part](*options.arguments)))
        return
    wanted = options.only.split(",")
    if unknown := sorted(set(wanted) - set(SECTIONS)):
        parser.error(f"--only: no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(Path(temporary), options.pairs, options.limit, options.query_rows)
        print(HEADER, flush=True)
        for name, section in SECTIONS.items():
            if name in wanted:
                for line in section(bench):
                    print(line, flush=True)


if __name__ == "__main__":
    main()
