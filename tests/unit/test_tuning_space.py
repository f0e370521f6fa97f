"""The section `tuning` of a config: what is accepted, what is told, and what a trial's settings become."""

from __future__ import annotations

from typing import Any

import pytest

from lepton_ray.errors import UsageError
from lepton_ray.settings import Settings, parse_settings
from lepton_ray.tuning.space import changed_settings, check_space, trial_count, trial_settings, tuning_of
from lepton_ray.tuning.trials import Segment

LR = "training.optimizer.learning_rate"


def settings(tuning: dict[str, Any] | None = None, **training: Any) -> Settings:
    section = {"search": "grid", "space": {LR: {"grid": [0.1, 0.2]}}, **(tuning or {})}
    return parse_settings({"run": "search", "training": training, "tuning": section})


def no_check(_: Settings) -> None:
    """Nothing a task minds."""


@pytest.mark.parametrize(
    ("tuning", "words"),
    [
        ({"space": {}}, "at least 1"),
        ({"space": {LR: {}}}, "has nothing; give exactly one of grid, choice, uniform"),
        ({"space": {LR: {"grid": [1], "choice": [2]}}}, "has grid and choice"),
        ({"space": {LR: {"uniform": [2, 1]}}, "search": "random", "trials": 1}, "uniform goes from 2 to 1"),
        ({"space": {LR: {"loguniform": [0, 1]}}, "search": "random", "trials": 1}, "must be above 0"),
        ({"space": {LR: {"choice": [1]}}}, "search grid takes grid only"),
        ({"trials": 3}, "a grid has as many as combinations"),
        ({"search": "random", "trials": 3}, "space has grid, which search random does not take"),
        ({"search": "random", "space": {LR: {"choice": [1]}}}, "trials: missing"),
        ({"search": "optuna", "scheduler": "pbt", "trials": 2, "space": {LR: {"choice": [1]}}}, "pbt draws its"),
        ({"searching": "grid"}, "did you mean 'search'"),
        ({"space": {"lr": {"grid": [1]}}}, "should match pattern"),
        ({"pbt": {"quantile": 0.6}}, "tuning.pbt.quantile is 0.6"),
        ({"space": {LR: {"gird": [1]}}}, f"tuning.space.{LR}.gird: unknown key; did you mean 'grid'?"),
    ],
)
def test_a_wrong_section_is_refused_with_key_and_reason(tuning: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=r"tuning") as caught:
        settings(tuning)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tuning", "training", "words"),
    [
        ({"space": {"data.version": {"grid": [1]}}}, {}, "only settings under training and task.options"),
        ({"space": {"training.workers": {"grid": [1]}}}, {}, "training.workers: cannot be tuned; all trials run on"),
        ({"space": {"training.checkpoint.keep": {"grid": [2]}}}, {}, "cannot be tuned"),
        ({"space": {LR: {"grid": [0.1, -1.0]}}}, {}, f"tuning.space.{LR}: {LR} is -1.0"),
        ({"space": {"training.optimizer.lerning": {"grid": [1]}}}, {}, "unknown key; did you mean 'learning_rate'"),
        ({"space": {"training.epochs.more": {"grid": [1]}}}, {}, "epochs holds 12, not further keys"),
        ({"scheduler": "asha", "space": {"training.epochs": {"grid": [1]}}}, {}, "compares trials by epochs"),
        ({"scheduler": "asha", "asha": {"grace_epochs": 12}}, {}, "no trial can end before its last epoch (12)"),
        ({"scheduler": "pbt"}, {}, "training.optimizer.schedule.name is 'cosine'"),
        ({"scheduler": "pbt", "space": {"task.options.width": {"grid": [8, 16]}}}, {}, "with scheduler pbt, which"),
        ({"scheduler": "pbt", "space": {LR: {"grid": [1]}}}, {}, "a population of 2 trials or more"),
    ],
)  # fmt: skip
def test_a_space_that_cannot_be_searched_is_told_before_anything_starts(
    tuning: dict[str, Any], training: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError) as caught:
        check_space(settings(tuning, **training), no_check)
    assert words in str(caught.value)


def test_all_faults_of_a_space_are_told_in_one_go() -> None:
    """The keys first; then each value and each bound, also by what the task minds."""
    with pytest.raises(UsageError) as caught:
        check_space(settings({"space": {"run.x": {"grid": [1]}, "training.gpu": {"grid": [True]}}}), no_check)
    assert "tuning.space.run.x" in str(caught.value)
    assert "tuning.space.training.gpu" in str(caught.value)

    def minds(trial: Settings) -> None:
        if trial.task.options.get("width", 0) > 64:
            raise UsageError(f"task.options.width is {trial.task.options['width']}: too wide")

    space = {"task.options.width": {"randint": [8, 66]}, "training.optimizer.momentum": {"uniform": [0.5, 1.0]}}
    with pytest.raises(UsageError) as caught:
        check_space(settings({"search": "random", "trials": 2, "space": space}), minds)
    assert "task.options.width is 65: too wide" in str(caught.value), "the last number that can be drawn is 65"
    assert "training.optimizer.momentum is 1.0" in str(caught.value)


def test_a_config_without_the_section_is_refused() -> None:
    with pytest.raises(UsageError, match="tuning: missing"):
        tuning_of(Settings())


def test_a_trial_has_the_settings_of_the_search_with_its_own_values() -> None:
    """Options of the task may be new; the section itself is gone, the table's version is pinned."""
    base = settings(None, epochs=7)
    params = {LR: 0.03, "task.options.width": 8, "training.optimizer.clip_norm": None}
    trial = trial_settings(base, Segment("search-t004", params), 3)
    assert (trial.run, trial.data.version, trial.tuning) == ("search-t004", 3, None)
    assert trial.training.optimizer.learning_rate == 0.03
    assert trial.training.optimizer.clip_norm is None
    assert trial.task.options == {"width": 8}
    before = base.training.model_dump()
    after = trial.training.model_dump()
    assert {k for k in before if before[k] != after[k]} == {"optimizer"}


def test_a_run_after_an_exploit_does_what_is_left_from_where_the_donor_is() -> None:
    trial = trial_settings(settings(None, epochs=7, seed=5), Segment("s-t000-p2", {LR: 1.0}, 3, "s-t001"), None)
    assert trial.training.epochs == 4
    assert trial.training.initial.weights == "run:s-t001"
    assert trial.training.initial.optimizer
    assert trial.training.initial.at_least == 1.0
    assert trial.training.seed == 8, "another order of the rows than in its first epochs"


def test_a_grid_has_as_many_trials_as_combinations() -> None:
    grid = {LR: {"grid": [0.1, 0.2]}, "training.seed": {"grid": [1, 2, 3]}}
    assert trial_count(tuning_of(settings({"space": grid}))) == 6


def test_only_what_changes_no_result_may_change_when_a_search_goes_on() -> None:
    """More trials and other checkpoints are fine; another space or seed is not."""
    space = {LR: {"choice": [0.1, 0.2]}}
    before = settings({"search": "random", "trials": 2, "space": space}).model_dump(mode="json")
    more = settings({"search": "random", "trials": 5, "concurrent": 2, "space": space}, checkpoint={"keep": 9})
    assert changed_settings(before, more.model_dump(mode="json")) == []
    other = settings({"search": "random", "trials": 2, "seed": 1, "space": space}, epochs=3)
    assert changed_settings(before, other.model_dump(mode="json")) == [
        "training.epochs was 12, is 3",
        "tuning.seed was 0, is 1",
    ]
