import copy
import json

import pytest
import torch
import transformers as tf
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import language
from foretune.errors import ConfigError, ModelError, PlacementError
from foretune.models.adapter_file import adapter_from_file, adapter_in_words, same_adapter, save_adapter
from foretune.models.head_parts import check_saved
from foretune.models.language_model import load_language_model, own_language_model, place_language
from foretune.models.linear_modules import linear_names
from foretune.models.output_layer import output_layer, task_type
from foretune.models.placement import lora_config, place, read_adapters
from foretune.settings.groups import AdapterConfig

import cases

ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
GATED = [*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
# what all-linear adapts in a layer; what stands beside it
KINDS = {
    **dict.fromkeys(["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text"], GATED),
    "phi3": ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"],
    "gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
    "gpt_neox": ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
    "opt": [*ATTENTION[:3], "self_attn.out_proj", "fc1", "fc2"],
    "mixtral": ATTENTION,  # experts and router lie in tensors of their own, and are left out
}


def load(source, **options):
    return load_language_model(source, **{"device": "cpu", **options})


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    made = {}

    def folder(name):
        if name not in made:
            made[name] = language.save(tmp_path_factory.mktemp("models") / name, name)
        return made[name]

    return folder


@pytest.fixture(scope="module")
def llama(checkpoints):
    return load(checkpoints("llama"))


@pytest.mark.parametrize("name", language.FAMILIES)
def test_a_family_loads_and_takes_adapters(checkpoints, tmp_path, name):
    loaded = load(checkpoints(name))
    assert not loaded.model.training
    assert not loaded.model.config.use_cache
    assert loaded.model.config.pad_token_id == loaded.tokenizer.pad_token_id
    assert loaded.tokenizer.pad_token_id == language.EOS or name == "qwen2"  # whose tokenizer brings a token for it
    assert loaded.position_limit == 40
    assert loaded.notes == ()
    assert task_type(loaded.model) == "CAUSAL_LM"
    assert output_layer(loaded.model) in ("lm_head", "embed_out")
    original = language.build(name)
    ids = torch.tensor([[5, 9, 7, 4, 11]])
    with torch.no_grad():
        logits = loaded.model(input_ids=ids).logits
        torch.testing.assert_close(logits, original(input_ids=ids).logits)
        assert torch.isfinite(logits).all()
        # padding on the right
        wide = torch.cat([ids, torch.full((1, 3), loaded.tokenizer.pad_token_id)], dim=1)
        mask = (torch.arange(8) < 5).long()[None]
        torch.testing.assert_close(loaded.model(input_ids=wide, attention_mask=mask).logits[:, :5], logits)

    placed = place_language(loaded, AdapterConfig(r=3), seed=4)
    adapted = read_adapters(placed, draws=2)
    sites = adapted.sites
    assert sorted(site.kind for site in sites if site.layer == 0) == sorted(KINDS[name])
    assert len(sites) == 2 * len(KINDS[name])
    assert adapted.head == {}
    assert all(adapter.b is None and adapter.rows.shape == (6, adapter.site.d_in) for adapter in adapted.adapters)
    assert {n.rsplit(".lora_", 1)[0] for n, p in placed.named_parameters() if p.requires_grad} == {
        f"base_model.model.{site.name}" for site in sites
    }
    with torch.no_grad():
        assert torch.equal(placed(input_ids=ids).logits, logits)
        moved = cases.with_nonzero_b(placed)(input_ids=ids).logits
    assert not torch.allclose(moved, logits)
    check_saved(placed)

    config = lora_config(loaded.model, AdapterConfig(r=3))
    save_adapter(config, tmp_path / "adapter_config.json")
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["task_type"] == "CAUSAL_LM"
    assert written["modules_to_save"] is None
    again = adapter_from_file(tmp_path, task_type="CAUSAL_LM")
    assert same_adapter(again, config)
    assert read_adapters(place(loaded.model, again, seed=4)).sites == sites
    # what peft writes with a trained adapter
    placed.save_pretrained(tmp_path / "trained")
    trained = adapter_from_file(tmp_path / "trained", task_type="CAUSAL_LM")
    assert read_adapters(place(loaded.model, trained, seed=4)).sites == sites


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_a_tied_output_layer_stays_tied_and_out(checkpoints, name):
    loaded = load(checkpoints(name))
    placed = place_language(loaded, AdapterConfig(), seed=0).get_base_model()
    assert placed.get_output_embeddings().weight is placed.get_input_embeddings().weight
    assert output_layer(loaded.model) not in linear_names(loaded.model)


def test_layers_and_modules_can_be_chosen(llama):
    placed = place_language(llama, AdapterConfig(("q_proj", "down_proj"), layers=(1,)), seed=0)
    names = [site.name for site in read_adapters(placed).sites]
    assert names == ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    whole = place_language(llama, AdapterConfig(layers=(1,)), seed=0)
    assert [site.kind for site in read_adapters(whole).sites] == GATED
    # the same A in every placement
    by_name = {adapter.site.name: adapter.rows for adapter in read_adapters(whole).adapters}
    assert all(torch.equal(by_name[adapter.site.name], adapter.rows) for adapter in read_adapters(placed).adapters)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["lm_head"]}, "target module 'lm_head' matches nothing"),
        ({"target_modules": r".*(q_proj|lm_head)"}, "take in 'lm_head', which gives the logits of the next token"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "modules_to_save names lm_head"),
        ({"target_modules": ["q_proj"], "task_type": "SEQ_CLS"}, "is for classifiers.*use 'CAUSAL_LM'"),
    ],
)
def test_what_a_language_model_cannot_take(llama, options, message):
    with pytest.raises(PlacementError, match=message):
        place(llama.model, LoraConfig(**{"task_type": "CAUSAL_LM", **options}), seed=0)


