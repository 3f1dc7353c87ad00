"""Rankings of a language model's adapters: the candidates, their order, what is recommended and said."""

import dataclasses
import json
import math

import pytest
import torch

import foretune as ft
from foretune.errors import ConfigError, PlacementError
from foretune.forecasting.sequence_calibration import grown
from foretune.forecasting.sequence_forecast import forecast_sequences
from foretune.forecasting.sequence_levels import levels_of
from foretune.forecasting.sequence_simulation import linearise_sequences
from foretune.forecasting.shown import Shown
from foretune.models.identity import fingerprint
from foretune.models.placement import adapted_names
from foretune.ranking.candidates import Candidate
from foretune.ranking.finalists import Quick, is_whole
from foretune.ranking.report import RankRun
from foretune.ranking.sequence_finalists import choose_spread, gradient_scores
from foretune.ranking.sequence_report import sequence_adapter, sequence_content
from foretune.ranking.sequence_rows import TIE, compared_rows, in_order, notes_of
from foretune.ranking.sequence_table import sequence_numbers, sequence_table
from foretune.ranking.sequences import n_ranked, prepare_ranking, rank_sequences
from foretune.sequence_plan import prepare_sequences
from foretune.settings.commands import ForecastSettings, RankSettings
from foretune.settings.groups import DataConfig, ModelConfig

import sequences as made

SAMPLE = {"samples": 12, "eval_samples": 6, "max_length": 16, "batch_size": 3}
SETTINGS = RankSettings(**SAMPLE, ranks=(2, 4), finalists=8, epochs=2, learning_rate=5e-3, train_batch_size=4, alpha=16)


@pytest.fixture(scope="module")
def language():
    return made.reader()


@pytest.fixture(scope="module")
def task():
    return ft.language_task_from_datasets(made.texts(20), made.texts(8, offset=1))


@pytest.fixture(scope="module")
def ready(language, task):
    return prepare_ranking(language, task, SETTINGS)


@pytest.fixture(scope="module")
def passed():
    return []


@pytest.fixture(scope="module")
def ranking(ready, passed):
    return rank_sequences(ready, SETTINGS, passed.append)


def ranked(language, task, **changes):
    settings = dataclasses.replace(SETTINGS, **changes)
    return rank_sequences(prepare_ranking(language, task, settings), settings)


def test_rows_are_what_separate_forecasts_say(language, task, ranking):
    losses = []
    for row in ranking.rows:
        settings = ForecastSettings(**SAMPLE, **vars(row.recipe))
        plan = prepare_sequences(language, task, sequence_adapter(ranking, row.quick), settings)
        assert {site.name for site in plan.adapted.sites} == {
            ranking.sites[position].name for position in row.quick.candidate.sites
        }
        alone = forecast_sequences(plan, settings)
        assert row.loss == pytest.approx(alone.curve.forecast.order[1], abs=1e-5)
        assert row.found.run.end.eval_loss == pytest.approx(alone.run.run.end.eval_loss, abs=1e-5)
        assert row.found.linear_loss == pytest.approx(alone.run.linear_loss, abs=1e-4)
        assert row.steps == alone.to_dict()["steps"]
        losses.append(alone.curve.forecast.order[1])
    assert losses == sorted(losses)
    assert ranking.base.loss == pytest.approx(alone.run.run.probe_loss, abs=1e-6)
    assert losses[0] < ranking.base.loss


def test_the_bar_counts_the_sequences_that_go_through(ready, ranking, passed):
    assert sum(passed) == n_ranked(ready, SETTINGS)


def test_the_model_is_left_as_it_is(language, ranking):
    assert len(ranking.rows) == 8
    assert not [name for name, _ in language.model.named_parameters() if "lora" in name]


def test_finalists_are_whole_kinds_first_then_ranges(ranking):
    whole = [is_whole(row.quick.candidate, ranking.sites) for row in ranking.rows]
    assert sum(whole) == 6
    sizes = [entry.parameters for entry in ranking.quick if is_whole(entry.candidate, ranking.sites)]
    assert {max(sizes), min(sizes)} <= {row.quick.parameters for row in ranking.rows}
    kinds = {tuple(sorted({ranking.sites[at].kind for at in row.quick.candidate.sites})) for row in ranking.rows}
    assert len(kinds) >= 6


