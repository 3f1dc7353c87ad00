"""Quantised base models: kernels are those of the unpacked weights, sizes those of the packed ones."""

import copy

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import foretune as ft
from foretune.errors import KernelError, ModelError, PlacementError
from foretune.models.alignment import is_neutral, make_neutral, sharing_copy
from foretune.models.head_parts import check_head_plain
from foretune.models.identity import fingerprint
from foretune.models.linear_modules import linear_names
from foretune.models.packed import alias, computing_dtype, copied, holds_packed, is_packed, n_bytes, n_weights, unpacked
from foretune.models.placement import place, read_adapters
from foretune.ntk.jacobian import tangent_features
from foretune.problem import describe, expected_bytes
from foretune.settings.commands import ScoreSettings
from foretune.tasks.outputs import output_reduction

import cases
from packing import PackedLinear, Severed, pack, unpack

SETTINGS = ScoreSettings(samples=12, eval_samples=6, draws=1)
TASK = cases.task_of("classification", 2)


def score(model, config=None):
    return ft.score(model, cases.tokenizer(), config or cases.lora("bert"), TASK, settings=SETTINGS)


def kernel_of(result):
    return result.measurement.k_train_train[0]


def change(found, expected):
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_is_that_of_the_unpacked_weights(dtype):
    packed = pack(cases.tiny("bert", dtype=dtype, spread=3.0))
    before = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    plain = unpack(copy.deepcopy(packed))
    assert linear_names(packed) == linear_names(plain)
    found, expected = score(packed), score(plain)
    assert change(kernel_of(found), kernel_of(expected)) < {torch.bfloat16: 1e-2}.get(dtype, 1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in packed.state_dict().items())
    assert {adapter.rows.dtype for adapter in found.plan.adapted.adapters} <= {dtype, torch.float32}


def test_a_quantised_first_parameter_decides_nothing():
    model = pack(cases.tiny("bert", dtype=torch.float32, spread=3.0), tables=True)
    assert next(model.parameters()).dtype == torch.int8
    assert computing_dtype(model) == torch.float32
    result = score(model)
    assert describe(result.plan)["dtype"] == "float32"
    assert result.measurement.epsilon == np.finfo(np.float32).eps
    assert np.linalg.norm(kernel_of(result)) > 0


def test_bytes_and_numbers_of_a_plan():
    model = pack(cases.tiny("bert", dtype=torch.float32))
    whole = cases.tiny("bert", dtype=torch.float32)
    small, large = (score(each).plan for each in (model, whole))
    integers = sum(p.numel() for p in model.parameters() if is_packed(p))
    assert expected_bytes(large)["weights"] - expected_bytes(small)["weights"] == 3 * integers
    assert expected_bytes(large)["features"] == expected_bytes(small)["features"]
    assert describe(large)["parameters"] == describe(small)["parameters"]


def test_names_of_weights():
    plain, packed = cases.tiny("bert", dtype=torch.float32), pack(cases.tiny("bert", dtype=torch.float32))
    other = pack(cases.tiny("bert", dtype=torch.float32, spread=5.0))
    assert not holds_packed(plain)
    assert holds_packed(packed)
    assert fingerprint(packed) == fingerprint(copied(packed))
    with torch.no_grad():
        other.bert.encoder.layer[0].output.LayerNorm.bias += 1
    assert len({fingerprint(model) for model in (plain, packed, other)}) == 3


def test_a_copy_shares_what_never_trains():
    model = pack(cases.tiny("bert", dtype=torch.float32))
    for (name, own), (_, other) in zip(model.named_parameters(), copied(model).named_parameters(), strict=True):
        assert (own.data_ptr() == other.data_ptr()) == is_packed(own), name


@pytest.mark.parametrize("inside", ["the head", "its dense layer"])
def test_a_quantised_head_is_refused(inside):
    family = "bert" if inside == "the head" else "roberta"
    model = pack(cases.tiny(family, dtype=torch.float32))
    if family == "bert":
        model.classifier = PackedLinear(model.classifier)
    else:
        model.classifier.dense = PackedLinear(model.classifier.dense)
    with pytest.raises(PlacementError, match=r"the head 'classifier' is quantised.*modules_to_not_convert=\['class"):
        check_head_plain(model)
    with pytest.raises(PlacementError, match="is quantised, and it trains"):
        score(model, cases.lora(family))


