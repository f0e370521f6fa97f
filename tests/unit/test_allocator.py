"""Memory that a step frees stays with the process, so that the next step takes no page faults for it."""

from __future__ import annotations

import resource
import threading

import torch
from ranks import run_ranks

from lepton_ray.training.allocator import keep_freed_memory


def faults_of_steps(kept: bool) -> int:
    """Page faults of a thread that allocates and frees as a step does, after it has done so before."""
    if kept:
        assert keep_freed_memory()
    counted = []

    def steps() -> None:
        for turn in range(40):
            if turn == 20:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            held = [torch.zeros(300_000) for _ in range(16)]
            del held
        counted.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

    thread = threading.Thread(target=steps)
    thread.start()
    thread.join()
    return counted[0]


def test_a_step_takes_the_memory_of_the_step_before() -> None:
    plain, kept = run_ranks(faults_of_steps, 1, False)[0], run_ranks(faults_of_steps, 1, True)[0]
    assert kept < 0.1 * plain, f"{kept} page faults, {plain} without"
