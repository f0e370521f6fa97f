"""The weights a run starts from: found and matched on the driver, read once by rank 0, the same on every rank.

The driver needs the model's names and shapes only, so it builds the model without memory (torch's `meta` device), and
only where `training.initial.weights` is set: the driver of a plain run has no torch.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from lepton_ray.errors import IntegrityError, LeptonError, RefusedError, UsageError, shown
from lepton_ray.settings.training import InitialSettings
from lepton_ray.storage import Store
from lepton_ray.tasks import AnyTask
from lepton_ray.training.weight_sources import KEY, WeightSource, open_source, source_checkpoint

if TYPE_CHECKING:
    import torch

    from lepton_ray.registry.weights import TensorEntry

LISTED = 5
"""Names of each kind in a message; the record has them all."""
_FLOATS = ("F64", "F32", "F16", "BF16")
_OF_OLD = {".gamma": ".weight", ".beta": ".bias"}
"""What norms of the first BERT releases were called, in their model folders to this day."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Matched:
    """Which tensors of a source go where in the model."""

    source: str
    """What was meant, exactly; see `WeightSource.ref`."""
    sha256: str
    """Of the source's bytes."""
    names: dict[str, str]
    """The source's name of each tensor of the model that was found."""
    missing: list[str]
    """Tensors of the model that the source lacks; they keep their random start."""
    unexpected: list[str]
    """Tensors of the source that the model lacks."""
    mismatched: dict[str, str]
    """Tensors that both have in different shape or kind, and how they differ."""
    ignored: list[str]
    """Tensors of the source that `training.initial.ignore` leaves out."""
    exchanged: dict[str, str]
    """Prefixes of names that were exchanged before matching, old to new."""
    share: float
    """Share of the model's values that were found."""

    def to_json(self) -> dict[str, Any]:
        """For the run's record and its log."""
        return asdict(self)


def check_initial(
    settings: InitialSettings, task: AnyTask, transforms: Mapping[str, Any], store: Store
) -> Matched | None:
    """Find the source and match it with the task's model, on the driver; None where the start is random.

    Raises UsageError where the source is missing or of the wrong kind, a pattern fits nothing, or less is matched than
    `at_least`, with the lists; UnavailableError where a remote is away.
    """
    if settings.weights is None:
        if settings.optimizer:
            raise UsageError(f"training.initial.optimizer is true: needs run:NAME in {KEY}, which is null")
        if folder := getattr(getattr(task, "options", None), "folder", None):
            _log.warning(
                "%s is null: the network of task.options.folder begins with random weights; set it to %s to begin "
                "with those of the folder", KEY, shown(folder),
            )  # fmt: skip
        return None
    source = open_source(settings.weights, store)
    if settings.optimizer:
        source_checkpoint(settings.weights, store)
    import torch

    with torch.device("meta"):
        model = task.build(transforms)
    return match(source, shapes(model), settings)


def initialise(
    model: torch.nn.Module,
    settings: InitialSettings,
    store: Store,
    device: torch.device,
    expected: Matched | None = None,
) -> Matched | None:
    """Fill the whole model, before adapters and before it is spread over the ranks; None where the start is random.

    A collective where there is a process group: rank 0 reads, checks and tells the others. What goes wrong on rank 0 is
    raised by all.

    Args:
        model: the task's model as built.
        settings: the branch of the tree.
        store: of the run; only rank 0 uses it.
        device: of the process group's collectives.
        expected: what `check_initial` found: the same version or step is taken, whatever an alias means by now.

    Raises UsageError as `check_initial`, and for values that are not finite; IntegrityError where the source is not the
    one that was checked.
    """
    if settings.weights is None:
        return None
    from safetensors.torch import load as load_tensors

    leads = _leads()
    source: WeightSource | None = None
    plan: bytes | None = None
    failure: LeptonError | None = None
    if leads:
        try:
            source = open_source(_pinned(settings.weights, expected), store)
            matched = match(source, shapes(model), settings)
            if expected is not None and expected.sha256 != matched.sha256:
                raise IntegrityError(
                    f"{KEY} {shown(matched.source)}: changed since the run was checked; start it again"
                )
            plan = json.dumps({"matched": matched.to_json(), "parts": len(source.parts)}).encode()
        except LeptonError as error:
            failure = error
    told = json.loads(_shared(plan, failure, device))
    matched = Matched(**told["matched"])
    wanted = {theirs: ours for ours, theirs in matched.names.items()}
    state = model.state_dict()
    for number in range(told["parts"]):
        data: bytes | None = None
        if source is not None:
            try:
                data = source.read(number)
            except LeptonError as error:
                failure = error
        for name, value in load_tensors(_shared(data, failure, device)).items():
            if name in wanted:
                state[wanted[name]].copy_(value)  # the values of `state_dict` are the model's own, without gradients
    return matched


def shapes(model: torch.nn.Module) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Shape of each tensor of a model's `state_dict`, and whether it holds floats."""
    return {name: (tuple(value.shape), value.is_floating_point()) for name, value in model.state_dict().items()}


