"""Simulated runs of a study's cells: what they hold, when they are made again, and that the controls are controls."""

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from foretune.cli import run
from foretune.evaluation.predictors import OF_SCORE, predictors_of, quantities_of
from foretune.evaluation.records import read_records
from foretune.evaluation.simulations import SimulationSettings, simulate_cells
from foretune.forecasting.linearise import linearise
from foretune.forecasting.simulated_runs import simulate_runs
from foretune.study.cell import simulation_file
from foretune.study.grid import read_grid
from foretune.study.keys import cell_key

import cases

CLASSES, NAMES = predictors_of("classification"), set(quantities_of("classification"))


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulations")
    model, dataset = cases.save(folder / "model"), cases.write_reviews(folder / "reviews")
    content = {
        "models": [model],
        "datasets": [{"dataset": dataset, "name": "few", "family": "reviews", "max_train": 30}, dataset],
        "placements": [{"target_modules": ["query"]}, {"target_modules": ["query", "value"], "layers": [1]}],
        "ranks": [2, 4],
        "score": {"samples": 8, "eval_samples": 8, "draws": 1},
        "train": {"epochs": 2, "learning_rate": 2e-2, "train_batch_size": 8, "train_eval_samples": 0},
    }
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def content_of(store, cell):
    return json.loads(simulation_file(store, cell_key(cell), 20).read_text(encoding="utf-8"))


def test_every_cell_of_a_study_is_simulated(grid, tmp_path):
    store = tmp_path / "study"
    tokens = ["study", "outlook", str(grid), "--output", str(store), "--samples", "20", "--eval-samples", "10"]
    assert run(tokens) == 0
    cells = read_grid(grid)
    contents = {cell: content_of(store, cell) for cell in cells}
    for cell, content in contents.items():
        assert content["output"] == "margin"
        assert content["train_rows"] == (30 if cell.data_name == "few" else 60)
        assert content["course"]["steps"][-1] == (8 if cell.data_name == "few" else 16)
        assert {entry.name for entry in CLASSES if entry.compute} <= set(content["quantities"]) <= NAMES
        assert all(math.isfinite(value) for value in content["quantities"].values())
    assert len({content["quantities"]["simulated_eval_loss"] for content in contents.values()}) == 8
    settings = SimulationSettings(20, 10, False)
    assert simulate_cells(cells, store, settings) == 0  # they are there
    assert simulate_cells(cells[:4], store, SimulationSettings(20, 8, False)) == 4
    # a cell finds its own when it is done
    assert run(["study", str(grid), "--output", str(store)]) == 0
    records = read_records(store, cells)
    assert {record.family for record in records} == {"reviews", cells[-1].data_name}
    for record in records:
        assert record.quantities["simulated_accuracy"] is not None
        assert record.seconds["survey"] > 0
        assert record.outcomes["eval_area"] > 0


def test_a_simulation_of_other_rows_than_were_trained_is_refused(grid, tmp_path, capsys):
    cells = read_grid(grid)[:1]
    alone = tmp_path / "grid.yaml"
    content = yaml.safe_load(grid.read_text(encoding="utf-8"))
    one = {"datasets": content["datasets"][:1], "placements": content["placements"][:1], "ranks": [2]}
    alone.write_text(yaml.safe_dump({**content, **one}), encoding="utf-8")
    store = tmp_path / "study"
    assert simulate_cells(cells, store, SimulationSettings(20, 10)) == 1
    assert run(["study", str(alone), "--output", str(store)]) == 0
    path = simulation_file(store, cell_key(cells[0]), 20)
    content = json.loads(path.read_text(encoding="utf-8"))
    assert read_records(store)[0].quantities["simulated_accuracy"] is not None
    path.write_text(json.dumps({**content, "schema": 1, "train_rows": 24}), encoding="utf-8")
    capsys.readouterr()
    assert run(["study", "report", str(store)]) == 2
    assert "was trained on 30 rows, its run simulated on 24" in capsys.readouterr().err
    assert simulate_cells(cells, store, SimulationSettings(20, 10)) == 1  # an earlier version's is made again
    assert read_records(store)[0].quantities["simulated_accuracy"] is not None


