"""Every architecture: exact gradients whatever its layout, the same kernel for every batch, heads that are kept."""

import functools
import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import families
import foretune as ft
from families import FAMILIES, LEAKING
from foretune.cli import run
from foretune.errors import ForetuneError, KernelError, PlacementError
from foretune.models.adapted import Batch
from foretune.models.head_parts import head_parts, modules_to_save, trained_head
from foretune.models.linear_modules import linear_names
from foretune.models.placement import lora_config, place, read_adapters
from foretune.ntk.factors import adapter_features, token_factors
from foretune.ntk.jacobian import batch_features, tangent_features
from foretune.ntk.kernel import tangent_kernel
from foretune.ntk.probe import head_inputs
from foretune.settings.groups import AdapterConfig
from foretune.tasks.demo import model_folder
from foretune.tasks.outputs import output_reduction

import cases
import references
from cases import batch_of

MARGIN = output_reduction("margin", 2)


def looked_at(name, sequences, *, draws=1, batch_size=32):
    """The adapted model as a score has it, with what no output depends on left out."""
    placed = place(families.build(name), families.all_linear(name), seed=0)
    adapted = read_adapters(placed, draws=draws)
    layout = families.layout_of(adapted, sequences, batch_size=batch_size)
    adapters = tuple(adapter for adapter in adapted.adapters if adapter.site.name not in layout.idle)
    head, _ = trained_head(placed, "default")
    head = {key: module for key, module in head.items() if key not in layout.idle}
    return replace(adapted, adapters=adapters, head=head, layout=layout)


SEQUENCES = families.ragged()


@functools.cache
def known(name):
    """For tests that leave it as it is."""
    return looked_at(name, SEQUENCES, draws=2)


@pytest.mark.parametrize("name", FAMILIES)
def test_kernels_and_token_factors_equal_autograd_example_by_example(name):
    sequences, adapted = SEQUENCES, known(name)
    batch = batch_of(sequences)
    features = tangent_features(adapted, [batch], MARGIN, n=len(sequences))
    factors = token_factors(adapted, [batch], MARGIN, n=len(sequences), storage=next(adapted.model.parameters()).dtype)
    from_tokens = adapter_features(factors, [adapter.rows for adapter in adapted.adapters], draws=2)
    parameters = [adapter.module.lora_B["default"].weight for adapter in adapted.adapters]
    gradients = references.parameter_gradients(adapted.model, sequences, MARGIN.directions, parameters)
    tolerance = families.within(name, 1e-9)
    splits = np.cumsum([parameter.numel() for parameter in parameters])[:-1]
    for found in (features, from_tokens):
        kernel = tangent_kernel(found)
        for site, block, own in zip(kernel.sites, kernel.blocks, np.split(gradients, splits, axis=2), strict=True):
            expected = references.scalar_kernel(own, MARGIN.scale)
            error = np.linalg.norm(block[0].sum(0) - expected)
            assert error <= tolerance * np.linalg.norm(expected), site.name
    for site, own, reference in zip(features.sites, from_tokens.b, features.b, strict=True):
        assert float((own - reference).norm()) <= families.within(name, 1e-12) * float(reference.norm()), site.name


@pytest.mark.parametrize("name", FAMILIES)
def test_inputs_of_the_output_layer_give_the_logits(name):
    """Whether the model reads one position, the first or the last, or averages the logits of all, as EuroBERT does."""
    sequences, adapted = SEQUENCES, known(name)
    batches = [batch_of(sequences, [4, 1]), batch_of(sequences, [0, 2, 3, 5])]
    factors = token_factors(adapted, batches, MARGIN, n=6)
    output, layer = list(adapted.head.items())[-1]
    inputs = head_inputs(adapted, {output: layer}, batches, n=6, n_outputs=2)
    tolerance = families.within(name, 1e-10)
    with torch.no_grad():
        for phi in (factors.inputs, inputs.to(factors.inputs.dtype)):
            assert float((layer(phi) - factors.logits).norm()) <= tolerance * float(factors.logits.norm())


