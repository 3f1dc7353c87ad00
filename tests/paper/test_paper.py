import json

import datasets
import numpy as np
import pytest
import torch
import transformers as tf
import yaml
from scipy import stats

import drawn
import foretune.tasks.sources as sources
from foretune.cli import run
from foretune.errors import DataError, ModelError, PlacementError
from foretune.evaluation.correlations import Finding, finding_in_words, summarise
from foretune.evaluation.records import read_records
from foretune.models.linear_modules import linear_names
from foretune.paper.claims import CLAIMED, verdict
from foretune.paper.experiment import PROJECTIONS, _placement, plan_experiment, title
from foretune.paper.figure import figure1
from foretune.paper.items import needed_cells
from foretune.paper.published import TABLE1, TABLE2
from foretune.report.curves import running_mean
from foretune.settings.commands import PaperSettings
from foretune.settings.groups import DataConfig
from foretune.study.grid import Cell
from foretune.tasks.load import load_task

import cases

SMALL = ["--epochs", "1", "--max-length", "16", "--max-train", "40", "--learning-rate", "1e-2"]


def roberta(folder, n_layers=12):
    """RoBERTa-base's shape of names and layers, with random weights."""
    torch.manual_seed(0)
    config = tf.RobertaConfig(
        vocab_size=cases.VOCABULARY,
        pad_token_id=1,
        hidden_size=16,
        num_hidden_layers=n_layers,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=40,
    )
    tf.RobertaModel(config).save_pretrained(folder)
    cases.tokenizer().save_pretrained(folder)
    return str(folder)