def match(
    source: WeightSource, wanted: Mapping[str, tuple[tuple[int, ...], bool]], settings: InitialSettings
) -> Matched:
    """Pair the tensors of a source with those of a model: after `ignore` and `rename`, by name, shape and kind.

    Without `rename`, one exchange of prefixes is found by itself: that which gives the most values, e.g. `bert.` for
    `encoder.`; none where names fit as they are.
    """
    header = {name: entry for name, (_, entry) in source.header().items()}
    ignored = {name for pattern in settings.ignore for name in _fitting(pattern, header, "ignore")}
    found = {name: entry for name, entry in header.items() if name not in ignored}
    modern = _modern if source.from_folder else str
    exchanged = dict(settings.rename) or _best_exchange({modern(name): e for name, e in found.items()}, wanted)
    for old in settings.rename:
        if not any(name.startswith(old) for name in found):
            raise UsageError(f"training.initial.rename: no tensor begins with {shown(old)}; {_near(old, found)}")
    names: dict[str, str] = {}
    unexpected, mismatched = [], {}
    for name, entry in found.items():
        ours = _exchange(modern(name), exchanged)
        if ours in names:
            raise UsageError(
                f"training.initial.rename: {shown(names[ours])} and {shown(name)} both become {shown(ours)}"
            )
        if ours not in wanted:
            unexpected.append(name)
        elif _fits(entry, wanted[ours]):
            names[ours] = name
        else:
            mismatched[ours] = f"{entry.dtype} {list(entry.shape)}, the model has {list(wanted[ours][0])}"
    missing = [name for name in wanted if name not in names and name not in mismatched]
    total = sum(math.prod(shape) for shape, _ in wanted.values())
    share = sum(math.prod(wanted[name][0]) for name in names) / max(1, total)
    matched = Matched(
        source=source.ref, sha256=source.sha256(), names=names, missing=missing, unexpected=unexpected,
        mismatched=mismatched, ignored=sorted(ignored), exchanged=exchanged, share=share,
    )  # fmt: skip
    if not names or share < settings.at_least:
        raise UsageError(_too_little(matched, settings.at_least))
    return matched


def _too_little(matched: Matched, at_least: float) -> str:
    lists = (
        ("missing", matched.missing),
        ("not in the model", matched.unexpected),
        ("of another shape", [f"{name} ({how})" for name, how in matched.mismatched.items()]),
    )
    said = "; ".join(
        f"{what}: {', '.join(names[:LISTED])}" + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
        for what, names in lists
        if names
    )
    return (
        f"{KEY} {shown(matched.source)}: gives {matched.share:.1%} of the model's values, expected {at_least:.0%} or "
        f"more (training.initial.at_least); {said}; give training.initial.rename, or options of the same model"
    )


def _best_exchange(
    found: Mapping[str, TensorEntry], wanted: Mapping[str, tuple[tuple[int, ...], bool]]
) -> dict[str, str]:
    """The exchange of one prefix that matches the most values; empty where that is to exchange nothing."""

    def values(old: str, new: str) -> int:
        pairs = ((wanted.get(_exchange(name, {old: new})), entry) for name, entry in found.items())
        return sum(math.prod(entry.shape) for ours, entry in pairs if ours is not None and _fits(entry, ours))

    options = [(old, new) for old in _prefixes(found) for new in _prefixes(wanted)]
    best = max(options, key=lambda pair: (values(*pair), pair == ("", "")))
    return {} if best == ("", "") else {best[0]: best[1]}


def _prefixes(names: Iterable[str]) -> list[str]:
    return ["", *sorted({name.partition(".")[0] + "." for name in names if "." in name})]


def _exchange(name: str, exchanged: Mapping[str, str]) -> str:
    """The name with the longest fitting prefix exchanged."""
    for old in sorted(exchanged, key=len, reverse=True):
        if name.startswith(old):
            return exchanged[old] + name[len(old) :]
    return name


def _modern(name: str) -> str:
    for old, new in _OF_OLD.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _fits(entry: TensorEntry, wanted: tuple[tuple[int, ...], bool]) -> bool:
    """Equal shapes, and floats for floats: half precision becomes single, whole numbers never become floats."""
    return entry.shape == wanted[0] and (entry.dtype in _FLOATS) == wanted[1]


def _fitting(pattern: str, names: Iterable[str], what: str) -> list[str]:
    fitting = [name for name in names if fnmatchcase(name, pattern)]
    if not fitting:
        raise UsageError(f"training.initial.{what} has {shown(pattern)}: fits no tensor; {_near(pattern, names)}")
    return fitting


def _near(text: str, names: Iterable[str]) -> str:
    listed = list(names)
    near = difflib.get_close_matches(text, listed, n=3, cutoff=0.3) or listed[:3]
    return f"the source has {', '.join(near)} and others"


def _pinned(weights: str, expected: Matched | None) -> str:
    """The very version or step that the driver found; paths stay as they were given."""
    pinned = expected is not None and weights.startswith(("model:", "run:"))
    return expected.source if pinned and expected is not None else weights


def _leads() -> bool:
    import torch.distributed as dist

    return not dist.is_initialized() or dist.get_rank() == 0


def _shared(data: bytes | None, failure: LeptonError | None, device: torch.device) -> bytes:
    """Rank 0's bytes on every rank, or its failure raised on every rank."""
    import torch.distributed as dist

    from lepton_ray.training.collectives import broadcast_bytes

    if not dist.is_initialized():
        if failure is not None:
            raise failure
        return data or b""
    words = json.dumps([type(failure).__name__, str(failure)] if failure is not None else None).encode()
    told = json.loads(broadcast_bytes(words if _leads() else None, device))
    if failure is not None:
        raise failure
    if told is not None:
        raise (RefusedError if told[0] == "RefusedError" else UsageError)(told[1])
    return broadcast_bytes(data, device)