@pytest.mark.parametrize("name", [*LEAKING, "xlnet"])
@pytest.mark.parametrize("spread", [1.0, 6.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_depends_on_the_batch_is_refused_above_one_text(name, spread, dtype):
    sequences = families.ragged()
    model = families.build(name, spread=spread, dtype=dtype)
    placed = place(model, lora_config(model, AdapterConfig(("all-linear",), r=2)), seed=0)
    adapted = read_adapters(placed)
    kind = type(model).__name__
    with pytest.raises(KernelError, match=rf"outputs of {kind} depend on the batch.*differ by .*%.*--batch-size 1"):
        _layout_padded_right(adapted, sequences)
    families.layout_of(adapted, sequences, batch_size=1)
    if name != "yoso":  # its attention is random
        families.layout_of(adapted, [sequences[0]] * 4)  # texts of one length need no padding


def _layout_padded_right(adapted, sequences):
    """Whatever side the architecture would be padded on."""
    base = adapted.model.get_base_model()
    tokenizer = cases.tokenizer()
    pad = tokenizer.pad
    tokenizer.pad = lambda features, **options: pad(features, **{**options, "padding_side": "right"})
    classifier = ft.Classifier("tiny", base, tokenizer, "given")
    return families.find_layout(adapted, classifier, [families.encoded(sequences)], n_outputs=2, batch_size=32)


def test_rounding_is_not_taken_for_a_leak():
    """T5 at this scale loses three digits of its gradients to float32, and none to the batch."""
    model = families.build("t5", dtype=torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    placed = place(model, lora_config(model, AdapterConfig(("all-linear",), r=2)), seed=0, inplace=True)
    for seed in range(3):
        sequences = [families.ended(ids) for ids in cases.ragged(8, 12, seed)]
        families.layout_of(read_adapters(placed), sequences)
    after = {name.replace("base_layer.", ""): value for name, value in placed.get_base_model().state_dict().items()}
    held = {name: after.get(name, after.get(name.replace("head.", "head.original_module."))) for name in before}
    assert all(torch.equal(value, before[name]) for name, value in held.items() if value is not None)


@pytest.mark.parametrize("n", [6, 9])
@pytest.mark.parametrize("name", ["longformer", "xlnet", "deberta", "opt"])
def test_examples_on_another_axis_are_right_when_nobody_looked(name, n):
    """Even where a tensor is as long as it has examples: nothing tells the axes apart then."""
    sequences = families.ragged(n, 9)
    if name == "xlnet":
        sequences = [ids for ids in sequences if len(ids) == 9] or sequences[:1]
        sequences = (sequences * 9)[:9]
    placed = place(families.build(name), families.all_linear(name), seed=0)
    adapted = read_adapters(placed)
    batch = batch_of(sequences)
    together = batch_features(adapted, batch, MARGIN)
    alone = [batch_features(adapted, one, MARGIN) for one in batch.singles()]
    for index, own in enumerate(together.b):
        expected = torch.cat([part.b[index] for part in alone], dim=1)
        assert float((own - expected).norm()) <= families.within(name, 1e-10) * float(expected.norm())


def bare_and_adapted(folder, name, seed):
    """A classifier on the checkpoint of a base, whose head is that of a seed."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    model.config.pad_token_id = cases.PAD
    return model.eval()


@pytest.mark.parametrize("name", [*FAMILIES, *LEAKING, "xlnet"])
def test_what_is_new_trains_and_is_loaded_again(name, tmp_path):
    """Whatever is not in the checkpoint of the base is in the adapter: another seed gives the same outputs."""
    folder = families.save(tmp_path / "base", name, head=False)
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=_a_kind(name))
    placed = place(bare_and_adapted(folder, name, 0), config, seed=0)
    assert config.modules_to_save is None  # the user's own stays as it is
    with torch.no_grad():
        for parameter in placed.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    placed.save_pretrained(tmp_path / "adapter")
    batch = batch_of(families.ragged())

    def outputs(model):
        torch.manual_seed(0)  # of YOSO's attention
        with torch.no_grad():
            return model(**batch.inputs).logits

    expected = outputs(placed)
    for seed in (1, 2):
        loaded = PeftModel.from_pretrained(bare_and_adapted(folder, name, seed), tmp_path / "adapter").eval()
        assert torch.allclose(outputs(loaded), expected, rtol=1e-5, atol=1e-6)


def _a_kind(name):
    return [linear_names(families.build(name))[0].rsplit(".", 1)[-1]]


def draw_anew(model, layer):
    """As transformers starts a layer that the checkpoint lacks."""
    torch.nn.init.zeros_(layer.bias)
    torch.nn.init.normal_(layer.weight, std=model.config.initializer_range)


def test_a_pooler_that_the_base_lacks_trains_and_one_that_it_has_does_not():
    model = families.build("bert")
    assert head_parts(model) == ("classifier",)
    assert "bert.pooler.dense" in linear_names(model)
    torch.nn.init.zeros_(model.bert.pooler.dense.bias)  # as MiniLM has it, whose pooler the checkpoint gives
    assert head_parts(model) == ("classifier",)
    draw_anew(model, model.bert.pooler.dense)
    assert head_parts(model) == ("bert.pooler", "classifier")
    assert "bert.pooler.dense" not in linear_names(model)
    placed = place(model, families.all_linear("bert"), seed=0)
    assert list(read_adapters(placed).head) == ["bert.pooler.dense", "classifier"]


def test_the_kernel_of_the_adapters_does_not_depend_on_what_trains_beside_them():
    model = families.build("deberta-v2")
    sequences = families.ragged()
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query_proj", "value_proj"])
    whole = read_adapters(place(model, config, seed=0))
    torch.manual_seed(0)
    bare = read_adapters(get_peft_model(families.build("deberta-v2"), config).eval())
    rows = {adapter.site.name: adapter.rows for adapter in whole.adapters}
    bare = replace(bare, adapters=tuple(replace(adapter, rows=rows[adapter.site.name]) for adapter in bare.adapters))
    one, other = (batch_features(adapted, batch_of(sequences), MARGIN) for adapted in (whole, bare))
    assert all(torch.equal(a, b) for a, b in zip(one.b, other.b, strict=True))
    assert list(whole.head) == ["pooler.dense", "classifier"]


@pytest.mark.real
def test_the_pooler_of_minilm_is_part_of_the_base():
    given = ft.load_classifier(str(model_folder()), label_names=("a", "b"), seed=0)
    assert head_parts(given.model) == ("classifier",)
    assert "bert.pooler.dense" in linear_names(given.model)


@pytest.mark.parametrize("name", ["bart", "big_bird", "deberta-v2", "eurobert", "funnel", "t5", "xlm"])
def test_the_kernel_of_a_head_holds_all_that_trains(name):
    sequences = families.ragged()
    model = families.build(name)
    if name == "big_bird":  # a new pooler, that its classifier does not read
        draw_anew(model, model.bert.pooler)
    placed = place(model, lora_config(model, AdapterConfig(("all-linear",), r=2)), seed=0)
    adapted = read_adapters(placed)
    adapted = replace(adapted, adapters=adapted.adapters[:1])
    found = tangent_kernel(batch_features(adapted, batch_of(sequences), MARGIN)).head
    parameters = references.named_parameters(placed, "modules_to_save")
    gradients = references.parameter_gradients(placed, sequences, MARGIN.directions, parameters)
    error = np.linalg.norm(found - references.scalar_kernel(gradients, MARGIN.scale))
    assert error <= families.within(name, 1e-10) * np.linalg.norm(found)


class Beside(nn.Module):
    """A classifier whose head's name ends names in its base."""

    base_model_prefix = "base"

    def __init__(self):
        super().__init__()
        self.base = nn.ModuleDict({"dense": nn.Linear(4, 4), "query": nn.Linear(4, 4)})
        self.dense = nn.Linear(4, 4)
        self.classifier = nn.Linear(4, 2)

    def forward(self, x):
        return self.classifier(self.dense(self.base["query"](self.base["dense"](x))))


def test_a_head_whose_name_ends_other_names_is_named_by_its_whole_path():
    model = Beside()
    assert head_parts(model) == ("dense", "classifier")
    assert modules_to_save(model) == ["base_model.model.dense"]
    assert linear_names(model) == ("base.dense", "base.query")
    placed = place(model, lora_config(model, AdapterConfig(("all-linear",), r=2)), seed=0)
    assert {site.name for site in read_adapters(placed).sites} == {"base.dense", "base.query"}
    assert list(read_adapters(placed).head) == ["dense", "classifier"]
    with pytest.raises(PlacementError, match=r"names the head's .*dense.* whole paths"):
        place(model, lora_config(model, AdapterConfig(("dense",), r=2)), seed=0)


def test_a_parameter_that_cannot_be_saved_is_refused_by_name():
    model = Beside()
    model.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(PlacementError, match="parameter 'scale' lies on the classifier itself"):
        place(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query"]), seed=0)


def test_a_new_layer_that_would_be_lost_is_refused_before_it_is_trained(tmp_path):
    task = ft.load_task(ft.DataConfig(cases.write_reviews(tmp_path / "reviews")))
    folder = families.save(tmp_path / "base", "deberta-v2", head=False)
    model, tokenizer = bare_and_adapted(folder, "deberta-v2", 0), cases.tokenizer()
    plain = LoraConfig(task_type="SEQ_CLS", target_modules=["query_proj"], r=2)
    with pytest.raises(PlacementError, match=r"layer 'pooler' is new and would be lost.*modules_to_save"):
        ft.tune(get_peft_model(model, plain).eval(), tokenizer, None, task)
    headless = LoraConfig(target_modules=["query_proj"], r=2)
    with pytest.raises(PlacementError, match=r"layer 'pooler' is new .*task_type='SEQ_CLS'"):
        ft.tune(bare_and_adapted(folder, "deberta-v2", 0), tokenizer, headless, task)


def test_what_else_is_named_to_be_saved_is_held_against_the_model():
    model = families.build("bert")
    for names, message in (
        (["word_embeddings"], "names 'word_embeddings': only the classifier's head .* which is classifier"),
        (["nothing"], "names 'nothing', which the model lacks"),
    ):
        with pytest.raises(PlacementError, match=message):
            place(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=names), seed=0)
    for names in (["pooler"], ["classifier", "score"], ["base_model.model.classifier"]):
        config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=names)
        assert "classifier" in read_adapters(place(model, config, seed=0)).head


@pytest.mark.parametrize("name", ["modernbert", "albert", "big_bird", "xlm", "longformer", "funnel"])
def test_families_without_default_modules_name_theirs(name):
    model = families.build(name)
    kinds = {path.rsplit(".", 1)[-1] for path in linear_names(model)}
    with pytest.raises(
        PlacementError, match=r"peft has no default modules for .*--target-modules.*the model has"
    ) as error:
        place(model, lora_config(model, AdapterConfig()), seed=0)
    assert all(kind in str(error.value) for kind in kinds)


CHANGES = [
    (name, change)
    for name in ("bert", "albert", "llama", "t5", "deberta-v2")
    for change in ("checkpointing", "input gradients", "tuples", "torchscript")
    if (name, change) != ("albert", "checkpointing")  # transformers has none for it
]


@pytest.mark.parametrize(("name", "change"), CHANGES)
def test_how_the_user_trains_changes_no_kernel(name, change):
    sequences = families.ragged()
    adapted = looked_at(name, sequences)
    batch = batch_of(sequences)
    expected = batch_features(adapted, batch, MARGIN)
    base = adapted.model.get_base_model()
    if change == "checkpointing":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the name of the method changes with the version
            base.gradient_checkpointing_enable()
    elif change == "input gradients":
        base.enable_input_require_grads()
    elif change == "tuples":
        base.config.return_dict = False
    else:
        base.config.torchscript = True
        base.config.return_dict = False
    found = batch_features(adapted, batch, MARGIN)
    for own, reference in zip(found.b, expected.b, strict=True):
        assert float((own - reference).norm()) <= families.within(name, 1e-12) * float(reference.norm())
    storage = torch.float64
    factors = token_factors(adapted, [batch], MARGIN, n=len(sequences), storage=storage)
    for own, reference in zip(adapter_features(factors, [a.rows for a in adapted.adapters]).b, expected.b, strict=True):
        assert float((own - reference).norm()) <= families.within(name, 1e-10) * float(reference.norm())
    assert all(parameter.grad is None for parameter in adapted.model.parameters())


FEW = ["--samples", "12", "--eval-samples", "8", "--draws", "1", "--epochs", "1", "--train-batch-size", "8"]


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("albert", None),
        ("bart", None),
        ("big_bird", "Left out: bert.pooler (no output depends on it)."),
        ("deberta-v2", "one at a time"),
        ("esm", "Left out: esm.contact_head.regression (no output depends on it)."),
        ("mixtral", "Left out: mlp.experts (experts in one tensor are no linear modules)."),
        ("modernbert", None),
        ("opt", "one at a time"),
        ("qwen2_moe", "Left out: mlp.shared_expert_gate (narrower than the rank)."),
        ("t5", None),
        ("xlm", None),
    ],
)
def test_rank_and_tune_of_a_family_without_flags(name, left_out, tmp_path, capsys):
    """What rank writes is what tune trains, and what is loaded again gives the accuracy that was written down."""
    model = families.save(tmp_path / "model", name, head=name != "deberta-v2")
    data = cases.write_reviews(tmp_path / "reviews", 24, 8)
    common = ["--model", model, "--dataset", data]
    ranked = tmp_path / "ranked"
    assert run(["rank", *common, *FEW, "--finalists", "2", "--ranks", "2", "--output", str(ranked)]) == 0
    notes = json.loads((ranked / "result.json").read_text(encoding="utf-8"))["rankings"][0]["notes"]
    assert any(left_out in note for note in notes) if left_out else not any("Left out" in note for note in notes)
    written = json.loads((ranked / "adapter_config.json").read_text(encoding="utf-8"))
    tuned = tmp_path / "tuned"
    flags = ["--adapter-config", str(ranked), "--epochs", "1", "--train-batch-size", "8", "--train-eval-samples", "0"]
    assert run(["tune", *common, *flags, "--learning-rate", "1e-2", "--output", str(tuned)]) == 0
    capsys.readouterr()
    adapter = next(path.parent for path in tuned.rglob("adapter_model.safetensors") if "checkpoint" not in str(path))
    saved = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["modules_to_save"]
    assert set(written["modules_to_save"] or []) | {"classifier", "score"} == set(saved)
    final = json.loads((tuned / "result.json").read_text(encoding="utf-8"))["final"]
    loaded = PeftModel.from_pretrained(bare_and_adapted(model, name, 7), adapter).eval()
    tokenizer = cases.tokenizer()
    texts, labels = zip(*map(cases.review, range(24, 32)), strict=True)
    with torch.no_grad():
        logits = torch.cat([loaded(**tokenizer(text, return_tensors="pt")).logits for text in texts]).double()
    wanted = torch.tensor([["negative", "positive"].index(label) for label in labels])
    assert float((logits.argmax(1) == wanted).double().mean()) == final["eval_accuracy"]
    assert float(nn.functional.cross_entropy(logits, wanted)) == pytest.approx(final["eval_loss"], abs=1e-5)


