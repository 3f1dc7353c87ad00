"""peft's `adapter_config.json`: written for a candidate, read for a run."""

import copy
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any, get_args, get_type_hints

from peft import LoraConfig
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from pydantic import TypeAdapter, ValidationError

from foretune.errors import ConfigError, border, reason
from foretune.models.output_layer import CLASSIFIER
from foretune.models.sites import split_name
from foretune.settings.commands import ADAPTER_FILE
from foretune.settings.groups import AdapterConfig

_LARGEST = 1_000_000  # of a rank, and bytes of a file


def save_adapter(config: LoraConfig, path: Path) -> None:
    """Write a configuration to a file through peft; the same configuration gives the same bytes.

    Args:
        config: peft's configuration; not changed.
        path: File, of any name.
    """
    config = copy.deepcopy(config)
    for name in ("target_modules", "exclude_modules"):
        if isinstance(getattr(config, name), set):
            setattr(config, name, sorted(getattr(config, name)))
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        path.write_bytes((Path(folder) / ADAPTER_FILE).read_bytes())


def adapter_from_file(path: Path | str, *, task_type: str = CLASSIFIER) -> LoraConfig:
    """Read peft's configuration of a LoRA adapter, to start a new adapter from it.

    It may be that of a trained adapter; the weights are not read, and what says that it is only for inference, or
    of which model it was, is left out.

    Args:
        path: An `adapter_config.json`, of whatever name, or the folder that holds it.
        task_type: What it must be for, in peft's words: `SEQ_CLS`, or `CAUSAL_LM` or `SEQ_2_SEQ_LM` for a
            language model.

    Returns:
        peft's configuration for that task.

    Raises:
        ConfigError: If there is no such file, or it is no JSON, no LoRA, for another task, or has options
            that this peft does not know or foretune does not train.
    """
    with border(ConfigError, f"cannot read adapter configuration {str(path)!r}"):
        file = Path(path).expanduser()
        if file.is_dir():
            file /= ADAPTER_FILE
    named = f"adapter configuration {str(file)!r}"
    content = _read(file, named)
    if content.get("peft_type") != "LORA":
        raise ConfigError(f"{named} has peft_type {_short(content.get('peft_type'))}: only LORA is supported")
    if content.get("task_type") not in (None, task_type):
        raise ConfigError(f"{named} has task_type {_short(content['task_type'])}: only {task_type!r} is supported")
    _check_values(content, named)
    content |= {"task_type": task_type, "inference_mode": False, "base_model_name_or_path": None}
    saved = [name for name in content.get("modules_to_save") or [] if name not in SEQ_CLS_HEAD_NAMES]
    content["modules_to_save"] = list(dict.fromkeys(saved)) or None  # peft adds its own names to every configuration
    with border(ConfigError, f"{named} is refused by peft"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on settings that do not go together: peft ignores one of them
        return LoraConfig.from_peft_type(**content)


def _read(file: Path, named: str) -> dict[str, Any]:
    with border(ConfigError, f"cannot read {named}"):
        if not file.is_file():
            raise ConfigError(f"{named} does not exist: name an {ADAPTER_FILE} or the folder that holds it")
        if file.stat().st_size > _LARGEST:
            raise ConfigError(f"{named} has more than {_LARGEST:,} bytes: name an {ADAPTER_FILE}, not the weights")
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    if not isinstance(content, dict):
        raise ConfigError(f"{named} holds no JSON object: write it with LoraConfig.save_pretrained")
    content.pop("runtime_config", None)
    return content


def _short(value: Any) -> str:
    return reason(ValueError(repr(value)))


def _check_values(content: dict[str, Any], named: str) -> None:
    types = get_type_hints(LoraConfig)
    types |= {"lora_alpha": float, "init_lora_weights": bool | str}
    types |= dict.fromkeys(("rank_pattern", "alpha_pattern"), dict[str, float] | None)
    for name in sorted(content):
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
    numbers = {"r": content.get("r", 8), "lora_alpha": content.get("lora_alpha", 8)}
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
    odd = isinstance(value, bool) != (kind is bool) if name != "init_lora_weights" else False
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError:
        odd = True
    if odd:
        of = str(kind).replace("typing.", "") if get_args(kind) else getattr(kind, "__name__", str(kind))
        raise ConfigError(f"{named} has {name}={_short(value)}: must be {_short(of)[1:-1]}")


def same_adapter(first: LoraConfig, second: LoraConfig) -> bool:
    """Tell whether two configurations mean the same adapters.

    Args:
        first: peft's configuration.
        second: Another.

    Returns:
        Whether all settings agree, whatever the order of the target modules and the version of peft.
    """
    return plain(first) == plain(second)


def plain(config: LoraConfig) -> dict[str, Any]:
    """Lay out what a configuration means.

    Args:
        config: peft's configuration.

    Returns:
        Its settings by name, lists of modules in one order, without the version of peft.
    """
    content: dict[str, Any] = {name: value for name, value in config.to_dict().items() if name != "peft_version"}
    return {
        name: sorted(value) if name in ("target_modules", "exclude_modules") and not isinstance(value, str) and value
        else value
        for name, value in content.items()
    }  # fmt: skip


def adapter_in_words(config: LoraConfig) -> str:
    """Describe a configuration as its file has it.

    Args:
        config: peft's configuration.

    Returns:
        Modules, layers, rank, α and initialisation.
    """
    targets, layers = config.target_modules, config.layers_to_transform
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
    where = f" of layers {', '.join(map(str, numbers))}" if numbers else where
    init = "default" if config.init_lora_weights is True else config.init_lora_weights
    return f"{modules}{where}, r = {config.r}, α = {config.lora_alpha:g}, init {init}"


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
