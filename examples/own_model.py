"""Score a LoRA configuration on your own model, tokenizer, `LoraConfig` and `datasets.Dataset`.

    python examples/own_model.py

Uses the model and the texts of the extra `demo` in place of yours.
"""

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import foretune as ft
from foretune.tasks.demo import bbc_news, model_folder


def main(samples: int = 32, max_length: int = 64) -> ft.ScoreResult:
    """Score once in one call, then once stage by stage."""
    texts, topics = bbc_news()
    corpus = Dataset.from_dict({"text": texts, "label": topics}).train_test_split(0.2, seed=0)
    task = ft.task_from_datasets(corpus["train"], corpus["test"])

    model = AutoModelForSequenceClassification.from_pretrained(model_folder(), num_labels=task.n_classes).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    config = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=8, target_modules=["query", "value"])
    settings = ft.ScoreSettings(samples=samples, eval_samples=64, max_length=max_length)
    result = ft.score(model, tokenizer, config, task, settings=settings)
    own = result.draws[0]
    print(f"κ = {own.kernel.condition_number:.4g}, trace = {own.kernel.trace:.4g}")
    print(f"kernel regression: accuracy {own.kernel_regression.eval_metric:.1%}")

    # The same kernel by hand: every stage is a function between frozen dataclasses.
    classifier = ft.Classifier("MiniLM", model, tokenizer, "given")
    rows = result.measurement.train_indices
    encoded = ft.encode([task.train.texts[row] for row in rows], None, classifier, max_length=max_length)
    adapted = ft.read_adapters(ft.place(model, config, seed=0), draws=5)
    reduction = ft.output_reduction(None, task.n_classes)
    features = ft.tangent_features(adapted, ft.batches(encoded, classifier, batch_size=32), reduction, n=len(rows))
    kernel = ft.tangent_kernel(features, ranks=[2, 4])
    value_only = [index for index, site in enumerate(adapted.sites) if site.kind.endswith("value")]
    for name, matrix in {
        "as above": kernel.matrices()[0],
        "rank 4, from the same pass": kernel.matrices(rank=4)[0],
        "value modules alone, from the same pass": kernel.matrices(value_only)[0],
    }.items():
        print(f"λ_max = {ft.spectrum(matrix, sigma=1e-4, epsilon=kernel.epsilon).lambda_max:.4g}  ({name})")
    assert abs(kernel.matrices()[0] - result.measurement.k_train_train[0]).max() < 1e-6 * own.kernel.lambda_max
    return result


if __name__ == "__main__":
    main()
