"""Files of a ranking of a language model's adapters, laid out as a classifier's."""

from pathlib import Path
from typing import Any

from peft import PeftConfig

from foretune.forecasting.sequence_simulation import DRAWS
from foretune.models.adapter_file import save_adapter
from foretune.models.output_layer import TASK_TYPES
from foretune.models.sites import split_name
from foretune.ranking.adapter import candidate_config
from foretune.ranking.finalists import Quick
from foretune.ranking.report import SCHEMA, RankRun, configuration_with, flags_file
from foretune.ranking.sequence_rows import SequenceRanking, SequenceRow
from foretune.ranking.sequence_table import sequence_candidates, sequence_numbers, sequence_table
from foretune.report.provenance import versions
from foretune.report.store import Writer, finite, plain_text, write_json, write_run
from foretune.sequence_plan import LOSS_UNIT
from foretune.settings.commands import ADAPTER_FILE, CHOSEN
from foretune.settings.groups import LanguageKind


def sequence_content(ranking: SequenceRanking, run: RankRun, *, choose: int | None = None) -> dict[str, Any]:
    """Lay a ranking out as in `result.json`: the keys of a classifier's where they mean the same.

    Args:
        ranking: Ranking.
        run: All settings.
        choose: Row of the table, from 1, that was chosen; None for the recommended one.

    Returns:
        JSON-ready values.
    """
    found = ranking.chosen(choose)
    where = {"model": ranking.model, "dataset": ranking.dataset}
    content: dict[str, Any] = finite(
        {
            "schema": SCHEMA,
            "rankings": [_content(ranking)],
            "chosen": None
            if found is None
            else {
                "place": found[0],
                **where,
                "adapter": found[1].quick.name,
                "recipe": vars(found[1].recipe),
            },
            "calibration": ranking.calibration,
            "settings": run.to_dict(),
            "versions": versions(),
        }
    )
    return content


def _content(ranking: SequenceRanking) -> dict[str, Any]:
    return {
        "model": ranking.model,
        "dataset": ranking.dataset,
        "samples": ranking.samples,
        "train_rows": ranking.train_rows,
        "eval_rows": ranking.eval_rows,
        "objective": {"kind": _kind(ranking), "noun": "tokens", "loss_unit": LOSS_UNIT},
        "steps": ranking.steps,
        "base": ranking.base.to_dict(),
        "sketches": {"draws": DRAWS, "kept": ranking.kept[0], "kept_least": ranking.kept[1]},
        "candidates": len(ranking.quick),
        **({} if ranking.equal_size is None else {"equal_size": ranking.equal_size}),
        "spend": 0.0 if ranking.spent is None else ranking.spent.share,
        "trial_passes": 0.0 if ranking.spent is None else ranking.spent.passes,
        "compared_rows": ranking.compared,
        "rows": [_row(ranking, row) for row in ranking.rows],
        "notes": list(ranking.notes),
        "seconds": dict(ranking.seconds),
    }


def _kind(ranking: SequenceRanking) -> LanguageKind:
    return next(kind for kind, name in TASK_TYPES.items() if name == ranking.template.task_type)


def _row(ranking: SequenceRanking, row: SequenceRow) -> dict[str, Any]:
    entry = row.quick
    members = [(ranking.sites[position].name, ranking.sites[position].layer) for position in entry.candidate.sites]
    if entry.config is not None:
        members = [(name, split_name(name)[0]) for name in entry.modules]
    return {
        "adapter": entry.name,
        "method": entry.method,
        "modules": [name for name, _ in members],
        "layers": sorted({layer for _, layer in members if layer is not None}),
        "rank": entry.rank,
        "recipe": vars(row.recipe),
        "steps": row.steps,
        "eval_loss": row.loss,
        "forecast": row.forecast.to_dict(),
        "simulated": None if row.found is None else row.found.end_to_dict(),
        "apart": None if row.found is None else row.apart,
        "best_step": None if row.found is None else row.best_step,
        "parameters": row.quick.parameters,
        "megabytes": row.megabytes,
        "step_cost": row.compute,
        "quick_score": row.quick.score,
        "tie": row.tie,
        "recommended": row.recommended,
        "trials": [dict(trial) for trial in row.trials],
    }


def save_sequence_ranking(ranking: SequenceRanking, run: RankRun, folder: Path, *, choose: int | None = None) -> None:
    """Write a run folder, whole or not at all: tables, numbers and the chosen row's configuration.

    Args:
        ranking: Ranking.
        run: All settings.
        folder: New or empty folder.
        choose: Row of the table, from 1, whose `adapter_config.json` and `chosen.yaml` are written; None for the
            recommended one. Where the table has no such row, neither is written.
    """
    table, content = sequence_table(ranking), sequence_content(ranking, run, choose=choose)
    writers: dict[str, Writer] = {
        "ranking.csv": sequence_numbers(ranking).write_csv,
        "ranking.md": lambda path: plain_text(path, table.markdown()),
        "ranking.tex": lambda path: plain_text(path, table.latex()),
        "candidates.csv": sequence_candidates(ranking).write_csv,
        "result.json": lambda path: write_json(path, content),
        "config.yaml": flags_file(
            "Replay: foretune rank --config config.yaml --output NEW_FOLDER", {**run.flags(), "choose": choose}
        ),
    }
    found = ranking.chosen(choose)
    if found is not None:
        place, row = found
        adapter = sequence_adapter(ranking, row.quick)
        writers[ADAPTER_FILE] = lambda path: save_adapter(adapter, path)
        run_it = f"The run of row {place}: foretune tune --config {CHOSEN} --output NEW_FOLDER"
        writers[CHOSEN] = flags_file(run_it, configuration_with(row.recipe, run).to_dict())
    write_run(folder, writers)


def sequence_adapter(ranking: SequenceRanking, entry: Quick) -> PeftConfig:
    """Make peft's configuration of a candidate.

    Args:
        ranking: Its ranking.
        entry: Candidate.

    Returns:
        The configuration, of task `CAUSAL_LM` or `SEQ_2_SEQ_LM`.
    """
    if entry.config is not None:
        return entry.config
    return candidate_config(entry.candidate, ranking.sites, ranking.template, ranking.modules)
