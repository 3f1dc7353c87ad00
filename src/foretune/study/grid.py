"""A study's grid: models × data sets × placements × ranks × seeds, read from YAML."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from foretune.errors import ConfigError, reason, shown
from foretune.report.store import read_yaml
from foretune.report.texts import printable
from foretune.settings.commands import ScoreSettings, TuneSettings
from foretune.settings.groups import LANGUAGE_KINDS, AdapterConfig, DataConfig, ModelConfig

Config = TypeVar("Config", ModelConfig, DataConfig, AdapterConfig, ScoreSettings, TuneSettings)
MOST_CELLS = 100_000
KEYS = ("models", "datasets", "placements", "ranks", "seeds", "score", "train")


@dataclass(frozen=True)
class Cell:
    """One configuration to score and to fine-tune.

    Attributes:
        model: Model.
        data: Data set.
        adapter: Adapter.
        score: How it is scored.
        train: How it is fine-tuned; its seed is that of the score.
        model_name: Short name of the model.
        data_name: Short name of the data set.
        placement: Short name of the placement.
        family: Name that versions of one data set share, such as parts of it of different size.
    """

    model: ModelConfig
    data: DataConfig
    adapter: AdapterConfig
    score: ScoreSettings
    train: TuneSettings
    model_name: str
    data_name: str
    placement: str
    family: str

    @property
    def names(self) -> dict[str, str | int]:
        """What tells the cell from the others of its grid."""
        return {
            "model": self.model_name,
            "dataset": self.data_name,
            "placement": self.placement,
            "r": self.adapter.r,
            "seed": self.train.seed,
        }


def read_grid(path: Path) -> tuple[Cell, ...]:
    """Read a grid from a YAML file.

    Args:
        path: File.

    Returns:
        The cells: for each seed the data sets, for each of them the placements.

    Raises:
        ConfigError: If it cannot be read or holds an unknown or wrong setting.
    """
    content = read_yaml(path, kind=ConfigError)
    if not isinstance(content, dict):
        raise ConfigError(f"study {str(path)!r} must hold a mapping with {', '.join(KEYS)}")
    return expand(content)


def expand(content: Mapping[str, Any]) -> tuple[Cell, ...]:
    """Multiply a grid out.

    `models` and `datasets` hold paths or hub ids, or mappings with the settings of `ModelConfig` and `DataConfig`,
    a `name`, and for data sets their own `score` and `train` and a `family`, the name that versions of one data set
    share (by default their own); `placements` hold settings of `AdapterConfig` and a `name`; one with an `r` has that
    rank alone, whatever `ranks` says. `ranks` is [8] and `seeds` [0] where not given. A `max_length` of `train` holds
    for `score` too, unless that has its own.

    Args:
        content: As in the YAML file.

    Returns:
        The cells.

    Raises:
        ConfigError: Naming what is unknown, missing, wrong or there twice.
    """
    _check_keys(content, KEYS, "study")
    models = [_entry(ModelConfig, "model", entry) for entry in _list(content, "models")]
    datasets = [_dataset(entry) for entry in _list(content, "datasets")]
    ranks, seeds = _integers(content, "ranks", [8]), _integers(content, "seeds", [0])
    placements = [placement for entry in _list(content, "placements") for placement in _placements(entry, ranks)]
    common = {name: _mapping(content, name) for name in ("score", "train")}
    n_cells = len(models) * len(datasets) * len(placements) * len(seeds)
    if n_cells > MOST_CELLS:
        raise ConfigError(f"the study has {n_cells:,} cells: at most {MOST_CELLS:,}, so split it")
    cells = []
    for seed, (model, model_name, _), (data, data_name, own, family), (adapter, placement) in product(
        seeds, models, datasets, placements
    ):
        train = {**common["train"], **own["train"], "seed": seed}
        length = {"max_length": train["max_length"]} if "max_length" in train else {}
        score = {**length, **common["score"], **own["score"], "seed": seed}
        cells.append(
            Cell(
                model,
                data,
                adapter,
                _read(ScoreSettings, score, "score"),
                _read(TuneSettings, train, "train"),
                model_name,
                data_name,
                placement,
                family,
            )
        )
    seen: set[tuple[str | int, ...]] = set()
    for cell in cells:
        names = tuple(cell.names.values())
        if names in seen:
            raise ConfigError(f"two cells of the study are called {cell.names}: give placements or data sets a name")
        seen.add(names)
    return tuple(cells)


def _list(content: Mapping[str, Any], key: str) -> list[Any]:
    entries = content.get(key)
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"study: {key} must be a list with at least one entry, not {shown(entries)}")
    return entries


def _integers(content: Mapping[str, Any], key: str, default: list[int]) -> list[int]:
    numbers = content.get(key, default)
    if not (isinstance(numbers, list) and numbers and all(type(value) is int for value in numbers)):
        raise ConfigError(f"study: {key} must be a list of integers, not {shown(numbers)}")
    return numbers


def _mapping(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    settings = content.get(key)
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ConfigError(f"study: {key} must be a mapping of settings, not {shown(settings)}")
    if "seed" in settings:
        raise ConfigError(f"study: {key} has a seed: list the seeds under 'seeds'")
    return settings


def _placements(entry: Any, ranks: Sequence[int]) -> list[tuple[AdapterConfig, str]]:
    config, name, _ = _entry(AdapterConfig, None, entry)
    own = (config.r,) if "r" in entry else ranks
    return [(replace(config, r=rank), name) for rank in own]


def _dataset(entry: Any) -> tuple[DataConfig, str, dict[str, dict[str, Any]], str]:
    config, name, own = _entry(DataConfig, "dataset", entry, extra=("score", "train"))
    if config.task in LANGUAGE_KINDS:
        raise ConfigError("foretune study does not take language models yet: foretune forecast, rank and tune do")
    return config, name, own, _word(entry, "family", "dataset") or name


def _entry(
    kind: type[Config], key: str | None, entry: Any, *, extra: Sequence[str] = ()
) -> tuple[Config, str, dict[str, dict[str, Any]]]:
    """An entry of models, data sets or placements: its settings, its name, its own further settings."""
    if key is not None and isinstance(entry, str):
        entry = {key: entry}
    what = key or "placement"
    if not isinstance(entry, dict):
        raise ConfigError(f"study: {what} {shown(entry)} must be a mapping of settings")
    own = {name: _mapping(entry, name) for name in extra}
    outside = ("name", "family", *extra) if kind is DataConfig else ("name", *extra)
    settings = {name: value for name, value in entry.items() if name not in outside}
    if kind is AdapterConfig and isinstance(settings.get("target_modules"), str):
        settings["target_modules"] = [settings["target_modules"]]
    if isinstance(settings.get("label_column"), str):
        settings["label_column"] = [settings["label_column"]]
    config = _read(kind, settings, what)
    return config, _word(entry, "name", what) or printable(_name(config)), own


def _word(entry: Any, key: str, where: str) -> str:
    """A short name as it can be printed; empty where there is none."""
    word = entry.get(key) if isinstance(entry, dict) else None
    if word is None:
        return ""
    if isinstance(word, bool) or not isinstance(word, str | int | float) or not str(word).strip():
        raise ConfigError(f"study: {where}: {key} = {shown(word)}: must be a short text")
    return printable(str(word))


def _name(config: ModelConfig | DataConfig | AdapterConfig | ScoreSettings | TuneSettings) -> str:
    if isinstance(config, ModelConfig):
        return Path(config.model).name or config.model
    if isinstance(config, DataConfig):
        return config.config_name or Path(config.dataset).stem
    if isinstance(config, AdapterConfig):
        modules = "default" if config.target_modules is None else ",".join(config.target_modules)
        return modules if config.layers is None else f"{{{','.join(map(str, config.layers))}}} {modules}"
    return ""


def _check_keys(mapping: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for name in mapping:
        if name not in known:
            near = get_close_matches(str(name)[:100], known, n=1)
            hint = f": did you mean {near[0]!r}?" if near else f": it has {', '.join(known)}"
            raise ConfigError(f"{where} has no setting {shown(name)}{hint}")


@cache
def _reader(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _read(kind: type[Config], settings: Mapping[str, Any], where: str) -> Config:
    _check_keys(settings, [field.name for field in fields(kind)], where)
    for field in fields(kind):  # YAML writes true as yes and on too, and Python counts it as 1
        if isinstance(settings.get(field.name), bool) and field.type is not bool:
            raise ConfigError(f"{where}: {field.name} = {settings[field.name]}: true and false fit no such setting")
    try:
        reader: Any = kind
        config: Config = _reader(reader).validate_python(dict(settings))
        return config
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        value = "" if first["type"] == "missing" else f" = {shown(first['input'])}"
        raise ConfigError(f"{where}: {place}{value}: {first['msg'].lower()}") from error
    except ConfigError as error:  # of the settings themselves
        raise ConfigError(f"{where}: {error}") from error
    except (RecursionError, OverflowError, ValueError) as error:  # numbers and nestings beyond all measure
        raise ConfigError(f"{where}: cannot be read as settings: {reason(error)}") from error
