"""Copies of a rank's shards in another node's memory, so that a lost node takes none of the state with it.

Where each rank holds a part of the state that no other has (`fsdp`), a hot copy in the memory of its own node is lost
with that node. So after each copy the rank sends it to its buddy, a rank of the next node, which puts it beside its
own. With `ddp` every node has the whole state anyway, and nothing is sent.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from lepton_ray.training.collectives import gather_bytes
from lepton_ray.training.hot_folder import SHARED_MEMORY
from lepton_ray.training.hot_memory import Buffer, make_memory
from lepton_ray.training.process_group import connections_noted

_log = logging.getLogger(__name__)
_HEAD, _SAID, _DATA = 1, 2, 3
"""Tags of the three messages of a copy: sizes, what is said of it, and itself."""


def node_identity() -> str:
    """What tells one node's shared memory from another's: pods of one machine have each their own."""
    about = SHARED_MEMORY.stat()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}-{about.st_dev}-{about.st_ino}"


def buddy_of(rank: int, nodes: Sequence[str]) -> int | None:
    """The rank that keeps a copy of this one's part: of the next node, the one in the same place; None on one node.

    Args:
        rank: of the group.
        nodes: of each rank, in the order of the ranks.
    """
    order = list(dict.fromkeys(nodes))
    if len(order) < 2:
        return None
    following = order[(order.index(nodes[rank]) + 1) % len(order)]
    there = [other for other, node in enumerate(nodes) if node == following]
    place = [other for other, node in enumerate(nodes) if node == nodes[rank]].index(rank)
    return there[place % len(there)]


class Buddies:
    """Sends one rank's copies to its buddy and keeps those of the ranks whose buddy it is.

    Made by all ranks together: making it is a collective, and so is `exchange`.

    Args:
        folder: of the node's hot copies.
        generation: of the group.
        device: of the process group's tensors.
    """

    def __init__(self, folder: Path, generation: int, device: torch.device) -> None:
        self._folder, self._generation = folder, generation
        rank = dist.get_rank()
        nodes = [part.decode() for part in gather_bytes(node_identity().encode(), device)]
        self._to = buddy_of(rank, nodes)
        self._from = [other for other in range(len(nodes)) if buddy_of(other, nodes) == rank]
        self._group = None
        if self._to is not None:
            with connections_noted():  # a rank that leaves after a failure lets go of these too
                self._group = dist.new_group(backend="gloo")
        self._turn = 0
        self._kept: dict[tuple[int, int], mmap.mmap] = {}

    def exchange(self, copy: Buffer | None) -> None:
        """Send a copy, and receive those of the ranks that send theirs here.

        Args:
            copy: this rank's, with its file written; None where it could not make one.

        Raises RuntimeError where another rank is gone.
        """
        if self._to is None:
            return
        mine = copy.said.read_bytes() if copy is not None else b""
        data = torch.frombuffer(copy.memory if copy is not None else bytearray(1), dtype=torch.uint8)
        turn, self._turn = self._turn, 1 - self._turn
        heads = {rank: torch.zeros(2, dtype=torch.int64) for rank in self._from}
        self._swap(_HEAD, torch.tensor([max(1, len(mine)), data.numel()]), heads)
        texts = {rank: torch.empty(int(head[0]), dtype=torch.uint8) for rank, head in heads.items()}
        self._swap(_SAID, torch.frombuffer(bytearray(mine or b"\n"), dtype=torch.uint8), texts)
        places = {rank: self._place(rank, turn, int(head[1])) for rank, head in heads.items()}
        self._swap(_DATA, data, {
            rank: place if place is not None else torch.empty(int(heads[rank][1]), dtype=torch.uint8)
            for rank, place in places.items()
        })  # fmt: skip
        for rank, place in places.items():
            text = bytes(texts[rank].numpy().tobytes())
            if place is not None and text != b"\n":
                self._say(rank, turn, text)

    def _swap(self, tag: int, mine: torch.Tensor, theirs: dict[int, torch.Tensor]) -> None:
        """Send one message and receive one of each rank that sends here."""
        works = [dist.irecv(tensor, rank, group=self._group, tag=tag) for rank, tensor in theirs.items()]
        works.append(dist.isend(mine, self._to, group=self._group, tag=tag))
        for work in works:
            if work is not None:  # None: this rank is not in the group
                work.wait()

    def _path(self, rank: int, turn: int) -> Path:
        return self._folder / f"g{self._generation}-rank{rank}-kept.{turn}"

    def _place(self, rank: int, turn: int, size: int) -> torch.Tensor | None:
        """The memory for a rank's copy; what it held is forgotten. None where there is none."""
        path = self._path(rank, turn)
        Path(f"{path}.json").unlink(missing_ok=True)
        if (rank, turn) not in self._kept:
            try:
                self._kept[rank, turn] = make_memory(path, size)
            except OSError as error:
                _log.warning("no copy of rank %d on this node: %s", rank, error)
                return None
        return torch.frombuffer(self._kept[rank, turn], dtype=torch.uint8)

    def _say(self, rank: int, turn: int, text: bytes) -> None:
        path = self._path(rank, turn)
        fresh = Path(f"{path}.new")
        fresh.write_bytes(text)
        fresh.replace(f"{path}.json")
