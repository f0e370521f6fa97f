"""Which rank keeps a copy of another one's shards."""

from __future__ import annotations

import pytest

from lepton_ray.training.hot_buddy import buddy_of


@pytest.mark.parametrize(
    ("nodes", "buddies"),
    [
        ("aa", [None, None]),
        ("ab", [1, 0]),
        ("aabb", [2, 3, 0, 1]),
        ("abab", [1, 0, 3, 2]),
        ("aaab", [3, 3, 3, 0]),
        ("aabbcc", [2, 3, 4, 5, 0, 1]),
    ],
)
def test_a_buddy_is_a_rank_of_the_next_node(nodes: str, buddies: list[int | None]) -> None:
    """The same place on the next node; where that has fewer ranks, one keeps several."""
    assert [buddy_of(rank, nodes) for rank in range(len(nodes))] == buddies
