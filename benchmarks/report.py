"""The table and the plot of what `peers.py` measured.

python benchmarks/report.py [--results benchmarks/results/peers.jsonl]
"""

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

import matplotlib as mpl
from contestants import ALL
from contestants.problem import MODELS

mpl.use("agg")
from matplotlib import pyplot as plt

PLACEMENTS = {"some": "query and value of the first, middle and last layer", "all": "all linear modules"}
HEAD = "| | version | samples | seconds | of a pass (CPU time) | range | peak memory of a pass's | error |"
WIDEST = 4.0  # plain passes that a bar reaches to
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
    """Ratios of all cases, a panel each, cut off at `WIDEST`."""
    rows_of_panels = -(-len(cases) // 2)
    size = (11, 2.5 * rows_of_panels)
    figure, axes = plt.subplots(rows_of_panels, 2, figsize=size, squeeze=False, sharex=True, layout="constrained")
    for axis, rows in zip(axes.flat, cases, strict=False):
        ran = [row for row in rows if "wall" in row][::-1]
        labels = [ALL[row["contestant"]].label for row in ran]
        ratios = [row["wall"]["ratio"] for row in ran]
        colours = ["tab:orange" if row["contestant"].startswith("foretune") else "lightgray" for row in ran]
        bars = axis.barh(labels, [min(ratio, WIDEST) for ratio in ratios], color=colours)
        axis.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], padding=-22, fontsize=6)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set(xlim=(0, WIDEST), title=textwrap.fill(title(rows[0]), 62))
        axis.title.set_fontsize(7)
        axis.tick_params(labelsize=6)
    for axis in axes.flat[len(cases) :]:
        axis.set_visible(False)
    figure.supxlabel("time in plain forward and backward passes", fontsize=8)
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
