"""GGUF files, read back by transformers: names, order of rows, types, tokenizer, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qft.checkpoint.quick_gguf import quick_gguf
from qft.errors import ModelError
from qft.gguf.file import write_gguf
from qft.gguf.shape import rope_factors
from qft.gguf.vocabulary import pre_tokenizer
from tests.support.gguf import qwen, read_back, saved, tokenizer_of
from tests.support.models import CHATML, package_model, tiny_llama

IDS = torch.tensor([[0, 7, 91, 12, 200, 3, 44, 9]])


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny_llama(),
        lambda: tiny_llama(tie_word_embeddings=True),
        lambda: tiny_llama(num_key_value_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
        lambda: qwen("Qwen2"),
        lambda: qwen("Qwen3", head_dim=128),  # transformers reads no other head_dim of a qwen3 file
    ],
    ids=["llama", "tied", "no-gqa-theta", "qwen2-biases", "qwen3-norms"],
)
def test_a_float32_file_gives_the_same_logits(make: Any, tmp_path: Path) -> None:
    model = make()
    write_gguf(saved(model, tmp_path / "model"), tmp_path / "m.gguf", kind="f32")
    torch.testing.assert_close(logits(read_back(tmp_path / "m.gguf")), logits(model), rtol=0, atol=1e-5)


def test_a_tied_output_layer_is_left_out(tmp_path: Path) -> None:
    for tied in (True, False):
        folder = saved(tiny_llama(tie_word_embeddings=tied), tmp_path / f"{tied}")
        write_gguf(folder, tmp_path / "m.gguf", kind="f32")
        names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
        assert ("output.weight" in names) is not tied


@pytest.mark.parametrize(("kind", "most"), [("f16", 1e-3), ("bf16", 5e-3), ("q8_0", 1e-2), ("q4_0", 0.2)])
def test_fewer_bits_lose_little(kind: str, most: float, tmp_path: Path) -> None:
    model = tiny_llama()
    write_gguf(saved(model, tmp_path / "model"), tmp_path / "m.gguf", kind=kind)
    weight = model.model.layers[0].mlp.up_proj.weight.detach().numpy()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    held = tensors["blk.0.ffn_up.weight"]
    error = np.linalg.norm(gguf.quants.dequantize(held.data, held.tensor_type) - weight) / np.linalg.norm(weight)
    assert 0 < error < most
    assert held.tensor_type.name.lower() == kind
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    if kind == "q4_0":
        assert tensors["token_embd.weight"].tensor_type.name == "Q8_0"


def test_what_the_file_says_of_the_tokenizer(tmp_path: Path) -> None:
    write_gguf(saved(tiny_llama(), tmp_path / "model"), tmp_path / "m.gguf", kind="f32")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.merges"] == ["a b"]
    assert len(fields["tokenizer.ggml.tokens"]) == 264
    assert fields["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert fields["tokenizer.ggml.token_type"][-1] == gguf.TokenType.UNUSED
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (0, 2)
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.chat_template"] == CHATML
    with quick_gguf():
        read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    text = "<|im_start|>user\ncab é<|im_end|>"
    assert read(text, add_special_tokens=False)["input_ids"] == tokenizer_of()(text)["input_ids"]


def test_a_tokenizer_that_adds_bos_is_told(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_of()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]
    )
    write_gguf(saved(tiny_llama(), tmp_path / "model", tokenizer), tmp_path / "m.gguf", kind="f32")
    assert gguf.GGUFReader(tmp_path / "m.gguf").fields["tokenizer.ggml.add_bos_token"].contents() is True


def test_pre_tokenizers_are_told_apart_by_their_definition() -> None:
    from tokenizers import Regex, normalizers, pre_tokenizers

    from qft.checkpoint.gguf_tokens import LLAMA3_SPLIT, QWEN2_SPLIT

    def named(*steps: Any, normalizer: Any = None, **model: Any) -> str:
        made = tokenizer_of(pre_tokenizers.Sequence(list(steps)), **model)
        if normalizer:
            made.backend_tokenizer.normalizer = normalizer
        return pre_tokenizer(json.loads(made.backend_tokenizer.to_str()))

    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    llama3 = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")
    qwen2 = pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated")
    assert named(split_bytes) == "gpt-2"
    assert named(split_bytes, normalizer=normalizers.Sequence([]), byte_fallback=True) == "gpt-2"
    assert named(digits, split_bytes) == "smollm"
    assert named(llama3, bytes_, ignore_merges=True) == "llama-bpe"
    assert named(qwen2, bytes_, normalizer=normalizers.NFC()) == "qwen2"
    refused: list[tuple[list[Any], dict[str, Any], str]] = [
        ([bytes_], {}, "no pre-tokenizer of llama.cpp"),
        ([pre_tokenizers.Digits(individual_digits=False), split_bytes], {}, "no pre-tokenizer"),
        ([pre_tokenizers.ByteLevel(add_prefix_space=True)], {}, "no pre-tokenizer"),
        ([llama3, bytes_], {}, "ignore_merges"),
        ([split_bytes], {"normalizer": normalizers.NFC()}, "normalizer NFC"),
        ([pre_tokenizers.Metaspace()], {"byte_fallback": True}, "byte fallback"),
    ]
    for steps, rest, message in refused:
        with pytest.raises(ModelError, match=message):
            named(*steps, **rest)


def test_llama3_factors_are_those_of_transformers(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }  # fmt: skip
    model = tiny_llama(head_dim=32, rope_parameters=rope)
    plain = tiny_llama(head_dim=32)
    expected = plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq
    factors = rope_factors(model.config)
    assert factors is not None
    assert factors.min() == 1
    assert factors.max() == 8
    torch.testing.assert_close(torch.from_numpy(factors), expected)
    write_gguf(saved(model, tmp_path / "model"), tmp_path / "m.gguf", kind="f16")
    last = gguf.GGUFReader(tmp_path / "m.gguf").tensors[-1]
    assert (last.name, last.data.tolist()) == ("rope_freqs.weight", factors.tolist())


def test_what_cannot_be_held_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    folder = saved(tiny_llama(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for changes, message in [
        ({"architectures": ["GPT2LMHeadModel"]}, "supported are LlamaForCausalLM, MistralForCausalLM"),
        ({"hidden_act": "gelu"}, "silu"),
        ({"num_hidden_layers": 3}, "missing: "),
        ({"num_hidden_layers": 1}, "other: "),
        ({"intermediate_size": 64}, "wanted is"),
        ({"vocab_size": 300}, "wanted is"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "quantized"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
    ]:
        (folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ModelError, match=message):
            write_gguf(folder, out, kind="f32")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="none of f32, f16"):
        write_gguf(folder, out, kind="q3")
    tokenizer_of(merges=()).save_pretrained(folder)
    with pytest.raises(ModelError, match="no merges"):
        write_gguf(folder, out, kind="f32")
    assert not out.exists()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    out = tmp_path / "out" / "m.gguf"
    out.parent.mkdir()
    out.write_bytes(b"old")
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e6
    folder = saved(model, tmp_path / "model")
    with pytest.raises(ModelError, match="beyond float16"):
        write_gguf(folder, out, kind="f16")
    assert [(path.name, path.read_bytes()) for path in out.parent.iterdir()] == [("m.gguf", b"old")]
    write_gguf(folder, out, kind="f32")
    assert [path.name for path in out.parent.iterdir()] == ["m.gguf"]
    assert out.read_bytes()[:4] == b"GGUF"


@pytest.mark.real
def test_the_package_model_written_is_the_package_model(first_blocks: Path, tmp_path: Path) -> None:
    """But for its later blocks."""
    original = AutoModelForCausalLM.from_pretrained(first_blocks)
    tokenizer = AutoTokenizer.from_pretrained(first_blocks)
    ids = tokenizer("<|im_start|>user\nWhy is the sky blue?<|im_end|>\n", return_tensors="pt")["input_ids"]
    with quick_gguf():
        theirs = gguf.GGUFReader(package_model())
    # What of llama.cpp's own file has no counterpart in a folder, or differs as the weights' type does.
    provenance = {f"general.{n}" for n in ("name", "organization", "finetune", "basename", "size_label", "license")}
    ignored = provenance | {"general.languages", "general.file_type", "tokenizer.ggml.pre", "GGUF.kv_count"}
    ignored |= {"llama.block_count", "GGUF.tensor_count"}
    with torch.inference_mode():
        expected = original(input_ids=ids).logits
        write_gguf(first_blocks, tmp_path / "m.gguf", kind="f32")
        found = read_back(tmp_path / "m.gguf")(input_ids=ids).logits
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    with quick_gguf():
        ours = gguf.GGUFReader(tmp_path / "m.gguf")
    later = tuple(f"blk.{number}." for number in range(3, 30))
    shapes = {t.name: tuple(t.shape) for t in theirs.tensors if not t.name.startswith(later)}
    assert {t.name: tuple(t.shape) for t in ours.tensors} == shapes
    assert ours.fields["llama.block_count"].contents() == 3
    for name in set(theirs.fields) - ignored:
        assert ours.fields[name].contents() == theirs.fields[name].contents(), name
    # transformers reads no pre-tokenizer from a GGUF file and splits as GPT-2 does: that is what is written.
    assert ours.fields["tokenizer.ggml.pre"].contents() == "gpt-2"