def test_modules_are_excluded_by_name(tmp_path, capsys):
    model = families.save(tmp_path / "model", "bert")
    data = cases.write_reviews(tmp_path / "reviews", 24, 8)
    common = ["rank", "--model", model, "--dataset", data, *FEW, "--finalists", "3", "--ranks", "2"]
    folder = tmp_path / "ranked"
    excluded = ["--exclude-modules", "query", "attention.output.dense", "bert.pooler.dense"]
    assert run([*common, *excluded, "--output", str(folder)]) == 0
    names = (folder / "candidates.csv").read_text(encoding="utf-8")
    assert "value" in names
    assert not any(name in names for name in ("query", "attention.output", "pooler"))
    again = tmp_path / "again"
    assert run(["rank", "--config", str(folder / "config.yaml"), "--output", str(again)]) == 0
    assert (again / "candidates.csv").read_text(encoding="utf-8") == names
    capsys.readouterr()
    assert run([*common, "--exclude-modules", "querry"]) == 2
    assert "excluded module 'querry' matches nothing: the model has dense, key, query, value" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["score", "forecast"])
def test_a_score_says_what_it_left_out_and_what_goes_one_by_one(command, tmp_path, capsys):
    data = cases.write_reviews(tmp_path / "reviews", 24, 8)
    for name, note in (
        ("big_bird", "note: bert.pooler: no output depends on it: left out"),
        ("opt", "note: fc1, fc2: texts go one at a time"),
    ):
        model = families.save(tmp_path / name, name)
        flags = [
            "--target-modules",
            "all-linear",
            "--r",
            "2",
            *FEW[:4],
            *(FEW[6:] if command == "forecast" else FEW[4:6]),
        ]
        assert run([command, "--model", model, "--dataset", data, *flags]) == 0
        assert note in capsys.readouterr().err