@pytest.mark.parametrize("count", [1, 2, 3, 5, 30, 10_000])
def test_so_many_finalists_as_asked_for_each_once(ranking, count):
    entries = ranking.quick
    chosen = choose_spread(entries, ranking.sites, count)
    assert len(chosen) == len({entry.candidate for entry in chosen}) == min(count, len(entries))
    assert chosen[0].parameters == max(entry.parameters for entry in entries)  # all modules at the largest rank


def test_without_whole_kinds_the_ranges_are_taken(ranking):
    ranges = [entry for entry in ranking.quick if not is_whole(entry.candidate, ranking.sites)]
    chosen = choose_spread(ranges, ranking.sites, 5)
    assert len(chosen) == 5
    assert chosen[0] == max(ranges, key=lambda entry: (entry.score, -entry.parameters))


def test_the_screen_is_the_first_step_of_gradient_descent(ready):
    """Against the losses of the model itself, B moved along the gradient that autograd gives."""
    plan = ready.plan
    linearised = linearise_sequences(plan, 10**9)
    candidate = Candidate((0, 5), 2)
    (score,) = gradient_scores(linearised, [candidate])
    sites = [linearised.sites[position] for position in candidate.sites]
    adapters = {adapter.site.name: adapter.module for adapter in plan.adapted.adapters}

    def gradients(tokens):
        total, count = 0.0, 0
        for feature in tokens.features:
            ids, labels = torch.tensor([feature["input_ids"]]), torch.tensor(feature["labels"][1:])
            logits = plan.placed(input_ids=ids).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
            count += int((labels != -100).sum())
        weights = [adapters[site.name].lora_B["default"].weight for site in sites]
        for weight in weights:
            weight.requires_grad_(True)
        found = torch.autograd.grad(total / count, weights)
        return [(gradient[:, :2] * site.rank / 2).double() for gradient, site in zip(found, sites, strict=True)]

    train, to_predict = gradients(plan.known), gradients(plan.rows.evaluation)
    inner = sum(float((one * other).sum()) for one, other in zip(train, to_predict, strict=True))
    parameters = sum(2 * (site.d_in + site.d_out) for site in sites)
    assert score == pytest.approx(inner / math.sqrt(parameters), rel=2e-2)


def test_a_budget_holds(language, task):
    for row in ranked(language, task, budget="200").rows:
        assert row.quick.parameters <= 200
    with pytest.raises(ConfigError, match="fits no candidate"):
        prepare_ranking(language, task, dataclasses.replace(SETTINGS, budget="3"))


def test_equal_sizes_hold_and_the_cheapest_step_is_taken(language, task):
    found = ranked(language, task, ranks=(8,), equal_size="300", finalists=6)
    assert found.equal_size == 300
    assert all(abs(row.quick.parameters / 300 - 1) <= 0.15 for row in found.rows)
    alike = [row for row in found.rows if row.tie or row is found.rows[0]]
    (best,) = [row for row in found.rows if row.recommended]
    assert best.compute == min(row.compute for row in alike)


def test_only_what_is_asked_for_is_placed(language, task):
    found = prepare_ranking(
        language, task, dataclasses.replace(SETTINGS, target_modules=("q_proj", "v_proj"), layers=(1,))
    )
    names = {site.name for site in found.plan.adapted.sites}
    assert names == {"model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"}
    excluded = prepare_ranking(language, task, dataclasses.replace(SETTINGS, exclude_modules=("down_proj",)))
    assert not any(site.name.endswith("down_proj") for site in excluded.plan.adapted.sites)
    with pytest.raises(PlacementError, match="module kind 'nothing' matches nothing"):
        prepare_ranking(language, task, dataclasses.replace(SETTINGS, target_modules=("nothing",)))


