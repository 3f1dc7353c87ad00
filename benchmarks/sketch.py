"""Error, seconds and memory of a sketched kernel against its width, for several ways to project at random.

    python benchmarks/sketch.py --model ./MiniLM --dataset ./sst2 [--samples 128] [--seeds 5]
        [--output benchmarks/results/sketch]

One pass keeps inputs h and gradients g of all tokens. Of adapters (rank 8, all linear modules), of the last layer that
trains whole, and of all layers that do, every way then makes a sketch of k numbers of each text from g and h alone. Of
each stand the root mean square over the seeds of ‖K̂ − K‖ / ‖K‖, what the two halves of a sketch say of it, where it has
halves, milliseconds of the processor for each text (one thread, batches of 8), and the largest array of a batch. A line
is added to OUTPUT.jsonl as it is done, and what stands there is not done again.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor

import foretune as ft
from foretune.models.classifier import load_model
from foretune.ntk.factors import token_factors
from foretune.ntk.feature_sketch import generator_of, signs
from foretune.ntk.product_sketch import draw_product_sketch
from foretune.problem import prepare
from foretune.settings.groups import DataConfig, ModelConfig
from foretune.stream import stream_batches
from foretune.tasks.load import load_task

WIDTHS = (256, 1024, 4096, 16384)
BATCH = 8
PLACES = {
    "adapters": "adapters, rank 8, 37 modules",
    "last layer": "last layer whole, 6 modules",
    "all layers": "all layers whole, 37 modules",
}


@dataclass(frozen=True)
class Module:
    """Padded gradients n × t × d_out and inputs n × t × d_in of one module."""

    g: Tensor
    h: Tensor

    def formed(self, rows: slice) -> Tensor:
        """Gradients of some texts, each in a row."""
        return (self.g[rows].mT @ self.h[rows]).flatten(1)


Way = Callable[[Sequence[Module], slice, int, int, dict[str, int]], tuple[Tensor, ...]]


def note(held: dict[str, int], tensor: Tensor) -> Tensor:
    """Remember the largest array."""
    held["numbers"] = max(held.get("numbers", 0), tensor.numel())
    return tensor


def by_number(
    modules: Sequence[Module], rows: slice, width: int, seed: int, held: dict[str, int]
) -> tuple[Tensor, ...]:
    """A place and a sign for every number of the formed gradients, in two halves."""
    half = width // 2
    totals = [torch.zeros(rows.stop - rows.start, half) for _ in range(2)]
    for index, module in enumerate(modules):
        formed = note(held, module.formed(rows))
        for part, total in enumerate(totals):
            generator = generator_of(seed, part, index, 0)
            places = torch.randint(half, (formed.shape[1],), generator=generator)
            total.index_add_(1, places, note(held, formed * signs(generator, formed.shape[1])))
    return tuple(total / 2**0.5 for total in totals)


def by_product(
    modules: Sequence[Module], rows: slice, width: int, seed: int, held: dict[str, int]
) -> tuple[Tensor, ...]:
    """Convolutions of both sides' sketches, in two halves."""
    half = width // 2
    totals = [torch.zeros(rows.stop - rows.start, half) for _ in range(2)]
    for index, module in enumerate(modules):
        for part, total in enumerate(totals):
            sketch = draw_product_sketch(generator_of(seed, part, index, 3), half, module.g.shape[2], module.h.shape[2])
            total += sketch.of(module.g[rows], module.h[rows])
    held["numbers"] = max(2**17, (rows.stop - rows.start) * width)
    return tuple(total / 2**0.5 for total in totals)