@pytest.mark.parametrize("command", ["score", "rank"])
def test_leaking_families_are_refused_by_the_commands(command, tmp_path, capsys):
    model = families.save(tmp_path / "model", "fnet")
    data = cases.write_reviews(tmp_path / "reviews", 24, 8)
    flags = FEW if command == "rank" else ["--samples", "12", "--eval-samples", "8", "--target-modules", "all-linear"]
    common = [command, "--model", model, "--dataset", data, *flags, *(["--ranks", "2"] if command == "rank" else [])]
    assert run(common) == 2
    assert "FNetForSequenceClassification depend on the batch" in capsys.readouterr().err
    assert run([*common, "--batch-size", "1"]) == 0


def test_a_model_that_does_not_run_is_one_line():
    adapted = read_adapters(place(families.build("bert"), families.all_linear("bert"), seed=0))
    adapted.model.get_base_model().bert.encoder.forward = None
    with pytest.raises(ForetuneError, match="BertForSequenceClassification does not run on a text of 3 tokens"):
        families.layout_of(adapted, families.ragged())
    assert isinstance(adapted.model, PeftModel)


def test_texts_that_a_model_refuses_are_one_line():
    adapted = read_adapters(place(families.build("bart"), families.all_linear("bart"), seed=0))
    with pytest.raises(KernelError, match="refuses the texts: All examples must have the same number of <eos> tokens"):
        batch_features(adapted, batch_of([[5, families.EOS, 6, families.EOS], [5, 6, families.EOS]]), MARGIN)