def test_recipes_are_candidates(language, task):
    found = ranked(language, task, finalists=2, ranks=(2,), epochs=(1, 2), learning_rate=(1e-3, 5e-3))
    assert len(found.rows) == 8
    assert {(row.recipe.epochs, row.recipe.learning_rate) for row in found.rows} == {
        (epochs, rate) for epochs in (1, 2) for rate in (1e-3, 5e-3)
    }
    assert {row.steps for row in found.rows} == {5, 10}
    assert sequence_table(found).header[2:4] == ("learning rate", "epochs")
    losses = [row.loss for row in found.rows]
    assert losses == sorted(losses)


def with_losses(ranking, losses, parameters):
    """Rows that end where they are told to."""
    changed = []
    for row, loss, count in zip(ranking.rows, losses, parameters, strict=False):
        run = dataclasses.replace(row.found.run, end=dataclasses.replace(row.found.run.end, eval_loss=loss))
        found = dataclasses.replace(row.found, run=run, linear_loss=loss)
        changed.append(
            dataclasses.replace(
                row,
                found=found,
                forecast=dataclasses.replace(row.forecast, order=(loss, loss)),
                quick=dataclasses.replace(row.quick, parameters=count),
                compute=1.0,
            )
        )
    return changed


def test_the_cheapest_of_the_ties_is_recommended_and_what_has_no_loss_comes_last(ranking):
    marked = in_order(with_losses(ranking, [math.nan, 2.0 + 1.1 * TIE, 2.0 + 0.9 * TIE, 2.0], [1, 10, 20, 30]))
    assert [row.quick.parameters for row in marked] == [30, 20, 10, 1]
    assert [row.tie for row in marked] == [False, True, False, False]
    assert [row.recommended for row in marked] == [False, True, False, False]


def tried(row, *trials):
    """A row with trials: their rows, and their losses, or None for one that diverged."""
    held = ({"rows": rows, "outcomes": {"eval_loss": math.nan if loss is None else loss}, "diverged": loss is None}
            for rows, loss in trials)  # fmt: skip
    return dataclasses.replace(row, trials=tuple(held))


def test_rows_that_were_tried_alike_come_first_in_the_order_of_their_trials(ranking):
    first, second, third, fourth, fifth = with_losses(ranking, [2.0, 2.001, 2.1, 2.2, 2.3], [10, 20, 30, 40, 50])
    rows = [tried(first, (32, 3.0), (64, 2.5)), tried(second, (32, 3.5), (64, 2.4), (80, 2.3)),
            tried(third, (32, 2.0)), tried(fourth, (32, None)), fifth]  # fmt: skip
    assert compared_rows(rows) == 64
    found = in_order(rows)
    assert [row.quick.parameters for row in found] == [20, 10, 30, 50, 40]
    assert [row.tie for row in found] == [False] * 5
    assert found[0].recommended
    assert [row.diverged for row in found] == [None] * 4 + [32]
    said = notes_of(found, ranking.base, 12, 12)
    assert "The first 2 rows are ordered by their trials on 64 rows, the others by simulated runs" in said[0]
    assert said[1] == "1 of 5 rows diverged in a trial: they stand last."
    near = in_order([tried(first, (32, 2.51)), tried(second, (32, 2.5)), third])
    assert [row.quick.parameters for row in near] == [20, 10, 30]
    assert [row.tie for row in near] == [False, True, False]
    assert near[1].recommended  # the smaller of two that tie


def test_a_row_that_alone_was_tried_stays_where_it_is(ranking):
    rows = with_losses(ranking, [2.0, 2.1, 2.2], [10, 20, 30])
    rows[1] = tried(rows[1], (32, 1.0))
    assert compared_rows(rows) is None
    assert [row.quick.parameters for row in in_order(rows)] == [10, 20, 30]


def test_what_is_said_of_the_rows(ranking):
    base = ranking.base
    alike = in_order(with_losses(ranking, [base.loss] * 3, [10, 20, 30]))
    said = notes_of(alike, base, 12, 12)
    assert "The order is that of the simulated runs, no level is forecast" in said[0]
    assert any("no run of this model" in note for note in said)
    assert "nearer than 0.015 nats a token are ties" in said[0]
    assert any("all 3 rows tie" in note for note in said)
    assert any("No row ends more than" in note for note in said)
    assert not any("known rows are simulated" in note for note in said)
    assert any("The runs on the 12 known rows are simulated, of 13" in note for note in notes_of(alike, base, 12, 13))


