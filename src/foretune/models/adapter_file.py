"""peft's `adapter_config.json`: written for a candidate, read for a run."""

import copy
import json
import tempfile
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from peft import LoraConfig, PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from pydantic import PydanticSchemaGenerationError, PydanticUndefinedAnnotation, TypeAdapter, ValidationError

from foretune.errors import ConfigError, border, few, reason
from foretune.models.output_layer import CLASSIFIER
from foretune.models.sites import split_name
from foretune.models.tuner import is_plain_kind, method_name
from foretune.settings.commands import ADAPTER_FILE
from foretune.settings.groups import AdapterConfig

_MODULES = ("target_modules", "exclude_modules", "feedforward_modules")  # in no order
_LARGEST = 1_000_000  # of a rank, and bytes of a file


def save_adapter(config: PeftConfig, path: Path) -> None:
    """Write a configuration to a file through peft; the same configuration gives the same bytes.

    Args:
        config: peft's configuration; not changed.
        path: File, of any name.
    """
    config = copy.deepcopy(config)
    for name, value in vars(config).items():
        if isinstance(value, set):
            setattr(config, name, sorted(value))
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        path.write_bytes((Path(folder) / ADAPTER_FILE).read_bytes())


def adapter_from_file(path: Path | str, *, task_type: str = CLASSIFIER) -> PeftConfig:
    """Read peft's configuration of an adapter of any method, to start a new adapter from it.

    It may be that of a trained adapter; the weights are not read, and what says that it is only for inference, of
    which model it was, or which ranks a run has kept, is left out.

    Args:
        path: An `adapter_config.json`, of whatever name, or the folder that holds it.
        task_type: What it must be for, in peft's words: `SEQ_CLS`, or `CAUSAL_LM` or `SEQ_2_SEQ_LM` for a
            language model.

    Returns:
        peft's configuration for that task.

    Raises:
        ConfigError: If there is no such file, or it is no JSON, of no method that this peft has, for another task, or
            has options that this peft does not know or foretune does not train.
    """
    with border(ConfigError, f"cannot read adapter configuration {str(path)!r}"):
        file = Path(path).expanduser()
        if file.is_dir():
            file /= ADAPTER_FILE
    named = f"adapter configuration {str(file)!r}"
    content = _read(file, named)
    kind = next((kind for kind in PEFT_TYPE_TO_CONFIG_MAPPING if kind.value == content.get("peft_type")), None)
    if kind is None:
        known = few(sorted(str(kind.value) for kind in PEFT_TYPE_TO_CONFIG_MAPPING))
        raise ConfigError(f"{named} has peft_type {_short(content.get('peft_type'))}: this peft knows {known}")
    if content.get("task_type") not in (None, task_type):
        raise ConfigError(f"{named} has task_type {_short(content['task_type'])}: only {task_type!r} is supported")
    of_kind = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    if kind.value == "ADALORA":
        content.pop("rank_pattern", None)  # the ranks that a run has kept
    _check_values(content, named, of_kind)
    content |= {"task_type": task_type, "inference_mode": False, "base_model_name_or_path": None}
    if "modules_to_save" in _types(of_kind):
        saved = [name for name in content.get("modules_to_save") or [] if name not in SEQ_CLS_HEAD_NAMES]
        content["modules_to_save"] = list(dict.fromkeys(saved)) or None  # peft adds its names to every configuration
    with border(ConfigError, f"{named} is refused by peft"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on settings that do not go together: peft ignores one of them
        return PeftConfig.from_peft_type(**content)


def _read(file: Path, named: str) -> dict[str, Any]:
    with border(ConfigError, f"cannot read {named}"):
        if not file.is_file():
            raise ConfigError(f"{named} does not exist: name an {ADAPTER_FILE} or the folder that holds it")
        if file.stat().st_size > _LARGEST:
            raise ConfigError(f"{named} has more than {_LARGEST:,} bytes: name an {ADAPTER_FILE}, not the weights")
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    if not isinstance(content, dict):
        raise ConfigError(f"{named} holds no JSON object: write it with save_pretrained of a peft configuration")
    content.pop("runtime_config", None)
    return content


def _short(value: Any) -> str:
    return reason(ValueError(repr(value)))


def _types(of_kind: type[PeftConfig]) -> dict[str, Any]:
    types = get_type_hints(of_kind)
    types |= {"lora_alpha": float} if "lora_alpha" in types else {}
    types |= {"init_lora_weights": bool | str} if "init_lora_weights" in types else {}
    if of_kind is LoraConfig:
        types |= dict.fromkeys(("rank_pattern", "alpha_pattern"), dict[str, float] | None)
    return types


def _check_values(content: dict[str, Any], named: str, of_kind: type[PeftConfig]) -> None:
    types = _types(of_kind)
    # peft writes what it starts from, which is not always what its types say: the size of a prompt None, a rank 0
    defaults = {field.name: field.default for field in fields(of_kind)}
    own = {name for name, value in content.items() if name in defaults and _same(value, defaults[name])}
    for name in sorted(content.keys() - own):
        value = content[name]
        if not value and (name not in types or name.endswith(("_config", "_pattern"))):
            del content[name]  # switched off
        elif name not in types:
            raise ConfigError(
                f"{named} has {_short(name)[1:-1]}={_short(value)}, which this peft does not know: remove or upgrade"
            )
        elif name.endswith("_config") and name != "loftq_config":
            raise ConfigError(f"{named} has {name}={_short(value)}, which is not supported: leave it out")
        else:
            _check_type(name, value, types[name], named)
    numbers: dict[str, Any] = {
        name: content[name] for name in ("r", "init_r", "target_r", "lora_alpha") if name in content.keys() - own
    }
    if of_kind is LoraConfig:
        numbers |= {f"rank {name!r}": value for name, value in (content.get("rank_pattern") or {}).items()}
        numbers |= {f"alpha {name!r}": value for name, value in (content.get("alpha_pattern") or {}).items()}
    for name, value in numbers.items():
        whole = not name.startswith(("lora_alpha", "alpha"))
        kinds = int if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < _LARGEST:
            raise ConfigError(
                f"{named} has {_short(name)[1:-1]}={_short(value)}: must be a number above 0 and below {_LARGEST:,}"
            )
    outside = [name for name in content.get("modules_to_save") or [] if "embed" in name]
    if outside:  # the rest is compared with the model when it is placed
        raise ConfigError(
            f"{named} has modules_to_save={_short(outside)}: only the classifier's head may train as a whole"
        )


def _check_type(name: str, value: Any, kind: Any, named: str) -> None:
    # bool is an int, and pydantic takes "yes" for a bool: neither is meant
    odd = not isinstance(value, bool) if kind is bool else isinstance(value, bool) and not _takes_bool(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydantic's, on how peft writes its types
        try:
            TypeAdapter(kind).validate_python(value)
        except ValidationError:
            odd = True
        except (PydanticSchemaGenerationError, PydanticUndefinedAnnotation, TypeError):
            pass  # a type of peft's own, which peft checks
    if odd:
        of = str(kind).replace("typing.", "") if get_args(kind) else getattr(kind, "__name__", str(kind))
        raise ConfigError(f"{named} has {name}={_short(value)}: must be {_short(of)[1:-1]}")


def _same(value: Any, default: Any) -> bool:
    return value is default or (type(value) is type(default) and value == default)


def _takes_bool(kind: Any) -> bool:
    return kind is bool or kind is Any or isinstance(kind, bool) or any(map(_takes_bool, get_args(kind)))


def same_adapter(first: PeftConfig, second: PeftConfig) -> bool:
    """Tell whether two configurations mean the same adapters.

    Args:
        first: peft's configuration.
        second: Another.

    Returns:
        Whether all settings agree, whatever the order of the target modules and the version of peft.
    """
    return plain(first) == plain(second)


def plain(config: PeftConfig) -> dict[str, Any]:
    """Lay out what a configuration means.

    Args:
        config: peft's configuration.

    Returns:
        Its settings by name, lists of modules in one order, without the version of peft.
    """
    content: dict[str, Any] = {name: value for name, value in config.to_dict().items() if name != "peft_version"}
    return {
        name: sorted(value) if isinstance(value, set) or (name in _MODULES and isinstance(value, list)) else value
        for name, value in content.items()
    }


def adapter_in_words(config: PeftConfig) -> str:
    """Describe a configuration as its file has it.

    Args:
        config: peft's configuration.

    Returns:
        Modules, layers, rank, α and initialisation, what LoRA trains besides, and the method where it is another.
    """
    method = method_name(config)
    ranks = [("r", "r"), ("init_r", "r"), ("target_r", "target r"), ("num_virtual_tokens", "virtual tokens")]
    if hasattr(config, "init_r"):
        ranks = ranks[1:]  # AdaLoRA does not use r
    said = [f"{word} = {getattr(config, name)}" for name, word in ranks if getattr(config, name, None) is not None]
    said += [f"α = {config.lora_alpha:g}"] if hasattr(config, "lora_alpha") else []
    if is_plain_kind(config):
        said.append(f"init {'default' if config.init_lora_weights is True else config.init_lora_weights}")
    bias = getattr(config, "bias", "none")
    said += [f"biases {bias}"] if bias != "none" else []
    said += ["biases of B"] if getattr(config, "lora_bias", False) else []
    where = _modules_in_words(config)
    return ", ".join(part for part in ("" if method == "LoRA" else method, where, *said) if part)


def _modules_in_words(config: PeftConfig) -> str:
    if not hasattr(config, "target_modules"):
        return ""
    targets, layers = config.target_modules, getattr(config, "layers_to_transform", None)
    if targets is None:
        modules = "peft's default modules"
    elif isinstance(targets, str):
        modules = "modules by a pattern" if targets != "all-linear" else targets
    elif any(split_name(target)[0] is not None for target in targets):
        modules = f"{len(targets)} modules by name"
    else:
        modules = ", ".join(sorted(targets))
    numbers = [layers] if isinstance(layers, int) else layers
    where = "" if " by " in modules else " of all layers"
    return modules + (f" of layers {', '.join(map(str, numbers))}" if numbers else where)


def placement_in_words(adapter: AdapterConfig) -> str:
    """Describe an adapter as it was asked for.

    Args:
        adapter: Settings.

    Returns:
        Modules, layers, rank, α and initialisation.
    """
    modules = "peft's default modules" if adapter.target_modules is None else ", ".join(adapter.target_modules)
    layers = "all layers" if adapter.layers is None else f"layers {', '.join(map(str, adapter.layers))}"
    return f"{modules} of {layers}, r = {adapter.r}, α = {adapter.alpha:g}, init {adapter.init}"