def test_a_module_without_a_gradient_is_named():
    model = pack(cases.tiny("bert", dtype=torch.float32))
    dense = model.bert.encoder.layer[1].intermediate
    dense.dense = Severed(unpack(copy.deepcopy(model)).bert.encoder.layer[1].intermediate.dense)
    placed = place(model, cases.lora("bert", target_modules=["query"]), seed=0)
    batch, reduction = cases.batch_of(cases.ragged()), output_reduction("margin", 2)
    with pytest.raises(KernelError, match=r"layer\.1\.intermediate\.dense' hands no gradient on"):
        tangent_features(read_adapters(placed), [batch], reduction, n=6)


class Once(nn.Parameter):
    """A parameter with a state that a pass takes away, as those of bitsandbytes."""

    def __new__(cls, data, state):
        self = torch.Tensor._make_subclass(cls, data, False)
        self.state = state
        return self


def test_a_pass_of_a_copy_leaves_the_state_of_a_parameter():
    numbers = torch.arange(4, dtype=torch.int8)
    own = Once(numbers, [1, 2])
    other = alias(own)
    assert type(other) is Once
    assert other.data_ptr() == own.data_ptr()
    other.state.clear()
    other.state = None
    assert own.state == [1, 2]
    plain = nn.Parameter(torch.zeros(2))
    assert alias(plain) is plain


def test_two_numbers_in_a_byte():
    class State:
        shape = (4, 6)
        packing_format_for_cpu = True

    parameter = Once(torch.zeros(12, 1, dtype=torch.uint8), None)
    assert (n_weights(parameter), n_bytes(parameter)) == (12, 12)
    parameter.quant_state = State()
    assert (n_weights(parameter), n_bytes(parameter)) == (24, 12)
    assert unpacked(parameter) is None
    model = cases.tiny("bert", dtype=torch.float32)
    model.bert.pooler.dense.weight = parameter
    with pytest.raises(ModelError, match=r"'bert\.pooler.dense' were packed for passes without gradients"):
        make_neutral(model, cases.tokenizer(), "single_label_classification")


def test_four_bits_keep_the_order_that_has_a_gradient():
    model, tokenizer = cases.tiny("bert", dtype=torch.float32), cases.tokenizer()
    make_neutral(model, tokenizer, "single_label_classification")
    assert is_neutral(model, tokenizer, "single_label_classification")
    model.bert.pooler.dense.support_avx512bf16_for_cpu = True
    assert not is_neutral(model, tokenizer, "single_label_classification")
    other = sharing_copy(model)
    make_neutral(other, tokenizer, "single_label_classification")
    assert model.bert.pooler.dense.support_avx512bf16_for_cpu
    assert not other.bert.pooler.dense.support_avx512bf16_for_cpu


SKIP = ["classifier", "pooler"]


def real(kind):
    """transformers' configuration of a library that is installed."""
    if kind.startswith("bitsandbytes"):
        pytest.importorskip("bitsandbytes")
        bits = {"load_in_8bit": True} if kind.endswith("8") else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        return transformers.BitsAndBytesConfig(**bits, llm_int8_skip_modules=SKIP)
    if kind.startswith("quanto"):
        pytest.importorskip("optimum.quanto")
        return transformers.QuantoConfig(f"int{kind[-1]}", modules_to_not_convert=SKIP)
    quantization = pytest.importorskip("torchao.quantization")
    return transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig(), modules_to_not_convert=SKIP)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "bound"),
    [("bitsandbytes 8", 0.05), ("bitsandbytes 4", 0.4), ("quanto 8", 0.05), ("quanto 4", 0.6), ("torchao 8", 0.05)],
)
def test_real_libraries(tmp_path, kind, bound):
    configuration = real(kind)
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
    config = transformers.BertConfig(vocab_size=cases.VOCABULARY, pad_token_id=cases.PAD, num_labels=2, **sizes)
    plain = transformers.BertForSequenceClassification(config).eval()
    plain.save_pretrained(tmp_path)
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    model = load(tmp_path, quantization_config=configuration, device_map="cpu", dtype=torch.float32).eval()
    assert holds_packed(model)
    found = score(model)
    assert change(kernel_of(found), kernel_of(score(plain))) < bound
    assert change(kernel_of(score(model)), kernel_of(found)) < 1e-6
