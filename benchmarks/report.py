"""The table and the plot of what `peers.py` measured.

python benchmarks/report.py [--results benchmarks/results/peers.jsonl]
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from contestants import ALL
from contestants.problem import MODELS

mpl.use("agg")
from matplotlib import pyplot as plt

PLACEMENTS = {"some": "query and value of the first, middle and last layer", "all": "all linear modules"}
HEAD = "| | version | samples | seconds | of a pass (CPU time) | range | peak memory of a pass's | error |"
Row = dict[str, Any]


def title(row: Row) -> str:
    """A case in words."""
    beside = f", beside {row['beside']} busy process" if row["beside"] else ""
    model, placement = MODELS[row["model"]], PLACEMENTS[row["placement"]]
    return f"{model}; {placement}; {row['n']} × {row['tokens']} tokens{beside}"


def line(row: Row) -> str:
    """One row of a table."""
    label = ALL[row["contestant"]].label
    if "failed" in row:
        return f"| {label} | {row['version']} | {row['asked']} | failed: {row['failed'].replace('|', '/')} | | | | |"
    wall, cpu = row["wall"], row["cpu"]
    once = ", one call" if row.get("once") else ""
    memory = f"{row['memory']['ratio']:.2f} ({row['memory']['ratio_above']:.2f})" if row.get("memory") else ""
    error = f"{row['error']:.0e}" if "error" in row else ""
    ratios = f"{wall['ratio']:.2f} ({cpu['ratio']:.2f})"
    extent = f"{wall['least']:.2f} to {wall['most']:.2f}{once}"
    seconds = f"{wall['seconds']:.2f}"
    return f"| {label} | {row['version']} | {row['asked']} | {seconds} | {ratios} | {extent} | {memory} | {error} |"


def table(cases: list[list[Row]]) -> str:
    """One table for each case."""
    parts = []
    for rows in cases:
        first = rows[0]
        under = f"{first['cores']} cores, {first['threads']} threads, torch {first['torch']}, load {first['load']:.1f}"
        lines = [f"### {title(first)}", f"{under}, {first['at']}", HEAD + "\n|" + " --- |" * 8]
        parts.append("\n\n".join(lines) + "\n" + "\n".join(line(row) for row in rows))
    return "# The same kernel by foretune and by others\n\n" + "\n\n".join(parts) + "\n"


def plot(cases: list[list[Row]], path: Path) -> None:
    """Ratios of all cases, a panel each."""
    figure, axes = plt.subplots(len(cases), 1, figsize=(8, 2.6 * len(cases)), squeeze=False, layout="constrained")
    for axis, rows in zip(axes[:, 0], cases, strict=True):
        ran = [row for row in rows if "wall" in row][::-1]
        labels = [ALL[row["contestant"]].label for row in ran]
        colours = ["tab:orange" if row["contestant"].startswith("foretune") else "tab:gray" for row in ran]
        axis.barh(labels, [row["wall"]["ratio"] for row in ran], color=colours)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set(xscale="log", title=title(rows[0]))
        axis.title.set_fontsize(8)
        axis.tick_params(labelsize=7)
    axes[-1, 0].set_xlabel("time in plain forward and backward passes")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Write both beside the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "peers.jsonl")
    options = parser.parse_args()
    cases: dict[tuple[Any, ...], list[Row]] = {}
    for row in map(json.loads, options.results.read_text().splitlines()):
        key = tuple(row[field] for field in ("model", "placement", "n", "tokens", "beside"))
        cases.setdefault(key, []).append(row)
    options.results.with_suffix(".md").write_text(table(list(cases.values())))
    plot(list(cases.values()), options.results.with_suffix(".png"))
    print(options.results.with_suffix(".md"))


if __name__ == "__main__":
    main()
