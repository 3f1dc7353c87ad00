"""The paper's experiment as a study: for its model and data, or for others, or scaled down."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from foretune.errors import DataError, PlacementError
from foretune.models.linear_modules import linear_names
from foretune.models.loading import read_skeleton
from foretune.models.sites import split_name
from foretune.paper.published import NAMES
from foretune.settings.commands import PaperSettings
from foretune.settings.groups import DataConfig
from foretune.study.grid import Cell, expand
from foretune.tasks.load import load_task

# What architectures call the paper's projections, by the last part of the module's name.
PROJECTIONS = {
    "W_q": ("query", "q_proj", "q_lin", "q", "query_proj", "Wq"),
    "W_k": ("key", "k_proj", "k_lin", "k", "key_proj", "Wk"),
    "W_v": ("value", "v_proj", "v_lin", "v", "value_proj", "Wv"),
}


@dataclass(frozen=True)
class Experiment:
    """The cells, and what differs from the paper.

    Attributes:
        cells: Cells, for each seed and data set in the order of the placements.
        placements: Names of the placements, in the paper's order and words.
        datasets: Names of the data sets, in the paper's order.
        model: Model as asked for.
        differences: What is not as in the paper, in words.
    """

    cells: tuple[Cell, ...]
    placements: tuple[str, ...]
    datasets: tuple[str, ...]
    model: str
    differences: tuple[str, ...]

    @property
    def caption(self) -> str:
        """What was run, for captions."""
        if not self.differences:
            return "As in the paper."
        return f"Not as in the paper: {'; '.join(self.differences)}."


def read_experiment() -> dict[str, Any]:
    """Read `paper.yaml`.

    Returns:
        Its content.
    """
    text = resources.files("foretune.paper").joinpath("paper.yaml").read_text(encoding="utf-8")
    content: dict[str, Any] = yaml.safe_load(text)
    return content


def plan_experiment(settings: PaperSettings) -> Experiment:
    """Fit the paper's experiment to a model and to data.

    Args:
        settings: Model, data and scale.

    Returns:
        The experiment.

    Raises:
        PlacementError: If the model has fewer than 3 layers, or no projections that go by a known name.
    """
    content = read_experiment()
    model = settings.model or content["model"]
    names = _module_names(model)
    n_layers = 1 + max((layer for layer, _ in map(split_name, names) if layer is not None), default=-1)
    if n_layers < 3:
        raise PlacementError(
            f"model {model!r} has {n_layers} layers: the paper's placements need a first, middle and last"
        )
    placements = [_placement(entry, names, n_layers) for entry in content["placements"]]
    datasets = [_dataset(entry, settings) for entry in content["datasets"]]
    train = dict(content["train"])
    for name in ("epochs", "max_length"):
        if getattr(settings, name) is not None:
            train[name] = getattr(settings, name)
    cells = expand(
        {
            "models": [{"model": model, "name": _short(model), "device": settings.device}],
            "datasets": datasets,
            "placements": [{**entry, "alpha": content["adapter"]["alpha"]} for entry in placements],
            "ranks": [content["adapter"]["r"]],
            "seeds": list(settings.seeds),
            "score": content["score"],
            "train": train,
        }
    )
    return Experiment(
        cells,
        tuple(entry["name"] for entry in placements),
        tuple(entry["name"] for entry in datasets),
        model,
        tuple(_differences(settings, content, placements, n_layers)),
    )


def _short(model: str) -> str:
    """Last two parts of a folder: the last is often no more than `model`."""
    path = Path(model).expanduser()
    return "/".join(path.absolute().parts[-2:]) if path.is_dir() else model


def _module_names(model: str) -> tuple[str, ...]:
    """Names of the linear modules, without the weights."""
    return linear_names(read_skeleton(model))


def _placement(entry: Mapping[str, Any], names: Sequence[str], n_layers: int) -> dict[str, Any]:
    numbers = {"first": 0, "middle": (n_layers - 1) // 2, "last": n_layers - 1}
    layers = sorted({numbers[word] for word in entry["layers"]})
    kinds = {name.rsplit(".", 1)[-1] for name in names}
    modules = []
    for projection in entry["modules"]:
        known = [kind for kind in PROJECTIONS[projection] if kind in kinds]
        if not known:
            existing = sorted(kinds)
            more = f" and {len(existing) - 12} more" if len(existing) > 12 else ""
            raise PlacementError(
                f"the model has no module that is known as {projection}: it has {', '.join(existing[:12])}{more}"
            )
        modules.append(known[0])
    name = f"({{{','.join(map(str, layers))}}}, {{{','.join(entry['modules'])}}})"
    return {"name": name, "layers": layers, "target_modules": modules}


def _dataset(entry: Mapping[str, Any], settings: PaperSettings) -> dict[str, Any]:
    dataset = {**entry, "train": dict(entry["train"])}
    if settings.learning_rate is not None:
        dataset["train"]["learning_rate"] = settings.learning_rate
    if settings.max_train is not None:
        dataset["max_train"] = settings.max_train
    if settings.data_dir is not None:
        folder = settings.data_dir / dataset["name"]
        if not folder.is_dir():
            raise DataError(f"--data-dir {str(settings.data_dir)!r} has no folder {dataset['name']!r}")
        dataset["dataset"] = str(folder)
        dataset.pop("config_name", None)
        if "positive_from" in dataset and load_task(DataConfig(str(folder))).n_classes == 2:
            del dataset["positive_from"]  # made binary already
    return dataset


def _differences(
    settings: PaperSettings, content: Mapping[str, Any], placements: Sequence[Mapping[str, Any]], n_layers: int
) -> list[str]:
    said = []
    if settings.model is not None and settings.model != content["model"]:
        said.append(f"model {_short(settings.model)} instead of {content['model']}")
    if n_layers != 12:
        middle = next(entry["layers"] for entry in placements if len(entry["layers"]) == 3)
        said.append(f"{n_layers} layers, so {{{','.join(map(str, middle))}}} for {{0,5,11}}")
    if settings.data_dir is not None:
        said.append("local data")
    if settings.max_train is not None:
        said.append(f"at most {settings.max_train:,} training texts of each data set")
    for name, word in (("epochs", "epochs"), ("max_length", "tokens")):
        value = getattr(settings, name)
        if value is not None and value != content["train"][name]:
            said.append(f"{value} {word} instead of {content['train'][name]}")
    if settings.learning_rate is not None:
        rates = sorted({float(entry["train"]["learning_rate"]) for entry in content["datasets"]})
        said.append(f"learning rate {settings.learning_rate:g} instead of {' and '.join(f'{r:g}' for r in rates)}")
    if len(settings.seeds) > 1:
        said.append(f"{len(settings.seeds)} seeds instead of one, mean ± standard deviation")
    return said


def title(dataset: str) -> str:
    """Write a data set's name as the paper does.

    Args:
        dataset: Name in paper.yaml.

    Returns:
        The paper's name.
    """
    return NAMES.get(dataset, dataset)
