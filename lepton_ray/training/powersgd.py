"""PowerSGD: gradients travel as low-rank factors, and what that leaves out is remembered and added the next time.

Vogels, Karimireddy, Jaggi 2019, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization"; the
computation is torch's (`torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook`). What a rank remembers differs from
rank to rank and decides all later steps, so it is part of a checkpoint: here it goes to tensors and back.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as torch_powersgd

from lepton_ray.errors import IntegrityError

EPSILON = 1e-8
"""Added to a column's length before dividing by it: a layer whose gradient is all zero must not become NaN."""
Averaged = torch.futures.Future[torch.Tensor]
_PARTS = {"error": "error_dict", "p": "p_memory_dict", "q": "q_memory_dict"}


class PowerSgd:
    """One rank's hook for DDP and its memory."""

    def __init__(self, rank: int, start_step: int, device: torch.device) -> None:
        self._device = device
        self._sizes: dict[int, dict[str, int]] = {}
        """Of each bucket seen: numbers in its error and in its factors."""
        self.state = torch_powersgd.PowerSGDState(
            None, matrix_approximation_rank=rank, start_powerSGD_iter=start_step, orthogonalization_epsilon=EPSILON
        )

    def hook(self, state: torch_powersgd.PowerSGDState, bucket: Any) -> Averaged:
        """Average one bucket over the ranks.

        On gloo one bucket is finished before the next begins. torch's hook starts its second and third collective from
        callbacks; with gloo these run in threads of their own, so that the ranks would start the collectives of several
        buckets in different orders and mix them up. On NCCL the callbacks run in order.
        """
        if bucket.index() not in self._sizes:
            self._sizes[bucket.index()] = self._sizes_of(bucket)
        averaged = torch_powersgd.powerSGD_hook(state, bucket)
        if bucket.buffer().device.type == "cpu":
            averaged.wait()
        return averaged

    def memory(self) -> dict[str, torch.Tensor]:
        """What must be kept to go on bit for bit: per bucket the error and both factors, the step, the random state.

        From the first step on it is of one form: what compression has not begun to remember is zero.
        """
        _, key, position, *_ = self.state.rng.get_state(legacy=True)
        numbers = [self.state.iter, int(position), dist.get_world_size(), int(bool(self.state.p_memory_dict))]
        kept = {"numbers": torch.tensor(numbers), "random": torch.from_numpy(np.asarray(key, np.int64))}
        for bucket, sizes in sorted(self._sizes.items()):
            for part, size in sizes.items():
                value = getattr(self.state, _PARTS[part]).get(bucket)
                kept[f"{part}.{bucket}"] = torch.zeros(size) if value is None else value
        return kept

    def load(self, memory: dict[str, torch.Tensor]) -> bool:
        """Go on from what `memory` gave; False, with nothing done, where another number of ranks gave it.

        Raises IntegrityError where it is no such memory; nothing is changed then.
        """
        parts: dict[str, dict[int, torch.Tensor]] = {part: {} for part in _PARTS}
        try:
            step, position, world_size, began = (int(number) for number in memory["numbers"])
            key = memory["random"].numpy().astype(np.uint32)
            for name, value in memory.items():
                part, _, bucket = name.partition(".")
                if bucket:
                    parts[part][int(bucket)] = value.to(self._device, copy=True)
            random = np.random.RandomState(0)
            random.set_state(("MT19937", key, position, 0, 0.0))
        except (KeyError, ValueError, TypeError) as error:
            raise IntegrityError(f"PowerSGD's memory is damaged ({error}); resume from another checkpoint") from error
        if world_size != dist.get_world_size():
            return False
        self.state.iter, self.state.rng = step, random
        for part, attribute in _PARTS.items():
            setattr(self.state, attribute, parts[part] if began else {})
        return True

    def forget(self) -> None:
        """Drop errors and factors, on all ranks at once; the count of steps stays.

        After a step whose gradients were not finite: what is remembered of it would spoil every later one.
        """
        for attribute in _PARTS.values():
            getattr(self.state, attribute).clear()

    def _sizes_of(self, bucket: Any) -> dict[str, int]:
        """As torch's hook counts: n x m numbers become n x r and m x r, where those are fewer than half as many."""
        sizes = {"error": bucket.buffer().numel(), "p": 0, "q": 0}
        for gradient in bucket.gradients():
            n, m = gradient.view(gradient.shape[0], -1).shape
            rank = min(n, m, self.state.matrix_approximation_rank)
            if (n + m) * rank * self.state.min_compression_rate < n * m:
                sizes["p"] += n * rank
                sizes["q"] += m * rank
        return sizes
