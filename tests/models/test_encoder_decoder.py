"""Encoder-decoders as language models: loading, placing, refusals."""

import copy
import json

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import pairs
from foretune.errors import ModelError, PlacementError
from foretune.models.adapter_file import adapter_from_file, same_adapter, save_adapter
from foretune.models.encoder_decoder import decoder_inputs
from foretune.models.language_model import is_language_model, language_kind, load_language_model, own_language_model
from foretune.models.linear_modules import linear_names
from foretune.models.output_layer import output_layer, task_type
from foretune.models.placement import lora_config, place, read_adapters
from foretune.settings.groups import AdapterConfig

import cases


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return {name: pairs.save(tmp_path_factory.mktemp("models") / name, name) for name in pairs.FAMILIES}


@pytest.mark.parametrize("name", sorted(pairs.FAMILIES))
def test_a_family_loads_and_takes_adapters(checkpoints, tmp_path, name):
    loaded = load_language_model(checkpoints[name], device="cpu")
    assert (loaded.kind, loaded.shift, loaded.notes) == ("seq2seq", 0, ())
    assert (language_kind(checkpoints[name]), is_language_model(checkpoints[name])) == ("seq2seq", True)
    assert not loaded.model.training
    assert not any(getattr(getattr(part, "config", None), "use_cache", False) for part in loaded.model.modules())
    assert loaded.position_limit == (64 if name == "bart" else None)
    assert (task_type(loaded.model), output_layer(loaded.model)) == ("SEQ_2_SEQ_LM", "lm_head")
    batch = loaded.collate([{"input_ids": [5, 6, 0], "attention_mask": [1, 1, 1], "labels": [7, 8, 9, 0]}])
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = loaded.model(**batch).logits
        torch.testing.assert_close(logits, pairs.build(name)(**batch).logits)
        wide = {name: torch.nn.functional.pad(batch[name], (0, 2), value=0) for name in ("input_ids", "attention_mask")}
        torch.testing.assert_close(loaded.model(**batch | wide).logits, logits)
    assert torch.equal(decoder_inputs(loaded.model, labels)["decoder_input_ids"], batch["decoder_input_ids"])

    config = lora_config(loaded.model, AdapterConfig(r=3))
    placed = place(loaded.model, config, seed=4)
    assert isinstance(placed, peft.PeftModelForSeq2SeqLM)
    sites = read_adapters(placed).sites
    assert {site.kind for site in sites} == pairs.KINDS[name]
    assert {site.name.split("encoder" if "encoder." in site.name else "decoder")[0] for site in sites} <= {"", "model."}
    assert len(sites) == 2 * (6 + 10)  # of two layers: 6 modules of the encoder's, 10 of the decoder's
    assert "lm_head" not in linear_names(loaded.model)
    with torch.no_grad():
        assert torch.equal(placed(**batch).logits, logits)
        moved = cases.with_nonzero_b(placed)(**batch).logits
    assert not torch.allclose(moved, logits)

    save_adapter(config, tmp_path / "adapter_config.json")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    again = adapter_from_file(tmp_path, task_type="SEQ_2_SEQ_LM")
    assert same_adapter(again, config)
    assert same_adapter(peft.LoraConfig.from_pretrained(str(tmp_path)), config)
    assert read_adapters(place(loaded.model, again, seed=4)).sites == sites


def test_an_untied_output_layer_that_is_not_there_is_refused(tmp_path):
    config = pairs.build("bart", tie_word_embeddings=False).config
    tf.BartModel(config).save_pretrained(tmp_path / "m")
    pairs.tokenizer_of("bart").save_pretrained(tmp_path / "m")
    assert not is_language_model(str(tmp_path / "m"))
    remedy = r"\(lm_head.weight\): take the one that AutoModelForSeq2SeqLM saved"
    with pytest.raises(ModelError, match=f"does not give the layer of the next token's logits {remedy}"):
        load_language_model(str(tmp_path / "m"), device="cpu")


def untie(configured):
    """As config.json of T5 1.1 and FLAN has it."""
    content = json.loads(configured.read_text())
    content.pop("scale_decoder_outputs", None)
    configured.write_text(json.dumps({**content, "tie_word_embeddings": False}))


