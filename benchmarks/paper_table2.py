"""The paper's Table 2 at its settings: seconds of the kernel in those of the fine-tune that it stands for.

RoBERTa-base's shape with random weights, which cost what trained ones do; key matrices of layers 0, 5 and 11 at r = 8;
32 samples; batches, epochs and training rows as in the paper. Texts have the mean length given here and no padding.
The kernel is measured whole, without loading. Of the fine-tune some steps are measured and the rest extrapolated: the
median step times the number of steps, evaluations left out, which makes the ratio larger than it would be with them.
Seconds are those of the processor, which other processes on the machine enter little.

    python benchmarks/paper_table2.py [--steps 3] [--threads 2]
"""

import argparse
import os
import statistics
import time

import torch
from peft import LoraConfig
from transformers import RobertaConfig, RobertaForSequenceClassification

from foretune.models.adapted import Batch
from foretune.models.placement import place, read_adapters
from foretune.ntk.jacobian import tangent_features
from foretune.ntk.kernel import tangent_kernel
from foretune.paper.experiment import read_experiment
from foretune.paper.published import NAMES, TABLE2, TABLE3
from foretune.tasks.outputs import output_reduction

# Training rows of the data sets that paper.yaml names, as published.
ROWS = {"cola": 8_551, "sst2": 67_349, "yelp": 650_000, "imdb": 25_000}
# Tokens of a text on average, cut at 512, by BERT's tokenizer: of all of CoLA (11.3), of 2,000 reviews of Yelp (166)
# and 1,999 of IMDb (260). Those of SST-2 in GLUE are mostly phrases: 13 is assumed, its sentences
# alone have 25.
TOKENS = {"cola": 11, "sst2": 13, "yelp": 166, "imdb": 260}


def inputs(n: int, tokens: int) -> dict[str, torch.Tensor]:
    """Random texts."""
    ids = torch.randint(5, 50_000, (n, tokens))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def kernel_seconds(config: LoraConfig, n: int, tokens: int) -> float:
    """Seconds of placing the adapter and computing its kernel, model loaded; the second call counts."""
    model = RobertaForSequenceClassification(RobertaConfig(num_labels=2)).eval().requires_grad_(False)
    for _ in range(2):
        start = time.process_time()
        adapted = read_adapters(place(model, config, seed=0))
        batch = Batch(torch.arange(n), inputs(n, tokens))
        tangent_kernel(tangent_features(adapted, [batch], output_reduction("margin", 2), n=n)).matrices()
        seconds = time.process_time() - start
    return seconds


def step_seconds(config: LoraConfig, batch: int, tokens: int, steps: int, rate: float) -> float:
    """Median seconds of a training step, the first left out."""
    model = place(RobertaForSequenceClassification(RobertaConfig(num_labels=2)), config, seed=0).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    labels = torch.randint(2, (batch,))
    seconds = []
    for _ in range(steps + 1):
        start = time.process_time()
        model(**inputs(batch, tokens), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds[1:])


def main() -> None:
    """Print a row for each data set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", nargs="+", choices=list(TABLE3), default=list(TABLE3), help="data sets")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    paper = read_experiment()
    n, epochs = paper["score"]["samples"], paper["train"]["epochs"]
    config = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=8, target_modules=["key"], layers_to_transform=[0, 5, 11])
    print(f"{n} samples, {epochs} epochs, {options.steps} steps measured, the rest extrapolated")
    print("data set   tokens   kernel    fine-tune (steps × s)             ratio      paper")
    for name in options.only:
        batch, rate = TABLE3[name]
        kernel = kernel_seconds(config, n, TOKENS[name])
        step = step_seconds(config, batch, TOKENS[name], options.steps, rate)
        steps = epochs * -(-ROWS[name] // batch)
        tuned, of_kernel = TABLE2[name]
        print(
            f"{NAMES[name]:8s} {TOKENS[name]:8d} {kernel:7.2f} s {steps * step:11,.0f} s ({steps:,} × {step:.2f})"
            f"   {kernel / (steps * step):9.4%}   {of_kernel / tuned:8.2%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
