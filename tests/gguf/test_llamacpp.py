"""Files that qft writes, run by llama.cpp itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from qft.errors import MissingError, ModelError
from qft.gguf.file import write_gguf
from qft.gguf.llamacpp import KINDS, LlamaCpp, quantize
from tests.support.gguf import qwen, saved, tokenizer_of
from tests.support.models import tiny_llama

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
    pytest.importorskip("cyllama", reason="needs llama.cpp (pip install 'qft[llamacpp]')")


def log_probs(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)


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
    # llama.cpp keeps keys and values in float16.
    found = log_probs(LlamaCpp(tmp_path / "m.gguf"), IDS)
    torch.testing.assert_close(found, log_probs(model, IDS), rtol=0, atol=2e-2)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaCpp, Any]:
    """One model in llama.cpp and in transformers, with clear preferences."""
    model, folder = tiny_llama(), tmp_path_factory.mktemp("pair")
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() > 1:
                value *= 5
    write_gguf(saved(model, folder / "model"), folder / "m.gguf", kind="f32")
    return LlamaCpp(folder / "m.gguf"), model.eval()


def test_rows_padding_and_last_tokens(pair: tuple[LlamaCpp, Any]) -> None:
    runner, model = pair
    ids = torch.tensor([[2, 2, *IDS[:4]], [*IDS[:5], 2]])  # padded on the left, and on the right
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    with torch.inference_mode():
        found = runner(input_ids=ids, attention_mask=mask).logits
        last = runner(input_ids=ids, attention_mask=mask, logits_to_keep=2).logits
    assert found.shape == (2, 6, 264)
    torch.testing.assert_close(found[:, -2:], last, rtol=0, atol=1e-3)
    assert not found[~mask.bool()].any()
    for row, length in ((0, 4), (1, 5)):
        expected = log_probs(model, IDS[:length])
        torch.testing.assert_close(found[row][mask[row].bool()].log_softmax(-1), expected, rtol=0, atol=2e-2)


def test_what_was_read_before_changes_nothing(pair: tuple[LlamaCpp, Any]) -> None:
    runner, _ = pair
    long = [token % 250 + 4 for token in range(7, 1300, 2)]  # more than one reading, and more room than before
    first = log_probs(runner, IDS)
    far = log_probs(runner, long)
    torch.testing.assert_close(log_probs(runner, IDS), first, rtol=0, atol=1e-3)
    torch.testing.assert_close(log_probs(runner, [*long[:600], 5])[:600], far[:600], rtol=0, atol=1e-3)


def test_it_generates_as_transformers_does(pair: tuple[LlamaCpp, Any]) -> None:
    settings = GenerationConfig(max_new_tokens=24, do_sample=False, pad_token_id=2, eos_token_id=[2])
    ids, mask = torch.tensor([[2, *IDS[:4]], IDS[:5]]), torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    written = [model.generate(ids, attention_mask=mask, generation_config=settings).tolist() for model in pair]
    assert written[0] == written[1]


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.by_llamacpp])
def test_llamacpp_quantizes(kind: str, pair: tuple[LlamaCpp, Any], tmp_path: Path) -> None:
    runner, model = pair
    quantize(runner.path, tmp_path / "q.gguf", kind)
    assert (tmp_path / "q.gguf").stat().st_size < runner.path.stat().st_size / 2
    found, expected = log_probs(LlamaCpp(tmp_path / "q.gguf"), IDS), log_probs(model, IDS)
    kl = (expected.exp() * (expected - found)).sum(-1).mean()
    assert 0 < kl < 0.5
    with pytest.raises(ModelError, match="cannot quantize"):
        quantize(tmp_path / "none.gguf", tmp_path / "more.gguf", kind)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_ids_are_those_of_the_tokenizer_with_one_bos_at_most(adds_bos: bool, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_of()
    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]
        )
    write_gguf(saved(tiny_llama(), tmp_path / "model", tokenizer), tmp_path / "m.gguf", kind="f16")
    runner = LlamaCpp(tmp_path / "m.gguf")
    for text in ["<|im_start|>user\nab é 1234<|im_end|>\n", "plain  text's end"]:
        assert runner.tokenize(text) == tokenizer(text)["input_ids"]
        assert runner.tokenize(text).count(0) == adds_bos
    assert runner.stops == [2]
    assert runner.bos_token_id == 0
    assert runner.added_tokens == tokenizer.get_added_vocab()
    assert runner.metadata["tokenizer.chat_template"] == tokenizer.chat_template


def test_what_is_not_there_or_no_model(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="does not exist"):
        LlamaCpp(tmp_path / "none.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF and no more")
    with pytest.raises(ModelError, match="does not load"):
        LlamaCpp(tmp_path / "bad.gguf")


@pytest.mark.real
def test_the_package_model_answers_alike(package_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = (kind.from_pretrained(package_folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    write_gguf(package_folder, tmp_path / "m.gguf", kind="f16")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Why is 1234 less than 2345?"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    runner = LlamaCpp(tmp_path / "m.gguf")
    assert runner.tokenize(text) == ids
    settings = GenerationConfig(max_new_tokens=16, do_sample=False, pad_token_id=2)
    answers = [each.generate(torch.tensor([ids]), generation_config=settings).tolist() for each in (runner, model)]
    assert answers[0] == answers[1]
