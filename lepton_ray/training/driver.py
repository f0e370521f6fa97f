"""What the driver of any run does: record, lease, attempt, ranks, outcome. The run's own work is a `Job`."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

import lepton_ray
from lepton_ray.cluster import Cluster, connect
from lepton_ray.errors import LeptonError, UnavailableError, UsageError, shown
from lepton_ray.settings import Settings
from lepton_ray.settings.loading import parse_yaml
from lepton_ray.storage import Store
from lepton_ray.training.checkpoints import CheckpointStore
from lepton_ray.training.hot_folder import remove_copies
from lepton_ray.training.launch import check_resources, launch
from lepton_ray.training.lease import RunLease
from lepton_ray.training.plan import RankPlan, RankWork
from lepton_ray.training.progress import Progress, ProgressWatch
from lepton_ray.training.record import FAILED, FINISHED, INTERRUPTED, RunRecord, spec_key
from lepton_ray.training.watchdog import watching

FREE_TO_CHANGE = (
    "training.workers", "training.cpus_per_worker", "training.gpu", "training.max_failures", "training.checkpoint",
    "training.divergence_every_steps", "training.logging", "training.parallel", "training.watchdog", "training.standby",
    "publish", "serving", "data.source", "data.reading",
)  # fmt: skip
"""Settings that a resumed run may have otherwise than before; all others decide what the run computes."""
_GENERATION = re.compile(r"g([0-9]+)-rank0\.json")


@dataclass(frozen=True)
class Job:
    """What the ranks of one attempt are given, and what the record says of it."""

    work: RankWork
    exact: Callable[[Mapping[str, Any]], bool]
    """From what rank 0 returned: whether its sample ledger is that of the undisturbed run."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the run's record."""
    transforms: Mapping[str, Any] = field(default_factory=dict)
    table_fingerprint: str = ""
    initial: Any = None
    """What the driver found of `training.initial.weights`."""


