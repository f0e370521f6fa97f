"""What trials are drawn and which go on, by Ray Tune's own parts but without a cluster."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lepton_ray.settings.tuning import DimensionSettings, TuningSettings
from lepton_ray.tuning.draws import NUMBER, OBJECTIVE, OptunaDraws, draw_all, drawn_of, value_of
from lepton_ray.tuning.schedulers import EPOCH, Within, make_scheduler
from lepton_ray.tuning.trials import FINISHED, RUNNING, STOPPED, Evaluation, Segment, Trial, run_name

LR, KIND, BETAS, WIDTH = (
    "training.optimizer.learning_rate", "training.optimizer.name", "training.optimizer.betas", "task.options.width",
)  # fmt: skip
SPACE: dict[str, Any] = {
    LR: {"loguniform": [1e-4, 1e-1]},
    KIND: {"choice": ["sgd", "adam", None]},
    BETAS: {"choice": [[0.9, 0.99], [0.8, 0.9]]},
    WIDTH: {"randint": [4, 7]},
}


def tuning(**changes: Any) -> TuningSettings:
    return TuningSettings.model_validate({"search": "random", "trials": 40, "space": SPACE, **changes})


def trial(number: int, params: dict[str, Any], values: list[float], state: str = FINISHED) -> Trial:
    evaluations = tuple(Evaluation(epoch, {"accuracy": value}) for epoch, value in enumerate(values, start=1))
    return Trial(number, (Segment(run_name("s", number), params),), state, evaluations, values[-1] if values else None)


def test_a_grid_is_every_combination_once() -> None:
    """Values come out as they were written, also lists and null."""
    space = {KIND: {"grid": ["sgd", None]}, BETAS: {"grid": [[0.9, 0.99], [0.5, 0.5]]}}
    drawn = draw_all(TuningSettings.model_validate({"search": "grid", "space": space}))
    assert len(drawn) == 4
    assert {(each[KIND], tuple(each[BETAS])) for each in drawn} == {
        ("sgd", (0.9, 0.99)), ("sgd", (0.5, 0.5)), (None, (0.9, 0.99)), (None, (0.5, 0.5)),
    }  # fmt: skip


def test_random_draws_stay_in_their_bounds_and_are_plain_values() -> None:
    """Of 40 draws each listed value and each whole number comes up, and all orders of magnitude do."""
    drawn = draw_all(tuning())
    assert len(drawn) == 40
    assert {type(each[LR]) for each in drawn} == {float}
    assert {each[KIND] for each in drawn} == {"sgd", "adam", None}
    assert {each[WIDTH] for each in drawn} == {4, 5, 6}
    assert all(1e-4 <= each[LR] <= 1e-1 for each in drawn)
    assert all(any(low <= each[LR] < 10 * low for each in drawn) for low in (1e-4, 1e-3, 1e-2))


def test_draws_depend_on_the_seed_alone_and_stay_when_more_are_wanted() -> None:
    assert draw_all(tuning()) == draw_all(tuning())
    assert draw_all(tuning(trials=60))[:40] == draw_all(tuning())
    assert draw_all(tuning(seed=1)) != draw_all(tuning())


@pytest.mark.parametrize("key", SPACE)
def test_a_value_can_be_drawn_back(key: str) -> None:
    """What the journal holds can be told to Optuna."""
    dimension = DimensionSettings.model_validate(SPACE[key])
    for each in draw_all(tuning(trials=5)):
        assert value_of(dimension, drawn_of(dimension, each[key])) == each[key]


def test_optuna_first_hands_out_what_was_left_unfinished() -> None:
    """Then what it asks for, until there are as many trials as wanted; ended ones are never begun again."""
    known = [trial(n, each, [0.5], s) for n, each, s in zip(
        range(3), draw_all(tuning(trials=3)), [FINISHED, RUNNING, STOPPED], strict=True
    )]  # fmt: skip
    draws = OptunaDraws(tuning(search="optuna", trials=5), "max", known)
    assert draws.to_come == 3
    handed = [draws.suggest(f"id{n}") for n in range(3)]
    assert [each[NUMBER] for each in handed] == [1, 3, 4]
    assert {key: handed[0][key] for key in SPACE} == dict(known[1].params)
    assert draws.suggest("id3") == "FINISHED"
    for n in range(3):
        draws.on_trial_result(f"id{n}", {OBJECTIVE: 0.5, "training_iteration": 1})
        draws.on_trial_complete(f"id{n}", {OBJECTIVE: 0.7})


def test_optuna_learns_also_from_the_trials_of_an_earlier_driver() -> None:
    """With 30 known trials of f(x) = -(x - 0.2)^2 its draws lie nearer to 0.2 than chance."""
    space = {"task.options.dropout": {"uniform": [0.0, 1.0]}}
    section = TuningSettings.model_validate({"search": "optuna", "trials": 50, "space": space})
    known = [
        trial(n, {"task.options.dropout": x}, [-((x - 0.2) ** 2)]) for n, x in enumerate(i / 29 for i in range(30))
    ]
    draws = OptunaDraws(section, "max", known)
    distances = [abs(draws.suggest(f"id{n}")["task.options.dropout"] - 0.2) for n in range(20)]
    assert sum(distances) / 20 < 0.2, "by chance it is 0.34"


def asha(known: list[Trial]) -> Any:
    section = tuning(scheduler="asha", asha={"grace_epochs": 1, "reduction": 2})
    return make_scheduler(section, "max", 8, "accuracy", known)


def decisions(scheduler: Any, name: str, values: list[float]) -> list[str]:
    past = SimpleNamespace(trial_id=name)
    scheduler.on_trial_add(None, past)
    return [
        scheduler.on_trial_result(None, past, {EPOCH: epoch, OBJECTIVE: value})
        for epoch, value in enumerate(values, start=1)
    ]


def test_a_bad_trial_is_stopped_also_after_the_driver_died() -> None:
    """ASHA that is told the journal decides as the one that saw it all."""
    good, bad = [0.5, 0.6, 0.7, 0.8], [0.1, 0.2]
    live = asha([])
    assert set(decisions(live, "t000", good)) == {"CONTINUE"}
    assert decisions(live, "t001", bad)[0] == "STOP"
    again = asha([trial(0, {}, good)])
    assert decisions(again, "t001", bad)[0] == "STOP"
    assert decisions(asha([]), "t001", bad)[0] == "CONTINUE"


def test_what_pbt_makes_of_a_number_stays_in_the_space() -> None:
    """Ray multiplies by 1.2 or 0.8 without looking at bounds; whole numbers stay whole."""
    within = Within(tuning())
    config = within({LR: 0.12, KIND: "sgd", BETAS: [0.8, 0.9], WIDTH: 7})
    assert config == {LR: 0.1, KIND: "sgd", BETAS: [0.8, 0.9], WIDTH: 6}
    assert within({LR: 1e-9, WIDTH: 5, KIND: None, BETAS: []})[LR] == 1e-4
