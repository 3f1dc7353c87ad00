"""Seconds and peak memory of `foretune score` against the number of samples, each in a process of its own.

All linear modules of a classifier at rank 8, one draw of A. Without a data set the texts are words at random, about 32
tokens long, which costs the same as real ones. Every number of samples adds a line to OUTPUT.jsonl as it is done; the
figure beside it shows how the parts of the time grow: passes in proportion to n, Gram products and factors faster.

    python benchmarks/many_samples.py --model ./MiniLM [--dataset ./reviews] [--samples 32 128 512 2048 10000]
        [--memory 2GB] [--sketch 4096] [--threads 2] [--output benchmarks/results/many_samples]
"""

import argparse
import csv
import io
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

WORDS = (
    "the",
    "film",
    "book",
    "food",
    "was",
    "is",
    "a",
    "very",
    "never",
    "good",
    "bad",
    "poor",
    "great",
    "dull",
    "fine",
)
EVALUATED = 128


def write_texts(folder: Path, rows: int) -> Path:
    """Write a data set of random words in two classes."""
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", rows), ("validation", EVALUATED)):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for _ in range(count):
                words = draw.choices(WORDS, k=draw.randint(20, 40))
                writer.writerow([" ".join(words), int(words.count("good") + words.count("great") > 3)])
    return folder


def score(options: argparse.Namespace, n: int, dataset: Path) -> dict[str, object]:
    """Score in this process, and say what it took."""
    import torch

    from foretune.cli import run

    torch.set_num_threads(options.threads)
    tokens = ["score", "--model", options.model, "--dataset", str(dataset), "--target-modules", "all-linear"]
    tokens += ["--samples", str(n), "--eval-samples", str(EVALUATED), "--draws", "1", "--max-length", "64"]
    tokens += ["--memory", options.memory, "--json"]
    tokens += [] if options.scratch is None else ["--scratch", options.scratch]
    tokens += [] if options.sketch is None else ["--sketch", str(options.sketch)]
    with redirect_stdout(io.StringIO()) as written:
        code = run(tokens)
    if code:
        sys.exit(code)
    found = json.loads(written.getvalue())
    return {
        "n": n,
        "memory": options.memory,
        "sketch": found["sketch"],
        "seconds": {name: round(value, 2) for name, value in found["seconds"].items()},
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3),
        "threads": options.threads,
        "sites": len(found["placement"]["sites"]),
        "kernel": {name: found["kernel"][name] for name in ("trace", "condition_number", "effective_dimension")},
        "estimated": found["kernel"]["estimated"],
        "ridge": found["kernel_regression"]["ridge"],
        "eval_accuracy": found["kernel_regression"].get("eval_accuracy"),
    }


def draw(lines: list[dict[str, object]], path: Path) -> None:
    """Plot seconds and memory over n."""
    from matplotlib.figure import Figure

    by_n = {line["n"]: line for line in lines if line["sketch"] is None}  # the newest of each
    lines = [by_n[n] for n in sorted(by_n)]
    figure = Figure(figsize=(8.4, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    n = [line["n"] for line in lines]
    for name, label in (
        ("passes", "passes"),
        ("products", "Gram products"),
        ("files", "files of tiles"),
        ("spectrum", "spectra and bounds"),
        ("kernel_regression", "evaluation and regression"),
    ):
        told = [line for line in lines if line["seconds"].get(name, 0.0) > 0.0]
        left.plot([line["n"] for line in told], [line["seconds"][name] for line in told], "o-", label=label)
    first = next((line for line in lines if "passes" in line["seconds"]), None)
    if first is not None:
        each = first["seconds"]["passes"] / first["n"]
        left.plot(n, [each * count for count in n], ":", color="0.5", label="in proportion to n")
    left.set(xscale="log", yscale="log", xlabel="samples n", ylabel="seconds")
    left.legend(frameon=False, fontsize=8)
    right.plot(n, [line["peak_gb"] for line in lines], "o-")
    right.set(xscale="log", ylim=(0, None), xlabel="samples n", ylabel="peak resident memory, GB")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Score every number of samples."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", type=Path)
    parser.add_argument("--samples", type=int, nargs="+", default=[32, 128, 512, 2048, 10_000])
    parser.add_argument("--memory", default="2GB")
    parser.add_argument("--scratch")
    parser.add_argument("--sketch", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/many_samples"))
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(score(options, options.samples[0], options.dataset)))
        return
    path = options.output.with_suffix(".jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "OPENBLAS_NUM_THREADS": str(options.threads)}
    with tempfile.TemporaryDirectory() as folder:
        dataset = options.dataset or write_texts(Path(folder) / "texts", max(options.samples))
        for n in options.samples:
            given = [*sys.argv[1:], "--one", "--samples", str(n), "--dataset", str(dataset)]
            done = subprocess.run(
                [sys.executable, __file__, *given], env=environment, stdout=subprocess.PIPE, check=True
            )
            line = done.stdout.decode().splitlines()[-1]
            print(line, flush=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
    draw([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()], path.with_suffix(".png"))


if __name__ == "__main__":
    main()