def stars(folder, n=60):
    """Reviews with 1 to 5 stars."""
    cases.write_reviews(folder)
    for split, rows in (("train", range(n)), ("validation", range(n, n + 20))):
        lines = [f"{cases.review(index)[0]},{1 + index % 5}" for index in rows]
        (folder / f"{split}.csv").write_text("\n".join(["text,label", *lines]) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for index, name in enumerate(("cola", "sst2", "imdb")):
        cases.write_reviews(folder / name, n_train=60 + index)  # different content, so different cells
    stars(folder / "yelp")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return roberta(tmp_path_factory.mktemp("roberta"))


@pytest.fixture(scope="module")
def made(model, data_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("paper") / "out"
    tokens = ["paper", "table1", "table2", "table3", "figure1", "--model", model, "--data-dir", str(data_dir)]
    assert run([*tokens, *SMALL, "--output", str(out)]) == 0
    return out


def test_placements_of_a_roberta_are_the_papers(model, data_dir):
    experiment = plan_experiment(PaperSettings(model=model, data_dir=data_dir))
    assert experiment.placements == (
        "({0}, {W_q,W_v})",
        "({0,11}, {W_q,W_v})",
        "({0,5,11}, {W_q,W_v})",
        "({0,5,11}, {W_k})",
        "({11}, {W_q,W_v})",
    )
    assert len(experiment.cells) == 20
    modules = {cell.placement: cell.adapter.target_modules for cell in experiment.cells}
    assert modules["({0,5,11}, {W_k})"] == ("key",)
    assert modules["({0}, {W_q,W_v})"] == ("query", "value")
    for cell in experiment.cells:
        assert (cell.adapter.r, cell.adapter.alpha) == (8, 8)
        assert (cell.score.samples, cell.score.sigma, cell.score.head) == (32, 1e-4, "random")
        assert (cell.train.epochs, cell.train.max_length, cell.train.warmup_ratio) == (10, 512, 0.06)
    by_data = {cell.data_name: (cell.train.train_batch_size, cell.train.learning_rate) for cell in experiment.cells}
    assert by_data == {"cola": (32, 4e-4), "sst2": (16, 5e-4), "yelp": (32, 4e-4), "imdb": (16, 4e-4)}


@pytest.mark.parametrize(
    ("n_layers", "layers"), [(3, [0, 1, 2]), (4, [0, 1, 3]), (6, [0, 2, 5]), (12, [0, 5, 11]), (24, [0, 11, 23])]
)
def test_layers_of_other_depths(n_layers, layers):
    entry = {"layers": ["first", "middle", "last"], "modules": ["W_k"]}
    held = _placement(entry, ["layer.0.attention.self.key"], n_layers)
    assert held["layers"] == layers


@pytest.mark.parametrize("name", ["bert", "roberta", "mpnet", "distilbert", "llama"])
def test_projections_of_other_architectures(name):
    names = linear_names(cases.tiny(name))
    for projection in PROJECTIONS:
        (module,) = _placement({"layers": ["first"], "modules": [projection]}, names, 3)["target_modules"]
        assert module[0] == projection[-1]


def test_models_without_such_projections(data_dir, tmp_path):
    with pytest.raises(PlacementError, match="known as W_q"):
        plan_experiment(PaperSettings(model=gpt2(tmp_path), data_dir=data_dir))
    with pytest.raises(PlacementError, match="2 layers"):
        plan_experiment(PaperSettings(model=cases.save(tmp_path / "two"), data_dir=data_dir))
    with pytest.raises(ModelError, match="nowhere"):
        plan_experiment(PaperSettings(model="nowhere", data_dir=data_dir))
    with pytest.raises(DataError, match="no folder 'cola'"):
        plan_experiment(PaperSettings(model=roberta(tmp_path / "r", 3), data_dir=tmp_path))


def gpt2(folder):
    config = tf.GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2, n_positions=40, pad_token_id=1)
    tf.GPT2Model(config).save_pretrained(folder / "gpt2")
    return str(folder / "gpt2")


def test_yelp_is_made_binary_as_in_the_paper(data_dir, model):
    """Below 3 is label 0, 3 and above label 1: three stars are positive."""
    task = load_task(DataConfig(str(data_dir / "yelp"), positive_from=3))
    held = [1 + index % 5 for index in range(60)]
    assert task.train.labels.tolist() == [int(star >= 3) for star in held]
    assert task.evaluation.labels.tolist() == [int(1 + index % 5 >= 3) for index in range(60, 80)]
    assert task.label_names == ("below 3", "3 and above")
    cell = next(cell for cell in plan_experiment(PaperSettings(model=model, data_dir=data_dir)).cells
                if cell.data_name == "yelp")  # fmt: skip
    assert cell.data.positive_from == 3


def test_stars_as_the_hub_has_them(monkeypatch):
    names = ["1 star", "2 star", "3 stars", "4 stars", "5 stars"]
    features = datasets.Features({"label": datasets.ClassLabel(names=names), "text": datasets.Value("string")})
    split = datasets.Dataset.from_dict({"label": [0, 1, 2, 3, 4] * 4, "text": ["words"] * 20}, features=features)
    monkeypatch.setattr(sources, "_load_hub", lambda *_: {"train": split, "test": split})
    task = load_task(DataConfig("yelp_review_full", positive_from=3))
    assert task.train.labels.tolist() == [0, 0, 1, 1, 1] * 4
    assert task.n_classes == 2


def test_binary_data_stay_as_they_are(model, tmp_path):
    for name in TABLE1:
        cases.write_reviews(tmp_path / name)
    cells = plan_experiment(PaperSettings(model=model, data_dir=tmp_path)).cells
    assert {cell.data.positive_from for cell in cells} == {None}


@pytest.mark.parametrize(("threshold", "message"), [(9, "leaves one class"), (1, "leaves one class")])
def test_thresholds_that_leave_one_class(data_dir, threshold, message):
    with pytest.raises(DataError, match=message):
        load_task(DataConfig(str(data_dir / "yelp"), positive_from=threshold))
    with pytest.raises(DataError, match="does not begin with a number"):
        load_task(DataConfig(str(data_dir / "cola"), positive_from=3))


def test_fewer_training_rows_are_a_sample_of_all(data_dir):
    whole = load_task(DataConfig(str(data_dir / "cola")))
    some = load_task(DataConfig(str(data_dir / "cola"), max_train=20))
    assert len(some.train.labels) == len(some.train.texts) == 20
    assert set(some.train.texts) <= set(whole.train.texts)
    assert list(some.evaluation.texts) == list(whole.evaluation.texts)
    assert some.fingerprint != whole.fingerprint
    again = load_task(DataConfig(str(data_dir / "cola"), max_train=20))
    assert (again.train.texts, again.fingerprint) == (some.train.texts, some.fingerprint)
    assert load_task(DataConfig(str(data_dir / "cola"), max_train=60)).fingerprint == whole.fingerprint


def test_what_was_made(made):
    names = {path.name for path in made.iterdir()}  # and what is in them, below
    expected = {f"table{i}.{suffix}" for i in (1, 2, 3) for suffix in ("csv", "md", "tex")}
    expected |= {f"figure1.{suffix}" for suffix in ("png", "svg", "pdf", "md")}
    assert expected | {"cells.csv", "curves.csv", "claims.md", "study"} <= names


def test_table_1_holds_our_numbers_beside_the_papers(made):
    text = (made / "table1.md").read_text(encoding="utf-8")
    cells = [json.loads(path.read_text(encoding="utf-8")) for path in made.glob("study/cells/*/result.json")]
    assert len(cells) == 20
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("|")]
    heads = [head.strip(" |") for head in lines[0]]
    held = next(c for c in cells if c["names"]["dataset"] == "cola" and "W_k" in c["names"]["placement"])
    column = heads.index(held["names"]["placement"])
    accuracy = next(line for line in lines if line[1].strip() == "accuracy %")
    assert accuracy[column].strip() == f"{100 * held['outcomes']['accuracy']:.2f} (73.25)"
    kappa = next(line for line in lines if line[1].strip() == "κ")
    assert kappa[column].strip().endswith("(2320)")
    assert float(kappa[column].split()[0]) == pytest.approx(held["quantities"]["condition_number"], rel=1e-3)
    for word in ("at most 40 training texts", "1 epochs instead of 10", "16 tokens instead of 512", "local data",
                 "learning rate 0.01 instead of 0.0004 and 0.0005", "instead of roberta-base"):  # fmt: skip
        assert word in text


