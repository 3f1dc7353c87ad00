"""What each base costs a kernel in accuracy: half precision and 8 or 4 bits against the same model in float32.

Every base is loaded from the same checkpoint and gets the same head and the same A. The table holds the relative
Frobenius error of the kernel, of all linear modules or of those that are named, and the relative errors of its largest
eigenvalue, its trace and its condition number κ = (λ_max + σ) / (λ_min + σ) with σ = 1e-4, and of the cosines
K_ij / √(K_ii K_jj), in which no example weighs more than another. Rows whose package is missing say so.

    python benchmarks/bases.py --model FOLDER --dataset FOLDER [--samples 32] [--max-length 64] [--only bfloat16]
"""

import argparse
import copy
import logging
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers

from foretune.arrays import Array
from foretune.errors import ForetuneError
from foretune.models.classifier import own_classifier
from foretune.models.language_model import is_language_model, own_language_model
from foretune.models.loading import unquantised
from foretune.models.placement import lora_config
from foretune.ntk.spectrum import spectrum
from foretune.scoring.score import score
from foretune.settings.commands import ScoreSettings
from foretune.settings.groups import AdapterConfig, DataConfig

Load = Callable[[], Any]


def bits_and_bytes(skip: list[str], bits: int) -> Any:
    """LLM.int8, or 4 bits in NF4."""
    import bitsandbytes  # noqa: F401

    packed = {"load_in_8bit": True} if bits == 8 else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return transformers.BitsAndBytesConfig(**packed, llm_int8_skip_modules=skip or None)


def quanto(skip: list[str], bits: int) -> Any:
    """optimum-quanto, weights only."""
    import optimum.quanto  # noqa: F401

    return transformers.QuantoConfig(f"int{bits}", modules_to_not_convert=skip or None)


def torch_ao(skip: list[str], bits: int) -> Any:
    """torchao, weights only; peft adapts its 8 bits alone."""
    from torchao.quantization import Int8WeightOnlyConfig

    return transformers.TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=skip or None)


LIBRARIES = {"bitsandbytes": (bits_and_bytes, (8, 4)), "optimum-quanto": (quanto, (8, 4)), "torchao": (torch_ao, (8,))}


def bases(auto: Any, folder: str, config: Any, skip: list[str]) -> dict[str, Load]:
    """How to load each base."""

    def load(dtype: torch.dtype, **options: Any) -> Any:
        return auto.from_pretrained(folder, config=copy.deepcopy(config), dtype=dtype, **options).eval()

    def quantised(make: Callable[[list[str], int], Any], bits: int, dtype: torch.dtype) -> Any:
        return load(dtype, quantization_config=make(skip, bits), device_map="cpu")

    found: dict[str, Load] = {
        name: (lambda name=name: load(getattr(torch, name))) for name in ("float32", "bfloat16", "float16")
    }
    for library, (make, sizes) in LIBRARIES.items():
        for bits in sizes:
            for dtype in (torch.float32, torch.bfloat16):
                name = f"{bits} bits, {library}, computes in {str(dtype).removeprefix('torch.')}"
                found[name] = lambda make=make, bits=bits, dtype=dtype: quantised(make, bits, dtype)
    return found


def kernel_of(model: Any, tokenizer: Any, task: Any, settings: ScoreSettings, targets: list[str]) -> Array:
    """The kernel of some modules; the adapter is random and the same for every base."""
    language = hasattr(task, "format")
    if language:
        owned = own_language_model(model, tokenizer, bare=True).model
    else:
        head = torch.Generator().manual_seed(settings.seed)
        with torch.no_grad():
            for parameter in model.get_submodule(
                "classifier" if hasattr(model, "classifier") else "score"
            ).parameters():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=head))
        owned = own_classifier(model, tokenizer, task.objective, bare=True).model
    config = lora_config(owned, AdapterConfig(target_modules=tuple(targets)))
    result = score(model, tokenizer, config, task, settings=settings)
    measured = result.measurement.kernel.matrices[0] if language else result.measurement.k_train_train[0]
    return np.asarray(measured)


def apart(kernel: Array, exact: Array) -> float:
    """Relative error in Frobenius norm."""
    return float(np.linalg.norm(kernel - exact) / np.linalg.norm(exact))


def cosines(kernel: Array) -> Array:
    """The kernel with a diagonal of ones."""
    lengths = np.sqrt(np.diagonal(kernel))
    cosine: Array = kernel / np.outer(lengths, lengths)
    return cosine


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--target-modules", nargs="+", default=["all-linear"])
    parser.add_argument("--only", nargs="*", help="bases to measure, by a part of their names")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.disable_progress_bar()
    from foretune import load_language_task, load_task

    config = transformers.AutoConfig.from_pretrained(options.model)
    language = is_language_model(options.model)
    data = DataConfig(options.dataset, task="causal-lm" if language else None)
    task = load_language_task(data) if language else load_task(data)
    auto = transformers.AutoModelForCausalLM if language else transformers.AutoModelForSequenceClassification
    if not language:
        config.num_labels = task.objective.n_outputs
    skip = list(unquantised(auto, config, trust_remote_code=False))
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    settings = ScoreSettings(
        samples=options.samples, eval_samples=0 if not language else 1, draws=1, max_length=options.max_length
    )
    exact = None
    print("| base | error of K | of λ_max | of the trace | of κ | of the cosines | seconds |\n|" + " --- |" * 7)
    for name, load in bases(auto, options.model, config, skip).items():
        if exact is not None and options.only and not any(part in name for part in options.only):
            continue
        try:
            model = load()
            start = time.perf_counter()
            kernel = kernel_of(model, tokenizer, task, settings, options.target_modules)
        except ModuleNotFoundError as error:
            print(f"| {name} | {error.name} is not installed | | | | | |", flush=True)
            continue
        except (ForetuneError, RuntimeError, ValueError) as error:
            print(f"| {name} | fails: {' '.join(str(error).split())[:160]} | | | | | |", flush=True)
            continue
        seconds = time.perf_counter() - start
        exact = kernel if exact is None else exact
        found, expected = (
            spectrum(each, sigma=1e-4, epsilon=float(np.finfo(np.float32).eps)) for each in (kernel, exact)
        )
        pairs = [
            (found.lambda_max, expected.lambda_max),
            (found.trace, expected.trace),
            (found.condition_number, expected.condition_number),
        ]
        errors = [apart(kernel, exact), *(abs(a / b - 1) for a, b in pairs), apart(cosines(kernel), cosines(exact))]
        print(f"| {name} | {' | '.join(f'{100 * error:.2g}%' for error in errors)} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
