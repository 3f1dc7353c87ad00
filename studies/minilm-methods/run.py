"""One row of a ranking for each adapter method, and its fine-tune: does the order across methods hold?

    python studies/minilm-methods/run.py ./MiniLM ./data/sst2 5e-3 studies/minilm-methods/runs.jsonl

The best row of each method in one ranking of 512 known rows is trained as it stands there: same rows, same recipe. Each
run is added as a line when it is done, and what stands there is not done again.
"""

import json
import sys
import time
from pathlib import Path

import foretune as ft
from foretune.models.classifier import load_classifier
from foretune.ranking.report import adapter_of

METHODS = ("lora", "dora", "ia3", "bitfit", "ln", "vera", "adalora", "loha", "prompt")


def main() -> None:
    """Rank, then train what has no line yet."""
    model, dataset, rate, output = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[4])
    lines = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    done = {line["method"] for line in lines if (line["set"], line["rate"]) == (dataset.name, rate)}
    task = ft.load_task(ft.DataConfig(str(dataset), max_train=512))
    loaded = load_classifier(model, label_names=task.label_names, seed=0)
    settings = ft.RankSettings(
        samples=512,
        eval_samples=512,
        epochs=(5,),
        learning_rate=(rate,),
        max_length=48,
        finalists=6,
        methods=METHODS,
    )
    ranking = ft.rank(loaded.model, loaded.tokenizer, task, settings=settings)
    names = [row.quick.name for row in ranking.rows]
    best = {row.quick.method: row for row in reversed(ranking.rows)}
    for method in METHODS:
        if method in done:
            continue
        row, start = best[method], time.perf_counter()
        loaded = load_classifier(model, label_names=task.label_names, seed=0)
        tuned = ft.tune(
            loaded.model,
            loaded.tokenizer,
            adapter_of(ranking, row.quick),
            task,
            settings=ft.TuneSettings(
                epochs=5, learning_rate=rate, max_length=48, eval_samples=512, train_eval_samples=0
            ),
        )
        last = tuned.history.epochs[-1]
        line = {
            "set": dataset.name,
            "rate": rate,
            "method": method,
            "row": row.quick.name,
            "parameters": row.quick.parameters,
            "place": names.index(row.quick.name) + 1,
            "simulated": None if row.simulated is None else list(row.said.order),
            "quick": row.quick.score,
            "accuracy": last.metrics["accuracy"],
            "eval_loss": last.eval_loss,
            "train_loss": last.train_loss,
            "seconds": round(time.perf_counter() - start, 1),
        }
        with output.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