def test_a_head_that_is_not_all_linear_has_no_kernel_but_a_forecast(tmp_path):
    task = ft.load_task(ft.DataConfig(cases.write_reviews(tmp_path / "reviews", 24, 8)))
    model, config = families.build("modernbert", dtype=torch.float32), families.all_linear("modernbert")
    settings = ft.ScoreSettings(samples=12, eval_samples=6, draws=1, ntk_params="adapter+head")
    with pytest.raises(ForetuneError, match=r"'head\.norm' as well, which is not linear"):
        ft.score(model, cases.tokenizer(), config, task, settings=settings)


def test_an_expert_that_some_texts_do_not_meet_has_zero_gradients():
    sequences = families.ragged()
    adapted = looked_at("bert", sequences)
    first = adapted.adapters[0]
    spare = replace(first, site=replace(first.site, name="spare"), module=nn.Linear(16, 16))
    more = replace(adapted, adapters=(*adapted.adapters, spare))
    batch = Batch(torch.arange(2), {name: tensor[:2] for name, tensor in batch_of(sequences).inputs.items()})
    assert not bool(batch_features(more, batch, MARGIN).b[-1].any())
    factors = token_factors(more, [batch], MARGIN, n=2, storage=torch.float64)
    assert factors.modules[-1].starts.tolist() == [0, 0, 0]
    with pytest.raises(KernelError, match="'spare' is not used in the forward pass"):
        batch_features(replace(more, layout=replace(adapted.layout, idle=("spare",))), batch, MARGIN)
