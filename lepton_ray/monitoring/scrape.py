"""Reading an exporter as Prometheus does, for the few figures that are told to a person at the end of the main job."""

from __future__ import annotations

from collections import defaultdict
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

from lepton_ray.errors import UnavailableError, escaped

TIMEOUT_S = 10.0


def scrape(url: str, *, run: str, endpoint: str, version: int) -> dict[str, Any]:
    """The main figures of one run and of one model version at an endpoint from an exporter's `/metrics`.

    Raises UnavailableError where the exporter does not answer.
    """
    try:
        with urlopen(f"{url}/metrics", timeout=TIMEOUT_S) as answer:  # noqa: S310 - the exporter's own http address
            text = answer.read().decode()
    except (URLError, OSError) as error:
        raise UnavailableError(f"exporter {url}: {escaped(str(error))}; is it running?") from error
    sums: dict[str, float] = defaultdict(float)
    phases: dict[str, float] = defaultdict(float)
    series = 0
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            series += 1
            about = sample.labels
            wanted = {"run": run, "endpoint": endpoint, **({"version": str(version)} if "endpoint" in about else {})}
            if any(about.get(label, value) != value for label, value in wanted.items()):
                continue
            sums[sample.name] += sample.value
            if sample.name == "lepton_training_phase_seconds_total":
                phases[about["phase"]] += sample.value
    steps = max(1.0, sums["lepton_training_step_seconds_count"])
    requests = sums["lepton_serving_request_seconds_count"]
    return {
        "steps_total": sums["lepton_training_steps_total"],
        "samples_total": sums["lepton_training_samples_total"],
        "samples_per_second": round(sums["lepton_training_samples_per_second"], 1),
        "step_seconds_mean": round(sums["lepton_training_step_seconds_sum"] / steps, 6),
        "step_parts_ms": {
            name: round(phases[name] / steps * 1e3, 3) for name in ("data_wait", "forward", "backward", "optimizer")
        },
        "goodput_ratio": round(sums["lepton_goodput_ratio"], 4),
        "requests_total": sums["lepton_serving_requests_total"],
        "request_seconds_mean": round(sums["lepton_serving_request_seconds_sum"] / max(1.0, requests), 6),
        "series": series,
    }