@dataclass
class Pass:
    task: Any
    rows: Any
    linearised: Any
    probe: bool
    weights: dict[str, torch.Tensor]


@dataclass
class Simulation:
    of: int  # which pass
    train_a: bool
    recipe: Any
    ends: list[Any]  # of the head alone where it is simulated too, then of each cell


def test_comparisons_change_one_thing_each(grid, tmp_path, monkeypatch):
    """The controls are controls: which labels, which backbone and which head every pass and every simulation has."""
    passes, simulations = [], []

    def spied_linearise(plan, *, probe=True, autocast=None):
        linearised = linearise(plan, probe=probe, autocast=autocast)
        weights = {name: p.detach().clone() for name, p in plan.placed.named_parameters() if "lora_" not in name}
        passes.append(Pass(plan.task, plan.sample, linearised, probe, weights))
        return linearised

    def spied_simulate_runs(linearised, starts, recipe, **options):
        simulated = simulate_runs(linearised, starts, recipe, **options)
        of = [entry.linearised is linearised for entry in passes].index(True)
        ends = [outlook.end for outlook in simulated]
        simulations.append(Simulation(of, options.get("train_a", True), recipe, ends))
        return simulated

    monkeypatch.setattr("foretune.evaluation.simulations.linearise", spied_linearise)
    monkeypatch.setattr("foretune.evaluation.simulations.simulate_runs", spied_simulate_runs)
    store, cells = tmp_path / "study", read_grid(grid)[:2]
    assert simulate_cells(cells, store, SimulationSettings(20, 10, True)) == 2
    plain, random_head, permuted, backbone = passes
    assert [simulation.of for simulation in simulations] == [0, 0, 1, 2, 3]
    assert [simulation.train_a for simulation in simulations] == [True, False, True, True, True]
    assert len({simulation.recipe for simulation in simulations}) == 1
    assert [entry.probe for entry in passes] == [True, False, True, True]
    for entry in passes:  # the same rows in all
        assert np.array_equal(entry.rows.train_indices, plain.rows.train_indices)
        assert np.array_equal(entry.linearised.evaluation.labels, plain.linearised.evaluation.labels)
        assert np.array_equal(entry.linearised.train.labels, entry.task.train.labels[entry.rows.train_indices])
    for entry in (random_head, backbone):
        assert np.array_equal(entry.linearised.train.labels, plain.linearised.train.labels)
    before, after = plain.task.train.labels, permuted.task.train.labels
    assert np.array_equal(np.bincount(before), np.bincount(after))
    assert 0.2 < np.mean(permuted.linearised.train.labels == plain.linearised.train.labels) < 0.8
    for name, weight in plain.weights.items():
        assert torch.equal(weight, random_head.weights[name])
        assert torch.equal(weight, permuted.weights[name])
        if weight.ndim == 2:  # every matrix of the backbone and the head
            assert not torch.equal(weight, backbone.weights[name]), name
            assert abs(float(torch.corrcoef(torch.stack([weight, backbone.weights[name]]).flatten(1))[0, 1])) < 0.3, (
                name
            )
    names = ("simulated", "lazy", "random_head", "permuted", "random_backbone")
    for place, cell in enumerate(cells):
        quantities = content_of(store, cell)["quantities"]
        for name, simulation in zip(names, simulations, strict=True):
            assert quantities[f"{name}_accuracy"] == simulation.ends[-len(cells) :][place].eval_metric, name
        assert quantities["lazy_eval_loss"] == simulations[1].ends[place].eval_loss != quantities["simulated_eval_loss"]
        # all that is known before training comes from the score, this file, its calibration or the run's own log
        elsewhere = {e.name for e in CLASSES if e in OF_SCORE or e.forecast_of is not None or e.from_log is not None}
        assert set(quantities) == NAMES - elsewhere
    assert len({simulation.ends[-1].eval_loss for simulation in simulations}) == 5  # each changes what it says


def test_too_few_samples_to_simulate_from(grid, tmp_path, capsys):
    assert run(["study", "outlook", str(grid), "--output", str(tmp_path / "s"), "--samples", "2"]) == 2
    assert "samples = 2" in capsys.readouterr().err
