"""The exporter: what the store holds about runs and endpoints, as Prometheus reads it.

A background thread reads the store every few seconds; a scrape never waits for storage. While the store is away the
last view stays, and `lepton_exporter_refreshed_timestamp_seconds` tells its age.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable

from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from lepton_ray import __version__
from lepton_ray.errors import LeptonError
from lepton_ray.monitoring.catalogue import METRICS
from lepton_ray.monitoring.cells import Histogram
from lepton_ray.monitoring.gather import Gatherer
from lepton_ray.monitoring.snapshot import Distribution, Joined, Labels, Samples
from lepton_ray.storage import Store

_log = logging.getLogger(__name__)
_SCRAPE = METRICS["lepton_exporter_scrape_seconds"]
MAX_FORMATS = 8
"""Kept texts of one view; the Accept header can name more versions than there are."""
_ORDER = {name: place for place, name in enumerate(METRICS)}


class Exporter:
    """The current view of a store, and its text for a scrape.

    Args:
        store: where runs and endpoints are; only read.
        retain_s: how long a run or endpoint is shown after its last sign of life.
        every_s: seconds between two readings of the store.
        now: wall clock, unix seconds.
    """

    def __init__(
        self, store: Store, *, retain_s: float = 3600.0, every_s: float = 2.0, now: Callable[[], float] = time.time
    ) -> None:
        self._gatherer = Gatherer(store, retain_s=retain_s, now=now)
        self._every_s = every_s
        self._now = now
        self._view = Joined()
        self._own = Joined()
        self._told: str | None = None
        self._refreshing = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._rendering = threading.Lock()
        self._rendered: dict[str, bytes] = {}
        self._rendered_view = self._view
        self._scrapes = Histogram(threading.Lock(), _SCRAPE.buckets)
        self._own.put("lepton_exporter_build_info", 1, __version__)
        self.ready = threading.Event()
        """Set when the store was read once."""

    def start(self) -> None:
        """Read the store in the background from now on."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="lepton-exporter", daemon=True)
            self._thread.start()

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop reading; gives up waiting after `timeout_s`, as the store may hang."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def refresh(self) -> None:
        """Read the store now. A failure is counted and told once; the last view stays."""
        with self._refreshing:
            begun = time.perf_counter()
            try:
                self._view = self._gatherer.refresh()
            except Exception as error:  # noqa: BLE001 - whatever a store holds, the next scrape must be answered
                cause = "storage" if isinstance(error, LeptonError) else "internal"
                self._gatherer.errors[cause] += 1
                if self._told != cause:
                    _log.warning("exporter: the store could not be read, the last view stays: %s", error)
                self._told = cause
            else:
                self._told = None
                self.ready.set()
                self._own.put("lepton_exporter_refreshed_timestamp_seconds", self._now())
            self._own.put("lepton_exporter_refresh_seconds", time.perf_counter() - begun)
            for cause, number in self._gatherer.errors.items():
                self._own.put("lepton_exporter_errors_total", number, cause)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """The body of a scrape and its content type: OpenMetrics where the Accept header asks for it, else text.

        The text of a view is made once per format, so that many scrapers cost little more than one.
        """
        begun = time.perf_counter()
        encode, content_type = choose_encoder(accept)
        with self._rendering:
            if self._rendered_view is not self._view:
                self._rendered_view, self._rendered = self._view, {}
            body = self._rendered.get(content_type)
            if body is None:
                body = encode(_Families(self._rendered_view.samples))
                if len(self._rendered) < MAX_FORMATS:
                    self._rendered[content_type] = body
        counts, total = self._scrapes.totals()
        scrapes = Distribution((*_SCRAPE.buckets, math.inf), counts, total)
        own = encode(_Families({**self._own.samples, (_SCRAPE.name, ()): scrapes}))
        self._scrapes.observe(time.perf_counter() - begun)
        return body.removesuffix(b"# EOF\n") + own, content_type

    def _run(self) -> None:
        self.refresh()
        while not self._stop.wait(self._every_s):
            self.refresh()


class _Families(Collector):
    """Samples as families, in the catalogue's order."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def collect(self) -> Iterable[Metric]:
        by_name: dict[str, list[tuple[Labels, float | Distribution]]] = {}
        for (name, labels), value in self._samples.items():
            by_name.setdefault(name, []).append((labels, value))
        for name, samples in sorted(by_name.items(), key=lambda item: _ORDER[item[0]]):
            yield _family(name, samples)


def _family(name: str, samples: list[tuple[Labels, float | Distribution]]) -> Metric:
    metric = METRICS[name]
    if metric.kind == "histogram":
        histogram = HistogramMetricFamily(name, metric.help, labels=metric.labels)
        for labels, value in samples:
            if isinstance(value, Distribution):
                histogram.add_metric(labels, _cumulative(value), value.total)
        return histogram
    family: CounterMetricFamily | GaugeMetricFamily = (
        CounterMetricFamily(name, metric.help, labels=metric.labels)
        if metric.kind == "counter"
        else GaugeMetricFamily(name, metric.help, labels=metric.labels)
    )
    for labels, value in samples:
        if not isinstance(value, Distribution):
            family.add_metric(labels, value)
    return family


def _cumulative(value: Distribution) -> list[tuple[str, float]]:
    """Buckets as Prometheus wants them: each counts what is at or below its bound."""
    buckets, below = [], 0
    for bound, count in zip(value.bounds, value.counts, strict=True):
        below += count
        buckets.append(("+Inf" if math.isinf(bound) else repr(bound), float(below)))
    return buckets