def two_sided(sides: Callable[[int, int], tuple[int, int]], *, joined: bool) -> Way:
    """Random signs on both sides before the outer product, modules added up or side by side (as LoGra)."""

    def way(modules: Sequence[Module], rows: slice, width: int, seed: int, held: dict[str, int]) -> tuple[Tensor, ...]:
        made = []
        for index, module in enumerate(modules):
            k_out, k_in = sides(width // len(modules) if joined else width, module.h.shape[2])
            if not k_out * k_in:
                return ()
            generator = generator_of(seed, 0, index, 0)
            left = module.g[rows] @ signs(generator, module.g.shape[2] * k_out).view(-1, k_out) / k_out**0.5
            right = module.h[rows]
            if k_in < right.shape[2]:
                right = right @ signs(generator, right.shape[2] * k_in).view(-1, k_in) / k_in**0.5
            made.append(note(held, (left.mT @ right).flatten(1)))
        return (torch.cat(made, 1),) if joined else (torch.stack(made).sum(0),)

    return way


def square(width: int, d_in: int) -> tuple[int, int]:
    """As many numbers of either side."""
    side = math.isqrt(width)
    return side, min(side, d_in)


WAYS: dict[str, Way] = {
    "by number": by_number,
    "by product": by_product,
    "two-sided, added": two_sided(square, joined=False),
    "two-sided, side by side": two_sided(square, joined=True),
    "one side, added": two_sided(lambda width, d_in: (width // d_in, d_in), joined=False),
}


def factors_of(options: argparse.Namespace) -> tuple[list[Module], list[Module]]:
    """Padded factors of all modules, and the same with A h in the place of h."""
    task = load_task(DataConfig(dataset=options.dataset))
    classifier = load_model(ModelConfig(model=options.model, device="cpu"), task.objective, 0)
    config = LoraConfig(task_type="SEQ_CLS", r=8, target_modules="all-linear")
    settings = ft.ScoreSettings(samples=options.samples, eval_samples=0, draws=1, max_length=64, batch_size=BATCH)
    plan = prepare(classifier, task, config, settings)
    found = token_factors(
        plan.adapted,
        stream_batches(plan, plan.train),
        plan.reduction,
        n=options.samples,
        storage=torch.float32,
    )
    whole, adapters = [], []
    for tokens, adapter in zip(found.modules, plan.adapted.adapters, strict=True):
        width = int((tokens.starts[1:] - tokens.starts[:-1]).max())
        place, h, g = tokens.of(torch.arange(found.n), torch.float32)
        column = torch.arange(len(place)) - tokens.starts[place]
        padded = [part.new_zeros(found.n, width, part.shape[1]) for part in (g[0], h)]
        for target, part in zip(padded, (g[0], h), strict=True):
            target[place, column] = part
        whole.append(Module(*padded))
        adapters.append(Module(padded[0], padded[1] @ adapter.rows.T * adapter.site.scaling))
    return whole, adapters


def gram(modules: Sequence[Module]) -> Tensor:
    """The exact kernel, of gradients formed module by module."""
    total = 0.0
    for module in modules:
        formed = module.formed(slice(0, len(module.g)))
        total = total + (formed @ formed.T).double()
    assert isinstance(total, Tensor)
    return total


def measure(modules: Sequence[Module], exact: Tensor, way: Way, width: int, seeds: int) -> dict[str, object] | None:
    """Error over seeds, seconds and the largest array."""
    n, held = len(exact), dict[str, int]()
    errors, said, seconds = [], [], 0.0
    for seed in range(seeds):
        start = time.process_time()
        parts = [way(modules, slice(row, min(n, row + BATCH)), width, seed, held) for row in range(0, n, BATCH)]
        seconds += time.process_time() - start
        if not parts[0]:
            return None
        grams = [torch.cat(rows).double() @ torch.cat(rows).double().T for rows in zip(*parts, strict=True)]
        kernel = torch.stack(grams).sum(0)
        errors.append(float((kernel - exact).norm() / exact.norm()))
        if len(grams) == 2:
            said.append(float((grams[0] - grams[1]).norm() / kernel.norm()))
    return {
        "error": math.sqrt(sum(e**2 for e in errors) / seeds),
        "said": math.sqrt(sum(e**2 for e in said) / seeds) if said else None,
        "ms": round(1e3 * seconds / seeds / n, 3),
        "megabytes": round(4e-6 * held["numbers"], 2),
    }


def report(lines: list[dict[str, object]], path: Path) -> None:
    """Write the table and the plot."""
    from matplotlib.figure import Figure

    found = {(line["place"], line["way"], line["width"]): line for line in lines}
    text = []
    figure = Figure(figsize=(10.5, 3.6), layout="constrained")
    axes = figure.subplots(1, len(PLACES), sharey=True)
    for axis, (place, title) in zip(axes, PLACES.items(), strict=True):
        ways = [way for way in WAYS if any(key[:2] == (place, way) for key in found)]
        text += [f"**{title}**: error (as the halves say it), ms of a text", ""]
        text += ["| k | " + " | ".join(ways) + " |", "| ---: |" + " ---: |" * len(ways)]
        for width in WIDTHS:
            cells = []
            for way in ways:
                line = found.get((place, way, width))
                of_halves = "" if line is None or line["said"] is None else f" ({line['said']:.3f})"
                cells.append("" if line is None else f"{line['error']:.3f}{of_halves}, {line['ms']:.2g}")
            text.append(f"| {width:,} | " + " | ".join(cells) + " |")
        text.append("")
        for way in ways:
            points = sorted((key[2], line["error"]) for key, line in found.items() if key[:2] == (place, way))
            axis.plot(*zip(*points, strict=True), "o-", color=f"C{list(WAYS).index(way)}", label=way, markersize=3)
        axis.set(xscale="log", yscale="log", xlabel="numbers k", title=title)
        axis.title.set_fontsize(9)
    axes[0].set_ylabel("‖K̂ − K‖ / ‖K‖")
    by_way = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    axes[-1].legend(by_way.values(), by_way.keys(), frameon=False, fontsize=7)
    path.with_suffix(".md").write_text("\n".join(text), encoding="utf-8")
    figure.savefig(path.with_suffix(".png"), dpi=120)


def main() -> None:
    """Measure what does not stand in the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/sketch"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = options.output.with_suffix(".jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    done = {(line["place"], line["way"], line["width"]) for line in lines}
    whole, adapters = factors_of(options)
    of_place = {"adapters": adapters, "last layer": whole[-7:-1], "all layers": whole}
    for place, modules in of_place.items():
        exact = gram(modules)
        for way in WAYS:
            if way == "one side, added" and place != "adapters":
                continue
            dear = place == "adapters" and way in ("by product", "one side, added")
            for width in WIDTHS[:3] if dear else WIDTHS:
                seeds = 2 if place == "all layers" else options.seeds
                found = None if (place, way, width) in done else measure(modules, exact, WAYS[way], width, seeds)
                if found is not None:
                    line = {"place": place, "way": way, "width": width, "samples": options.samples, "seeds": seeds}
                    lines.append(line | found)
                    print(json.dumps(lines[-1]), flush=True)
                    with path.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(lines[-1]) + "\n")
    report(lines, options.output)


if __name__ == "__main__":
    main()