def test_table_2_divides_seconds_of_one_process(made):
    rows = (made / "table2.csv").read_text(encoding="utf-8").splitlines()[1:]
    assert len(rows) == 4
    first = rows[0].split(",")
    cells = [json.loads(path.read_text(encoding="utf-8")) for path in made.glob("study/cells/*/result.json")]
    (seconds,) = (c["seconds"] for c in cells if c["names"]["dataset"] == "cola" and "W_k" in c["names"]["placement"])
    assert first[1] == f"{seconds['fine_tune']:.1f}"
    assert first[2] == f"{seconds['kernel']:.2f}"
    assert first[3] == f"{100 * seconds['kernel'] / seconds['fine_tune']:.2f}%"
    assert first[4] == f"{seconds['kernel'] + seconds['load']:.2f}"
    assert first[-3:] == ["187", "33", "17.65%"]


def test_table_3_shows_both_settings(made):
    text = (made / "table3.csv").read_text(encoding="utf-8")
    assert "epochs,1 (10),1 (10),1 (10),1 (10)" in text
    assert "batch size,32 (32),16 (16),32 (32),16 (16)" in text


def test_the_figure_states_the_correlation_with_its_interval(made):
    text = (made / "figure1.md").read_text(encoding="utf-8")
    assert "20 cells" in text
    rho = summarise(read_records(made)).finding("condition_number", "accuracy", "spearman", "all")
    assert f"over all cells {finding_in_words(rho).strip('()')}" in text


