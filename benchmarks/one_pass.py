"""Cost of the kernel in units of one plain forward and backward pass, measured in one process.

The plain pass is the cheapest one there is: the same frozen model without adapters, one forward pass and one
backward pass to the output of the embeddings, no gradient of any weight. Rounds alternate, so that a drift of
the machine's speed hits all alike; a ratio is the median over rounds of times taken next to each other.

    python benchmarks/one_pass.py [--rounds 7] [--samples 32] [--tokens 128] [--draws 5] [--threads 2] [--beside 0]
"""

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig
from transformers import RobertaConfig, RobertaForSequenceClassification

from foretune.models.adapted import Batch
from foretune.models.placement import place, read_adapters
from foretune.ntk.jacobian import tangent_features
from foretune.ntk.kernel import tangent_kernel
from foretune.tasks.outputs import output_reduction

PLACEMENTS = {
    "one placement: query, value of layers 0, 5, 11": LoraConfig(
        task_type="SEQ_CLS", r=8, lora_alpha=8, target_modules=["query", "value"], layers_to_transform=[0, 5, 11]
    ),
    "all 72 linear modules": LoraConfig(
        task_type="SEQ_CLS",
        r=8,
        lora_alpha=8,
        target_modules=["query", "key", "value", "dense"],
        exclude_modules="classifier.*",
    ),
}


def plain_pass(model: RobertaForSequenceClassification, batch: Batch) -> None:
    """One forward and backward pass of the summed margin to the embeddings."""
    held = []
    handle = model.roberta.embeddings.register_forward_hook(
        lambda _, __, output: held.append(output.detach().requires_grad_()) or held[-1]
    )
    logits = model(**batch.inputs).logits
    torch.autograd.grad((logits[:, 1] - logits[:, 0]).sum(), held)
    handle.remove()


def timed(run: Callable[[], None]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def spin() -> None:
    """Keep one core busy."""
    while True:
        pass


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Have processes that do nothing but count run beside what is measured."""
    context = multiprocessing.get_context("spawn")
    beside = [context.Process(target=spin, daemon=True) for _ in range(processes)]
    for process in beside:
        process.start()
    try:
        yield
    finally:
        for process in beside:
            process.kill()


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--beside", type=int, default=0, help="busy processes that run beside it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = RobertaForSequenceClassification(RobertaConfig(num_labels=2)).eval().requires_grad_(False)
    shape = (options.samples, options.tokens)
    inputs = {"input_ids": torch.randint(5, 50_000, shape), "attention_mask": torch.ones(shape, dtype=torch.long)}
    batch = Batch(torch.arange(options.samples), inputs)
    reduction = output_reduction("margin", 2)

    runs: dict[str, Callable[[], None]] = {"plain": lambda: plain_pass(model, batch)}
    sites = {}
    for name, config in PLACEMENTS.items():
        adapted = read_adapters(place(model, config, seed=0), draws=options.draws)
        sites[name] = len(adapted.sites)
        runs[name] = lambda adapted=adapted: tangent_kernel(
            tangent_features(adapted, [batch], reduction, n=options.samples)
        )
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with busy(options.beside):
        for round_ in range(options.rounds + 1):
            for name, run in runs.items():
                taken = timed(run)
                if round_:  # the first round warms up
                    seconds[name].append(taken)
        load = os.getloadavg()[0]

    print(
        f"RoBERTa-base shape (12 layers, 768 wide), {options.samples} x {options.tokens} tokens, float32, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, {options.draws} draws of A at r = 8, "
        f"{options.rounds} rounds, {options.beside} busy processes beside it, load average {load:.1f}"
    )
    print(f"{'plain forward and backward':55s} {statistics.median(seconds['plain']):7.2f} s")
    for name in PLACEMENTS:
        ratios = [a / b for a, b in zip(seconds[name], seconds["plain"], strict=True)]
        print(
            f"{name + f' ({sites[name]} sites)':55s} {statistics.median(seconds[name]):7.2f} s   "
            f"ratio {statistics.median(ratios):.3f} (from {min(ratios):.3f} to {max(ratios):.3f})"
        )


if __name__ == "__main__":
    main()
