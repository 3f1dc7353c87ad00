"""What a spend buys, as properties of any plan."""

from dataclasses import replace
from itertools import pairwise
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretune.errors import ConfigError
from foretune.settings.groups import Recipe
from foretune.trials.plan import Extent, plan_trials, smallest

RECIPES = st.lists(
    st.builds(Recipe, epochs=st.integers(1, 12), train_batch_size=st.sampled_from([4, 8, 32, 100])),
    min_size=1,
    max_size=6,
)
EXTENTS = st.builds(
    Extent,
    run_rows=st.integers(2, 200_000),
    known_rows=st.integers(2, 200_000),
    eval_rows=st.integers(1, 3000),
    outputs=st.integers(1, 120),
)
SHARES = st.floats(1e-4, 1.0)


def planned(recipes, extent, share, **options):
    try:
        return plan_trials(recipes, extent, share, **options)
    except ConfigError:
        return None


def largest(plan):
    return max(plan.trials, key=lambda trial: trial.rows)


@given(RECIPES, EXTENTS, SHARES)
def test_a_plan_keeps_its_rules(recipes, extent, share):
    plan = planned(recipes, extent, share)
    if plan is None:
        return
    assert plan == plan_trials(recipes, extent, share)
    dearest = max(recipe.epochs for recipe in recipes) * extent.run_rows
    assert plan.budget == pytest.approx(share * dearest)
    assert plan.passes == pytest.approx(sum(trial.passes for trial in plan.trials))
    assert plan.passes <= plan.budget
    assert len({(trial.candidate, trial.rows) for trial in plan.trials}) == len(plan.trials)
    assert [trial.rows for trial in plan.trials] == sorted(trial.rows for trial in plan.trials)
    top = largest(plan)
    most = min(extent.run_rows // 2, extent.known_rows)
    assert top.candidate == 0
    assert top.passes >= plan.budget / 2 or top.rows == most
    for trial in plan.trials:
        recipe = recipes[trial.candidate]
        assert max(32, 2 * extent.outputs) <= trial.rows <= most
        assert recipe.epochs * ceil(trial.rows / recipe.train_batch_size) >= 4
        trained, evaluated = recipe.epochs * trial.rows, trial.evaluations * extent.eval_rows / 3
        assert trial.passes == pytest.approx(trained + evaluated)
        every = recipe.epochs * extent.eval_rows / 3
        assert trial.evaluations == (recipe.epochs if every <= (trained + every) / 5 + 1e-9 else 1)
    smaller = sorted({trial.rows for trial in plan.trials} - {top.rows})
    assert all(large % small == 0 and large // small >= 4 for small, large in pairwise(smaller))
    assert not smaller or 3 * smaller[-1] <= top.rows


@given(RECIPES, EXTENTS, SHARES, SHARES)
def test_more_money_buys_no_smaller_trial(recipes, extent, one, other):
    little, much = planned(recipes, extent, min(one, other)), planned(recipes, extent, max(one, other))
    if little is not None:
        assert largest(little).rows <= largest(much).rows


@given(RECIPES, EXTENTS, SHARES)
def test_few_rows_for_several_many_for_the_best(recipes, extent, share):
    plan = planned(recipes, extent, share)
    if plan is None:
        return
    rungs = {}
    for trial in plan.trials:
        rungs.setdefault(trial.rows, []).append(trial.candidate)
    for rung, rows in enumerate(sorted(rungs, reverse=True)):
        assert len(rungs[rows]) <= 2 ** (rung + 2)  # a rung that nobody could pay may lie between
    assert len(rungs[max(rungs)]) == 1
    for rows in sorted(rungs)[:-1]:
        able = [recipe for recipe in recipes if smallest(recipe, extent.outputs) <= rows]
        assert len(rungs[rows]) >= min(2, len(able), len(recipes)) or rungs[rows] == [0]


def test_one_candidate_has_nested_trials():
    plan = plan_trials([Recipe(epochs=3)], Extent(67_000, 67_000, 512, 2), 0.02)
    assert [trial.rows for trial in plan.trials] == [132, 896]
    assert [trial.evaluations for trial in plan.trials] == [1, 3]
    assert "of 2% asked for, of the 201,000 sample passes of one run of 67,000 rows" in plan.note


def test_sizes_of_a_smaller_spend_are_found_again():
    recipe, extent = Recipe(epochs=4), Extent(50_000, 50_000, 300, 6)
    little, much = (plan_trials([recipe], extent, share) for share in (0.01, 0.05))
    nested = {trial for trial in little.trials if trial != largest(little)}
    assert nested
    assert nested <= set(much.trials)


def test_a_second_stage_gives_the_rest_to_the_best():
    recipes, extent = [Recipe(epochs=3)] * 4, Extent(20_000, 20_000, 256, 2)
    first = plan_trials(recipes, extent, 0.05)
    small = tuple(trial for trial in first.trials if trial != largest(first))
    assert {trial.candidate for trial in small} >= {0, 1}
    second = plan_trials(recipes, extent, 0.05, order=[2, 0, 1, 3], done=small)
    assert set(small) < set(second.trials)
    assert largest(second).candidate == 2
    assert largest(second).rows >= largest(first).rows
    assert second.passes <= second.budget


def test_the_dearest_recipe_counts():
    recipes = [Recipe(epochs=2), Recipe(epochs=10)]
    plan = plan_trials(recipes, Extent(10_000, 10_000, 100, 2), 0.05)
    assert plan.budget == 5000
    assert "by the dearest recipe, 10 epochs" in plan.note


def test_nothing_is_bought_for_nothing():
    assert plan_trials([Recipe()], Extent(100, 100, 10, 2), 0.0).trials == ()


def test_a_spend_too_small_says_what_the_smallest_costs():
    extent = Extent(4000, 4000, 60, 2)
    with pytest.raises(ConfigError, match=r"^spend = 0\.4% buys no trial: the smallest, 32 rows .*, costs 0\.92% of "
                       r"the run of 4,000 rows; raise --spend"):  # fmt: skip
        plan_trials([Recipe(epochs=4)], extent, 0.004)
    assert plan_trials([Recipe(epochs=4)], extent, 0.01).trials


def test_a_run_too_small_for_trials():
    with pytest.raises(
        ConfigError, match=r"takes 32 rows, and a run of 50 rows has trials of 25 at most; leave --spend"
    ):
        plan_trials([Recipe()], Extent(50, 50, 10, 2), 0.5)


def test_the_rows_run_out_before_the_money():
    plan = plan_trials([Recipe()], Extent(300, 300, 10, 2), 1.0)
    assert largest(plan).rows == 150
    assert "no trial takes more than 150 rows" in plan.note


def test_smallest_makes_four_steps():
    assert smallest(Recipe(epochs=1, train_batch_size=32), 2) == 97
    assert smallest(Recipe(epochs=4, train_batch_size=64), 2) == 32
    assert smallest(replace(Recipe(), epochs=4), 77) == 154