class RunDriver:
    """Drives one run to its end: the same name resumes where an earlier attempt stopped, and is done when it finished.

    Args:
        settings: the whole tree.
        store: where everything is kept.
        on_progress: called with the newest figures about once a second.
    """

    def __init__(self, settings: Settings, store: Store, on_progress: Callable[[Progress], None]) -> None:
        self.settings, self.store = settings, store
        self._on_progress = on_progress

    def drive(self, same: Callable[[RunRecord], None], prepare: Callable[[], Job]) -> tuple[RunRecord, bool]:
        """Run to the end; the finished record, and whether an earlier attempt had been at it.

        Args:
            same: raises UsageError where the record is of other work than is asked for now.
            prepare: checks all that can be wrong before anything is written, and gives the job.

        Raises UsageError for anything that is wrong before a worker starts, RefusedError where another driver holds
        the run, LeptonError with the failed rank's own words where the run gives up.
        """
        run = self.settings.run
        record = RunRecord.open(self.store, run)
        if self._finished(record, same):
            return record, True
        job = prepare()
        with connect() as cluster:
            self._check_cluster(cluster)
            lease = RunLease.acquire(self.store, run)
            try:
                record = RunRecord.open(self.store, run)  # another driver may have changed it meanwhile
                if self._finished(record, same):
                    return record, True
                resumed = record.exists
                self._attempt(cluster, lease, record, job)
                return record, resumed
            finally:
                lease.release()

    def generations(self) -> list[int]:
        """The numbers of the worker groups that the run had, over all attempts."""
        names = self.store.list_names(f"runs/{self.settings.run}/ledger")
        return [int(found.group(1)) for name in names if (found := _GENERATION.fullmatch(name))]

    def _failures(self, generations: Sequence[int]) -> int:
        """How many of these worker groups ended by a failure: those that left when told to did not."""
        entries = (self.store.get(f"runs/{self.settings.run}/ledger/g{number}-rank0.json") for number in generations)
        return sum(not json.loads(entry).get("left") for entry in entries)

    def _finished(self, record: RunRecord, same: Callable[[RunRecord], None]) -> bool:
        """Whether the run is done already. Raises UsageError where it was started with other settings or data."""
        if record.exists:
            self._check_unchanged()
            same(record)
        return bool(record.fields.get("state") == FINISHED)

    def _check_unchanged(self) -> None:
        run = self.settings.run
        before = _flat(parse_yaml(self.store.get(spec_key(run)).decode(), spec_key(run)))
        now = _flat(self.settings.model_dump(mode="json"))
        changed = [
            f"{key} was {shown(before.get(key))}, is {shown(now.get(key))}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and not key.startswith(FREE_TO_CHANGE)
        ]
        if changed:
            raise UsageError(
                f"run {run} was started otherwise: {'; '.join(changed)}; set them back or name another run"
            )

    def _attempt(self, cluster: Cluster, lease: RunLease, record: RunRecord, job: Job) -> None:
        run = self.settings.run
        self.store.put(
            spec_key(run),
            yaml.safe_dump(self.settings.model_dump(mode="json"), sort_keys=False).encode(),
        )
        record.fields.update(
            job.facts,
            workers=self.settings.training.most_workers,
            transforms=job.transforms,
            table_fingerprint=job.table_fingerprint,
            initial=job.initial.to_json() if job.initial is not None else None,
            model_version=None,
            environment=environment(),
        )
        record.begin_attempt(lease.attempt)
        CheckpointStore(self.store, run, lease.attempt).collect_orphans()
        before = self.generations()
        watch = ProgressWatch(self.store, run, max(before, default=0))

        def poll(*, now: bool = False) -> None:
            if progress := watch.poll(now=now):
                self._on_progress(progress)

        plan = RankPlan(
            self.settings, self.store.uri, lease.attempt, job.transforms, job.table_fingerprint,
            record.fields["created_at"], job.initial,
        )  # fmt: skip
        state, changes = INTERRUPTED, dict[str, Any]()
        try:
            with watching(plan, self.store, cluster):
                outcome = launch(plan, job.work, watch=poll, lost=lease.lost, cluster=cluster)
            changes = {**outcome, "samples_exact": job.exact(outcome)}
            state = FINISHED
        except UnavailableError as error:  # what the run needs was lost, the run has not failed
            changes = {"error": str(error)}
            raise
        except LeptonError as error:
            state, changes = FAILED, {"error": str(error)}
            raise
        except KeyboardInterrupt:
            changes = {"wanted": False}  # whoever pressed it does not expect the run to come back by itself
            raise
        finally:
            if state in (FINISHED, FAILED):
                remove_copies(self.store.uri, run, record.fields["created_at"])
            if not lease.lost.is_set():
                generations = sorted(set(self.generations()) - set(before))
                record.fields["attempts"][-1]["generations"] = len(generations)
                record.fields["failures"] += self._failures(generations[:-1]) + (state == FAILED)
                record.end_attempt(state, **changes)
        poll(now=True)

    def _check_cluster(self, cluster: Cluster) -> None:
        import ray
        from ray._private.state import state

        most = dict(ray.cluster_resources())
        if not cluster.local:  # an autoscaler may add nodes up to what its config allows
            for kind, amount in (state.get_max_resources_from_cluster_config() or {}).items():
                most[kind] = max(most.get(kind, 0.0), float(amount))
        check_resources(self.settings.training, cluster, most)


def environment() -> dict[str, str]:
    """What the run's figures depend on beside its settings: versions and the driver's machine."""
    packages = ("lepton-ray", "ray", "torch", "torchmetrics", "numpy", "pyarrow", "safetensors", "transformers", "peft")
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # an extra, or run from a source tree that is not installed
            if name == "lepton-ray":
                found[name] = lepton_ray.__version__
    if revision := _git_revision():
        found["git_revision"] = revision
    return found


def _git_revision() -> str | None:
    """The revision of the folder that the job runs in, with `+changes` where files differ; None without git."""
    import subprocess

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    revision = git("rev-parse", "HEAD")
    if revision and git("status", "--porcelain", "--untracked-files=no"):
        return f"{revision}+changes"
    return revision


def settings_digest(settings: Settings) -> str:
    """SHA-256 of the resolved settings in canonical JSON."""
    return hashlib.sha256(json.dumps(settings.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix.removesuffix("."): tree}
    return {key: value for name, inner in tree.items() for key, value in _flat(inner, f"{prefix}{name}.").items()}
