"""Cost of the finalists' simulated runs in units of the pass that they are read off, measured in one process.

Both are in seconds of the processor, so that what else runs on the machine hardly enters. The model has MiniLM's shape
and random weights; finalists are placements of several kinds, layers and sizes. The pass is that of a forecast: the
inputs of the output layer, then the token factors of training and evaluation rows. What bounds the ratio is printed
too: operations of a step's matrix products, 4 r (d_in + k d_out) for each token, module and run, over those of the
passes, 4 d_in d_out with and 2 d_in d_out without going back.

    python benchmarks/simulated_runs.py [--quick] [--rows 512] [--steps 1000] [--finalists 16] [--tokens 32]
"""

import argparse
import dataclasses
import time
from collections.abc import Iterator

import torch
from peft import LoraConfig
from transformers import BertConfig, BertForSequenceClassification

from foretune.forecasting.linear_model import Head, Sample, Start, lift
from foretune.forecasting.schedule import Schedule
from foretune.forecasting.simulate import simulate
from foretune.models.adapted import AdaptedModel, Batch
from foretune.models.placement import place, read_adapters
from foretune.ntk.factors import TokenFactors, token_factors
from foretune.ntk.probe import head_inputs
from foretune.tasks.classification import Classification
from foretune.tasks.outputs import OutputReduction

BATCH, RANK = 16, 8
OBJECTIVE = Classification(("a", "b"))
KINDS = (("query", "value"), ("intermediate", "output.dense"), ("query", "key", "value", "dense"), ("value",), ("key",))


def batches(n: int, tokens: int, *, seed: int) -> Iterator[Batch]:
    """Random texts of half to all of so many tokens."""
    random = torch.Generator().manual_seed(seed)
    for rows in torch.arange(n).split(32):
        ids = torch.randint(5, 30_000, (len(rows), tokens), generator=random)
        lengths = torch.randint(tokens // 2, tokens + 1, (len(rows), 1), generator=random)
        yield Batch(rows, {"input_ids": ids, "attention_mask": (torch.arange(tokens) < lengths).long()})


def the_pass(
    adapted: AdaptedModel, reduction: OutputReduction, n: int, tokens: int
) -> tuple[TokenFactors, TokenFactors]:
    """What a forecast runs through the model, training rows n and half as many evaluation rows."""
    *_, (name, layer) = adapted.head.items()
    head_inputs(adapted, {name: layer}, batches(n, tokens, seed=0), n=n, n_outputs=2)
    return (
        token_factors(adapted, batches(n, tokens, seed=0), reduction, n=n),
        token_factors(adapted, batches(n // 2, tokens, seed=1), reduction, n=n // 2),
    )


def finalists(adapted: AdaptedModel, count: int) -> list[Start]:
    """Placements of some kinds of modules in the upper half of the layers or in all."""
    starts = []
    for number in range(count):
        kinds, lowest = KINDS[number % len(KINDS)], (number % 2) * 3
        chosen = [
            (index, adapter)
            for index, adapter in enumerate(adapted.adapters)
            if (adapter.site.layer or 0) >= lowest and any(kind in adapter.site.name for kind in kinds)
        ]
        a = tuple(adapter.rows[:RANK].detach() for _, adapter in chosen)
        starts.append(Start(tuple(index for index, _ in chosen), a, (1.0,) * len(a)))
    return starts


def sample(factors: TokenFactors, weight: torch.Tensor) -> Sample:
    """Examples with classes that mean nothing."""
    lifts = lift(weight, factors.reduction.directions)[None]
    n = factors.n
    return Sample(factors, torch.arange(n) % 2, lifts, torch.zeros(n, dtype=torch.long), OBJECTIVE)


def operations(train: TokenFactors, evaluation: TokenFactors, starts: list[Start], steps: int) -> tuple[float, float]:
    """Those of the simulated runs and of the pass, without attention."""
    k = train.reduction.n_outputs
    of_runs = of_pass = 0.0
    longest = max(int(tokens.starts[-1]) for tokens in train.modules)
    for index, (site, tokens) in enumerate(zip(train.sites, train.modules, strict=True)):
        own = int(tokens.starts[-1])
        rank = sum(len(start.a[start.sites.index(index)]) for start in starts if index in start.sites)
        evaluated = 2 * (own + int(evaluation.modules[index].starts[-1]))
        in_steps = 2 * own / train.n * BATCH * steps
        of_runs += 2.0 * rank * (site.d_in + k * site.d_out) * (in_steps + evaluated)
        # the model itself goes over all positions: rows once without, once with each output; half as many to evaluate
        of_pass += 2.0 * site.d_in * site.d_out * longest * (1 + (1 + k) * (1 + evaluation.n / train.n))
    return of_runs, of_pass


def main() -> None:
    """Print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--finalists", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a tenth of rows and steps: the same ratio, roughly")
    options = parser.parse_args()
    rows, steps = (options.rows // 10, options.steps // 10) if options.quick else (options.rows, options.steps)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    model = BertForSequenceClassification(BertConfig(num_labels=2, **shape)).eval()
    torch.nn.init.normal_(model.bert.pooler.dense.bias)  # a trained pooler, which is a part of the base
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=RANK,
        target_modules=["query", "key", "value", "dense"],
        exclude_modules=".*(pooler|classifier).*",
    )
    adapted = read_adapters(place(model, config, seed=0))
    reduction = OBJECTIVE.simulated()
    the_pass(adapted, reduction, 32, options.tokens)  # warms up
    clock = time.process_time()
    train, evaluation = the_pass(adapted, reduction, rows, options.tokens)
    of_pass = time.process_time() - clock
    (layer,) = adapted.head.values()
    weight = layer.weight.detach()
    held, held_out = sample(train, weight), sample(evaluation, weight)
    starts = finalists(adapted, options.finalists)
    schedule = Schedule(BATCH * steps, 1, BATCH, 1e-3)
    head = Head(weight.clone(), layer.bias.detach().clone())
    simulate(starts, head, held, held_out, dataclasses.replace(schedule, train_rows=BATCH))
    clock = time.process_time()
    simulate(starts, head, held, held_out, schedule)
    of_runs = time.process_time() - clock
    needed, passed = operations(train, evaluation, starts, steps)
    print(
        f"MiniLM shape (6 layers, 384 wide), {rows} rows and half as many to evaluate, {options.tokens // 2} to "
        f"{options.tokens} tokens, batches of {BATCH}, r = {RANK}, float32, {options.threads} threads"
    )
    print(f"pass                                     {of_pass:7.1f} s   {passed / of_pass / 1e9:5.1f} GFLOP/s")
    print(
        f"{len(starts):2d} simulated runs of {steps:4d} steps         {of_runs:7.1f} s   {needed / of_runs / 1e9:5.1f} "
        f"GFLOP/s   ratio {of_runs / of_pass:.2f}, of operations alone {needed / passed:.2f}"
    )


if __name__ == "__main__":
    main()