def test_experts_cannot_be_named(checkpoints):
    with pytest.raises(PlacementError, match="target module 'w1' matches nothing"):
        place_language(load(checkpoints("mixtral")), AdapterConfig(("w1",)), seed=0)


def test_a_file_for_another_task_is_refused(llama, tmp_path):
    save_adapter(lora_config(llama.model, AdapterConfig()), tmp_path / "language.json")
    save_adapter(cases.lora("bert"), tmp_path / "classifier.json")
    with pytest.raises(ConfigError, match="task_type 'CAUSAL_LM': only 'SEQ_CLS'"):
        adapter_from_file(tmp_path / "language.json")
    with pytest.raises(ConfigError, match="task_type 'SEQ_CLS': only 'CAUSAL_LM'"):
        adapter_from_file(tmp_path / "classifier.json", task_type="CAUSAL_LM")
    assert adapter_in_words(lora_config(llama.model, AdapterConfig())).startswith("all-linear of all layers")


# --- loading


def test_a_padding_token_of_its_own_is_kept(tmp_path):
    loaded = load(language.save(tmp_path / "m", pad=True))
    assert loaded.tokenizer.pad_token == "<pad>"
    assert loaded.model.config.pad_token_id == 3


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_dtype(checkpoints, dtype):
    assert next(load(checkpoints("llama"), dtype=dtype).model.parameters()).dtype == getattr(torch, dtype)


def test_the_generators_are_left_as_they_were(checkpoints):
    expected = torch.random.get_rng_state()
    load(checkpoints("gpt2"))
    assert torch.equal(torch.random.get_rng_state(), expected)


def rewrite(folder, change):
    path = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path, {"format": "pt"})


