"""Leaving before the end of a run, all ranks together.

Because of a preemption: a checkpoint at this very step within the grace that is left, then `Preempted`. To let a larger
group follow: after a checkpoint that was due anyway, then `MadeRoom`.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from lepton_ray.errors import LeptonError, RefusedError
from lepton_ray.monitoring.incidents import Incident, report
from lepton_ray.training import notices
from lepton_ray.training.checkpoint_writer import CheckpointWriter, NonFiniteStateError
from lepton_ray.training.collectives import all_say, gather_bytes
from lepton_ray.training.context import RankContext
from lepton_ray.training.preemption import MadeRoom, Preempted

_log = logging.getLogger(__name__)
MARGIN = 0.1
"""Share of the grace that is left to raise, to tell and to stop; at most MARGIN_S."""
MARGIN_S = 1.0
GROW_S = 120.0
"""Seconds within which a checkpoint must be committed for the run to grow after it."""
TELL_S = 0.5
"""Seconds that the report of the incident may take at least, when the grace is over."""


def leave_preempted(
    context: RankContext, step: int, writer: CheckpointWriter, *, save: Callable[[], None], keep: Callable[[], object]
) -> NoReturn:
    """Make this step durable within the grace that is left, on all ranks together, and raise Preempted.

    Args:
        context: the rank's place in its run.
        step: steps that are done.
        writer: of the rank's checkpoints.
        save: hands the state to the writer; a collective.
        keep: puts the state into the node's shared memory, for ranks that go on there.
    """
    grace = context.training.checkpoint.grace_s
    mine = notices.preempted()
    left = None if mine is None else mine.left_s(grace)
    parts = [json.loads(part) for part in gather_bytes(json.dumps(left).encode(), context.device)]
    told = {rank: part for rank, part in enumerate(parts) if part is not None}
    until = time.monotonic() + _usable(min(told.values(), default=grace))
    started = time.monotonic()
    keep()
    committed = _committed(context, writer, save, until)
    took = time.monotonic() - started
    gone = Preempted(context.run, step, tuple(told), committed=committed)
    context.say("preempted", step=step, ranks=list(told), committed=committed, seconds=round(took, 3))
    context.ledger.leave("preempted")
    if context.leads:
        incident = Incident(
            kind="preempted", reason=str(gone), attempt=context.plan.attempt, generation=context.generation,
            rank=next(iter(told), None), step=step,
            evidence={"ranks": list(told), "grace_left_s": list(told.values()), "committed": committed, "save_s": took},
        )  # fmt: skip
        telling = threading.Thread(target=report, args=(context.store, context.run, incident), daemon=True)
        telling.start()
        telling.join(max(TELL_S, until - time.monotonic()))  # storage that is slow or away must not hold the rank
    raise gone  # the notice stands: this process is not to be used again


def leave_to_grow(context: RankContext, step: int, writer: CheckpointWriter, *, keep: Callable[[], object]) -> None:
    """After the checkpoint of this step: wait for its commit, and raise MadeRoom on all ranks.

    Returns where it could not be committed: the run goes on as it is, and tries again at its next checkpoint.
    Arguments as for `leave_preempted`.
    """
    keep()
    try:
        done = writer.finish(within_s=GROW_S)
    except LeptonError as error:
        if isinstance(error, RefusedError) and not isinstance(error, NonFiniteStateError):  # fenced
            raise
        _log.warning("the run does not grow here: its checkpoint could not be written: %s", error)
        done = False
    if not all_say(done, context.device):
        return
    context.say("made room", step=step, world_size=context.world_size)
    context.ledger.leave("made_room")
    raise MadeRoom(context.run, step, context.world_size)


def _usable(left_s: float) -> float:
    return left_s - min(MARGIN_S, MARGIN * max(left_s, 0.0))


def _committed(context: RankContext, writer: CheckpointWriter, save: Callable[[], None], until: float) -> bool:
    """Save and wait for the commit, as long as there is time; whether it was committed. The same on all ranks."""
    if writer.waits and not all_say(writer.settle(within_s=until - time.monotonic()), context.device):
        _log.warning("preempted: the checkpoint before is still being written, and the grace is over")
        return False
    save()
    try:
        done = writer.finish(within_s=until - time.monotonic())
    except LeptonError as error:
        if isinstance(error, RefusedError) and not isinstance(error, NonFiniteStateError):  # fenced
            raise
        _log.warning("preempted: the checkpoint could not be written: %s", error)
        done = False
    return all_say(done, context.device)
