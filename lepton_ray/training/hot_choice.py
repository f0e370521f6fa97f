"""Which hot copies a worker group starts from: the newest step that everything is there for. Values only."""

from __future__ import annotations

from typing import Any

from lepton_ray.data.order import SampleLedger


def choose(
    copies: list[list[dict[str, Any]]],
    after: int,
    logs: list[dict[str, Any]],
    sharded: bool,
    bases: list[dict[str, Any]] | None = None,
) -> dict[str, Any] | None:
    """The newest step beyond `after` of the newest generation that all parts of are there.

    Args:
        copies: of each node, the heads of its copies.
        after: see above.
        logs: what the logs of samples cover: for a rank that has no copy of the step its log does, but for shards.
        sharded: whether every rank's tensors are needed, or those of one.
        bases: common accounts, from which the samples are told where neither a copy nor a log of some rank is left.
    """
    by_step: dict[tuple[int, int], dict[int, dict[str, Any]]] = {}
    for one in (one for node in copies for one in node):
        by_step.setdefault((one["generation"], one["step"]), {})[one["rank"]] = one
    for (generation, step), ranks in sorted(by_step.items(), reverse=True, key=lambda item: (item[0][1], item[0][0])):
        world_size = next(iter(ranks.values()))["world_size"]
        holders = sorted(rank for rank, one in ranks.items() if one["whole"])
        covered = {
            log["rank"] for log in logs
            if log["generation"] == generation and log["first"] <= step <= log["last"] and log["rank"] not in ranks
        }  # fmt: skip
        told = len(ranks) + len(covered) == world_size
        known = [one for one in bases or () if one["generation"] == generation and one["step"] <= step]
        base = None if told else max(known, key=lambda one: one["step"], default=None)
        if step <= after or not holders or not (told or base):
            continue
        if sharded and len(holders) < world_size:
            continue
        samples = SampleLedger()
        for account in [base["samples"]] if base else [one["state"]["samples"] for one in ranks.values()]:
            samples.merge(SampleLedger.from_json(account))
        state = ranks[holders[0]]["state"]
        return {
            "generation": generation, "step": step, "holders": holders, "state": state, "samples": samples,
            "logs": set() if base else covered, "base": base,
        }  # fmt: skip
    return None