def configure(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def without(part):
    return lambda weights: {name: tensor for name, tensor in weights.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("lm_head"), r"does not give the layer of the next token's logits \(lm_head.weight\)"),
        (without(".1."), "does not give 9 weights .* fewer layers"),
        (without("0.mlp.up_proj"), "does not give 1 weight of the architecture"),
        (lambda weights: {f"module.{name}": tensor for name, tensor in weights.items()}, "its keys hold 'module.'"),
        (lambda weights: {**weights, "model.layers.2.mlp.up_proj.weight": torch.ones(24, 16)}, "has more layers"),
        (
            lambda weights: {**weights, "lm_head.weight": torch.ones(50, 16) / 0},
            "weights 'lm_head.weight' .* not finite",
        ),
        (lambda weights: {**weights, "lm_head.weight": torch.ones(40, 16)}, "next token's logits"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, change, message):
    source = language.save(tmp_path / "m")
    rewrite(tmp_path / "m", change)
    with pytest.raises(ModelError, match=message):
        load(source)


def test_a_tied_output_layer_need_not_be_there(checkpoints):
    assert "lm_head.weight" not in load_file(f"{checkpoints('gpt2')}/model.safetensors")
    load(checkpoints("gpt2"))


def test_the_head_of_a_classifier_is_left_out_with_a_note(tmp_path):
    source = language.save(tmp_path / "m", tie_word_embeddings=True)
    rewrite(tmp_path / "m", lambda weights: {**weights, "score.weight": torch.ones(2, 16)})
    assert load(source).notes == ("the checkpoint's score has no place in a language model: left out",)


def test_what_is_no_causal_language_model_is_refused(tmp_path, checkpoints):
    bert = tf.BertLMHeadModel(tf.BertConfig(vocab_size=50, **cases.SIZES, is_decoder=True))
    bert.config.is_decoder = False
    bert.save_pretrained(tmp_path / "bert")
    language.tokenizer(pad=True).save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match="reads the tokens that come after"):
        load(str(tmp_path / "bert"))
    tf.WhisperConfig(vocab_size=50).save_pretrained(tmp_path / "whisper")
    with pytest.raises(ModelError, match="kind 'whisper', which has no sequence-to-sequence language model"):
        load(str(tmp_path / "whisper"))
    tf.DistilBertModel(
        tf.DistilBertConfig(vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=24)
    ).save_pretrained(tmp_path / "distilbert")
    with pytest.raises(ModelError, match="kind 'distilbert', which has no causal language model"):
        load(str(tmp_path / "distilbert"))
    place_language(load(checkpoints("llama")), AdapterConfig(), seed=0).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match="is a saved adapter, not a model"):
        load(str(tmp_path / "adapter"))


def test_a_tokenizer_of_more_words_than_the_table_has_rows_is_refused(tmp_path, llama):
    source = language.save(tmp_path / "m")
    large = language.tokenizer(words=60)
    large.save_pretrained(source)
    with pytest.raises(ModelError, match=r"has 63 tokens, the last 'word40', .* has 50 rows"):
        load(source)
    with pytest.raises(ModelError, match="has 63 tokens"):
        own_language_model(llama.model, large, bare=True)


def test_unpickled_weights_and_unknown_dtypes_are_refused(tmp_path, checkpoints):
    source = tmp_path / "m"
    language.save(source)
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(ModelError, match="only safetensors"):
        load(str(source))
    with pytest.raises(ModelError, match="unknown dtype 'int8'"):
        load(checkpoints("llama"), dtype="int8")


# --- the user's own objects


def test_own_objects_are_left_as_they_are():
    model, tokenizer = language.build("llama"), language.tokenizer()
    own = own_language_model(model, tokenizer, bare=True)
    assert model.config.use_cache
    assert model.config.pad_token_id is None
    assert tokenizer.pad_token is None
    assert not own.model.config.use_cache
    assert own.model.lm_head.weight is model.lm_head.weight
    assert own.tokenizer.pad_token == "</s>"
    again = own_language_model(own.model, own.tokenizer, bare=True)
    assert again.model is own.model


def test_own_objects_with_an_adapter(llama):
    placed = place_language(llama, AdapterConfig(), seed=0)
    assert own_language_model(placed, llama.tokenizer, bare=False).model is placed
    with pytest.raises(ModelError, match="carries an adapter already"):
        own_language_model(placed, llama.tokenizer, bare=True)


def test_own_objects_that_are_something_else(llama):
    remedy = "load it with AutoModelForCausalLM.from_pretrained"
    for model in (cases.tiny("llama"), cases.tiny("bert"), copy.deepcopy(llama.model.model)):
        with pytest.raises(ModelError, match=f"no layer that gives the logits of the next token: {remedy}"):
            own_language_model(model, llama.tokenizer, bare=True)
    with pytest.raises(ModelError, match=f"expected a transformers causal language model, got str: {remedy}"):
        own_language_model("llama", llama.tokenizer, bare=True)
    with pytest.raises(ModelError, match="expected a transformers tokenizer, got str"):
        own_language_model(llama.model, "llama", bare=True)


def test_own_objects_that_give_something_else(llama):
    class Last(tf.LlamaForCausalLM):
        def forward(self, *args, **options):
            output = super().forward(*args, **options)
            output.logits = output.logits[:, -1]
            return output

    model = Last(llama.model.config)
    with pytest.raises(
        ModelError, match=r"the model Last gives logits of shape \(2, 50\) for 2 texts of 3 tokens: load it"
    ):
        own_language_model(model, llama.tokenizer, bare=True)