def test_the_figure_shows_the_curves_and_the_accuracies_of_the_cells(made, model, data_dir):
    experiment = plan_experiment(PaperSettings(model=model, data_dir=data_dir))
    records = read_records(made)
    *curves, accuracy = figure1(experiment, records).axes
    for axes, placement in zip(curves, experiment.placements[2:4], strict=True):
        lines = drawn.lines(axes)
        assert len(lines) == 4
        for record in (record for record in records if record.placement == placement):
            (label,) = (text for text in lines if text.startswith(f"{title(record.dataset)}, "))
            assert label == f"{title(record.dataset)}, κ = {record.quantities['condition_number']:.3g}"
            window = max(1, record.steps[-1].step // 20)
            means = [np.nan if mean is None else mean for mean in running_mean(record.steps, window=window)]
            wanted = np.column_stack([[step.step for step in record.steps], means])
            assert lines[label][0] == pytest.approx(wanted, nan_ok=True)
    for dataset in experiment.datasets:
        cells = [record for record in records if record.dataset == dataset]
        wanted = [(cell.quantities["condition_number"], 100 * cell.outcomes["accuracy"]) for cell in cells]
        assert drawn.points(accuracy)[title(dataset)] == pytest.approx(np.array(wanted))


def test_items_share_their_cells(made, model, data_dir, capsys):
    tokens = ["paper", "table2", "--model", model, "--data-dir", str(data_dir), *SMALL, "--output", str(made)]
    assert run(tokens) == 0
    captured = capsys.readouterr()
    assert "4 cells, 4 of them finished" in captured.err
    assert "fine-tuning s" in captured.out


def test_table_3_needs_no_training(model, data_dir, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert run(["paper", "table3", "--model", model, "--data-dir", str(data_dir), "--output", out]) == 0
    assert "As in the paper" not in capsys.readouterr().out
    assert not (tmp_path / "out" / "study").exists()


def test_only_the_cells_that_are_needed(model, data_dir):
    experiment = plan_experiment(PaperSettings(model=model, data_dir=data_dir))
    assert len(needed_cells(experiment, ["table2"])) == 4
    assert all(isinstance(cell, Cell) for cell in needed_cells(experiment, ["table2"]))
    assert len(needed_cells(experiment, ["table2", "figure1"])) == 20
    assert needed_cells(experiment, ["table3"]) == ()


def test_wrong_commands(tmp_path, capsys):
    assert run(["paper", "--output", str(tmp_path / "o")]) == 2
    assert "name what to make" in capsys.readouterr().err
    assert run(["paper", "table4", "--output", str(tmp_path / "o")]) == 2
    assert run(["paper", "table3", "--seeds", "0", "0", "--output", str(tmp_path / "o")]) == 2
    assert "each once" in capsys.readouterr().err


def finding(estimate, established):
    return Finding(None, None, "spearman", "all", estimate, -1, 1, 0.5, 10, 10, established)


def test_verdicts():
    assert verdict(None, 1) == "not established"
    assert verdict(finding(0.9, False), 1) == "not established"
    assert verdict(finding(0.9, True), 1) == "borne out"
    assert verdict(finding(0.9, True), -1) == "reversed"
    assert CLAIMED == {"train_loss": 1, "eval_loss": 1, "accuracy": -1}


def test_the_papers_own_table_does_not_show_its_claim_within_a_data_set():
    """From the printed numbers: signs disagree between the data sets."""
    within = {}
    for name, row in TABLE1.items():
        kappa, accuracy = [cell.condition_number for cell in row], [cell.accuracy for cell in row]
        within[name] = stats.spearmanr(kappa, accuracy).statistic
    assert within == pytest.approx({"cola": -0.738, "sst2": -1.0, "yelp": 0.4, "imdb": 0.211}, abs=1e-3)
    assert np.mean(list(within.values())) == pytest.approx(-0.28, abs=0.005)
    losses = [stats.spearmanr([c.condition_number for c in row], [c.train_loss for c in row]).statistic
              for row in TABLE1.values()]  # fmt: skip
    assert losses == pytest.approx([0.8, 0.4, 0.2, 0.0], abs=1e-9)
    ratios = [round(kernel / tune, 4) for tune, kernel in TABLE2.values()]
    assert ratios == [0.1765, 0.0793, 0.0053, 0.0357]


def test_yaml_of_the_experiment_is_shipped():
    from importlib import resources

    text = resources.files("foretune.paper").joinpath("paper.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text)["datasets"][2]["positive_from"] == 3