def test_a_t5_that_says_that_it_is_not_tied_needs_its_output_layer(tmp_path):
    source = pairs.save(tmp_path / "m")
    configured = tmp_path / "m" / "config.json"
    untie(configured)
    with pytest.raises(ModelError, match=r"does not give the layer of the next token's logits \(lm_head.weight\)"):
        load_language_model(source, device="cpu")


def test_an_output_layer_of_its_own_is_kept(tmp_path):
    """As T5 1.1 and FLAN have it."""
    source = pairs.save(tmp_path / "m")
    path, configured = tmp_path / "m" / "model.safetensors", tmp_path / "m" / "config.json"
    own = torch.randn(pairs.VOCABULARY, 8)
    save_file({**load_file(path), "lm_head.weight": own}, path, {"format": "pt"})
    untie(configured)
    loaded = load_language_model(source, device="cpu")
    assert torch.equal(loaded.model.lm_head.weight, own)
    assert not torch.equal(loaded.model.get_input_embeddings().weight, own)


def test_weights_that_are_not_there_are_refused(tmp_path):
    source = pairs.save(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    kept = {name: tensor.contiguous() for name, tensor in load_file(path).items() if "encoder.block.1" not in name}
    save_file(kept, path, {"format": "pt"})
    with pytest.raises(ModelError, match="does not give 8 weights of the architecture"):
        load_language_model(source, device="cpu")


def test_an_adapter_of_a_causal_model_is_refused():
    with pytest.raises(
        PlacementError, match=r"is for another kind of model, .* is one of SEQ_2_SEQ_LM: use 'SEQ_2_SEQ"
    ):
        place(pairs.build(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q"]), seed=0)
    with pytest.raises(PlacementError, match=r"is for classifiers.*use 'SEQ_2_SEQ_LM'"):
        place(pairs.build(), peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q"]), seed=0)
    with pytest.raises(PlacementError, match="target module 'lm_head' matches nothing"):
        place(pairs.build(), peft.LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["lm_head"]), seed=0)


def test_own_objects_are_left_as_they_are():
    model = pairs.build()
    before = model.config.to_dict()
    own = own_language_model(model, pairs.tokenizer_of(), bare=True)
    assert model.config.to_dict() == before
    assert own.kind == "seq2seq"
    assert own_language_model(own.model, own.tokenizer, bare=True).model is own.model
    placed = place(own.model, lora_config(own.model, AdapterConfig()), seed=0)
    held = own_language_model(placed, own.tokenizer, bare=False)
    assert (held.model, held.kind) == (placed, "seq2seq")


def test_what_has_no_layer_of_logits_is_refused():
    with pytest.raises(ModelError, match=r"T5Model has no layer that gives the logits .* with AutoModelForSeq2SeqLM"):
        own_language_model(tf.T5Model(pairs.build().config), pairs.tokenizer_of(), bare=True)


def test_a_decoder_that_looks_ahead_is_refused():
    class Ahead(tf.T5ForConditionalGeneration):
        def forward(self, *args, **options):
            output = super().forward(*args, **options)
            output.logits = output.logits + output.logits.mean(1, keepdim=True)
            return output

    with pytest.raises(ModelError, match="Ahead reads the tokens that come after"):
        own_language_model(Ahead(pairs.build().config), pairs.tokenizer_of(), bare=True)


@pytest.mark.parametrize("name", ["m2m_100", "blenderbot"])
def test_a_model_without_a_method_for_it_reads_what_it_makes_of_the_labels(name):
    own = pairs.own(name)
    features = [{"input_ids": [5, 6, 0], "attention_mask": [1] * 3, "labels": list(range(7, n))} for n in (9, 12)]
    batch = own.collate(features)
    with torch.no_grad():
        labels = batch.pop("labels")
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        torch.testing.assert_close(own.model(**batch).logits, own.model(**inputs, labels=labels).logits, rtol=0, atol=0)
        held = place(own.model, lora_config(own.model, AdapterConfig()), seed=0)
    assert torch.equal(decoder_inputs(held, labels)["decoder_input_ids"], batch["decoder_input_ids"])


def test_a_model_that_does_not_say_what_its_decoder_reads_is_refused():
    class Silent(tf.T5ForConditionalGeneration):
        prepare_decoder_input_ids_from_labels = None

    model = Silent(copy.deepcopy(pairs.build().config))
    with pytest.raises(ModelError, match="Silent has no prepare_decoder_input_ids_from_labels"):
        own_language_model(model, pairs.tokenizer_of(), bare=True)
