"""Silent divergence: with DDP all ranks hold the same weights, bit for bit, or one of them has made an error.

A flipped bit in memory, a broken arithmetic unit or a bug leaves no other trace: the loss looks as before, and each
exchange of gradients carries the error on to all. So the ranks compare digests (`training.digests`) now and then, and
before each checkpoint. Nothing here imports torch: the error is also read where no rank runs.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence

from lepton_ray.errors import LeptonError


class Diverged(LeptonError):  # noqa: N818 - as in `Preempted`
    """The ranks' weights differ, and going back does not help or is not possible."""


def odd_ranks(digests: Sequence[tuple[int, ...]]) -> list[int]:
    """The ranks whose digest is not that of the majority; all of them where there is none (two ranks, say)."""
    (most, count), *_ = collections.Counter(digests).most_common()
    if 2 * count <= len(digests):
        return list(range(len(digests)))
    return [rank for rank, digest in enumerate(digests) if digest != most]