def test_rows_that_leave_their_ground_are_marked(language, task):
    wild = ranked(language, task, learning_rate=0.2, finalists=2, ranks=(2,))
    assert any(row.found.apart for row in wild.rows)
    table = sequence_table(wild)
    column = table.header.index("linear loss")
    assert [row[column].endswith("!") for row in table.rows] == [row.found.apart for row in wild.rows]
    assert "'!'" in table.caption
    assert any("leave the ground" in note for note in wild.notes)


def test_the_content_is_json_and_gives_no_level(ranking):
    run = RankRun((ModelConfig("m"),), (DataConfig("d"),), SETTINGS)
    content = json.loads(json.dumps(sequence_content(ranking, run, choose=3)))
    (held,) = content["rankings"]
    assert content["calibration"] == "smollm2"
    assert content["chosen"]["place"] == 3
    assert all(row["forecast"]["levels"] is None for row in held["rows"])
    assert held["candidates"] == len(ranking.quick)
    for row, known in zip(held["rows"], ranking.rows, strict=True):
        assert row["eval_loss"] == known.loss
        assert row["simulated"]["eval_loss"] == known.found.run.end.eval_loss
        assert row["simulated"]["eval_perplexity"] == pytest.approx(math.exp(known.found.run.end.eval_loss))
        assert row["layers"] == sorted({int(name.split(".")[2]) for name in row["modules"]})
        assert set(row["modules"]) == set(
            adapted_names(made.tiny_language_model(), sequence_adapter(ranking, known.quick))
        )
    assert len(sequence_numbers(ranking).rows) == 8
    assert sequence_content(ranking, run, choose=9)["chosen"] is None


def test_too_many_runs_are_refused(language, task):
    with pytest.raises(ConfigError, match="at most 256 are simulated"):
        prepare_ranking(
            language, task, dataclasses.replace(SETTINGS, finalists=100, epochs=(1, 2), learning_rate=(1e-3, 1e-4))
        )


def test_the_best_of_each_size_comes_before_the_second_of_any():
    sites = [ft.Site(f"layers.{layer}.q", layer, "q", 4, 4, 1, 1.0) for layer in range(4)]
    entries = [
        Quick(Candidate(positions, 1), str(positions), 8 * len(positions), score)
        for positions, score in (((0,), 9.0), ((1,), 8.0), ((2, 3), 1.0), ((0, 1, 2), 0.5), ((0, 1), 7.0))
    ]
    chosen = choose_spread(entries, sites, 3)
    assert [entry.score for entry in chosen] == [9.0, 7.0, 8.0]


def test_of_a_model_that_was_seen_every_row_has_a_level_with_its_interval(ready):
    calibration = made.calibration(fingerprint(ready.plan.placed))
    settings = dataclasses.replace(SETTINGS, finalists=3)
    found = rank_sequences(ready, settings, calibration=calibration)
    levels = [row.forecast.levels["eval_loss"] for row in found.rows]
    assert all(level.low < level.value < level.high for level in levels)
    assert [row.loss for row in found.rows] == sorted(level.value for level in levels)
    first = sequence_table(found).rows[0]
    assert f"{levels[0].value:.3f} [{levels[0].low:.3f}, {levels[0].high:.3f}]" in first
    assert "The order is that of the forecasts." in found.notes[0]
    assert (
        "The runs on the 12 known rows are simulated, of 20; what more rows bring is what others gained." in found.notes
    )
    assert {row.steps for row in found.rows} == {10}
    trial = Shown(16, 0, 6, {"eval_loss": 1.5, "perplexity": math.exp(1.5)}, math.exp(1.5), 2, diverged=False)
    row = found.rows[-1]
    after = levels_of(ready.plan, calibration).forecast(row.found, row.run, [trial]).levels["eval_loss"]
    base = found.base.loss
    assert after.value == pytest.approx(base - grown(base, base - 1.5, 0.2 * math.log2(20 / 16)), abs=1e-6)
