"""The heat map shows the numbers of the ranking."""

from types import SimpleNamespace

import numpy as np
import pytest

import foretune.ranking.figure as ranking_figure
from foretune.models.sites import Site, split_name
from foretune.ranking.figure import heat_map

NAMES = ["m.layer.0.att.query", "m.layer.0.att.key", "m.layer.2.att.key", "m.pooler"]


def sites():
    return tuple(Site(name, *split_name(name), 4, 4, rank=2, scaling=1.0) for name in NAMES)


def test_the_heat_map_has_a_cell_for_each_module_of_a_layer(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(ranking_figure, "save_drawing", lambda figure, path: figures.append((figure, path)))
    ranking = SimpleNamespace(sites=sites(), single=[0.1, 0.2, 0.4, 0.9], template=SimpleNamespace(r=2))
    heat_map(ranking, tmp_path / "heatmap.png")
    ((figure, path),) = figures
    assert path == tmp_path / "heatmap.png"
    axes = figure.axes[0]
    shown = np.ma.filled(axes.images[0].get_array(), np.nan)
    # rows are the layers 0 and 2 from below, columns query and key; the pooler lies in no layer
    assert shown == pytest.approx(np.array([[0.1, 0.2], [np.nan, 0.4]]), nan_ok=True)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["query", "key"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "2"]
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(0, 0): "0.10", (1, 0): "0.20", (1, 1): "0.40"}
