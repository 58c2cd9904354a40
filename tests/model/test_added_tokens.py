"""Tokens that a recipe adds: what their rows start from, that they alone are trained, and where they go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qft.checkpoint.added import MULTIPLE, AddedTokens
from qft.errors import ModelError, RecipeError
from qft.model.adapter import require_fit
from qft.model.load import load_base
from qft.model.merge import MergedWeights
from qft.plan import make_plan, plan_adapter, plan_model
from qft.recipe import load
from qft.recipe.load import from_values
from tests.support.models import byte_tokenizer, tiny_llama
from tests.support.once import once
from tests.support.rows import chat, write_jsonl
from tests.support.runs import run
from tests.support.tiny import write_tiny_model

WORDS = ["<red>", "<blue>", "<green>", "<dark>"]
NUMBERS = [261, 262, 263, 264]
NARROW = {"hidden_size": 16, "intermediate_size": 32}


def write_recipe(folder: Path, base: Path, **sections: Any) -> Path:
    write_jsonl(folder / "rows.jsonl", [chat(f"say {i}", f"<red>{i}<blue>") for i in range(8)])
    train = {"max_steps": 4, "learning_rate": 0.02, "lr_scheduler_type": "constant", "warmup_steps": 0.0}
    train |= {"gradient_accumulation_steps": 1, "report_to": [], "save_strategy": "steps", "save_steps": 2}
    values = {
        "model": {"path": str(base), "device": "cpu", "dtype": "float32", "add_tokens": WORDS},
        "adapter": {"r": 2},
        "data": {"train": "rows.jsonl"},
        "train": train | sections.pop("train", {}),
        "output_dir": "run",
    } | sections
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def write_base(folder: Path, *, tied: bool) -> Path:
    tiny_llama(tie_word_embeddings=tied, **NARROW).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and a run that has added tokens to it."""

    def make(folder: Path) -> None:
        run(write_recipe(folder, write_base(folder / "base", tied=request.param)))

    return once(tmp_path_factory, f"added-tokens-{request.param}", make)


def test_a_new_row_is_the_mean_of_its_pieces_and_a_grown_table_is_padded() -> None:
    config = tiny_llama(**NARROW).config
    table = torch.randn(5, 3)
    added = AddedTokens({"a": 4, "b": 5}, {4: [0, 2], 5: [1]}, 8, config)
    grown = added.grown(table)
    assert torch.equal(grown[:4], table[:4])  # 4 was a row that no token had
    assert torch.equal(grown[4], (table[0] + table[2]) / 2)
    assert torch.equal(grown[5], table[1])
    assert torch.equal(grown[6:], table.mean(0).expand(2, 3))
    assert added.grown(torch.arange(5.0)).tolist() == [0, 1, 2, 3, 1, 1, 2, 2]  # of biases


def test_the_loaded_model_starts_from_the_pieces(finished: Path) -> None:
    plan = plan_model(load(finished / "recipe.yaml"))
    base = AutoModelForCausalLM.from_pretrained(finished / "base", dtype=torch.float32)
    model, before = load_base(plan), byte_tokenizer()
    tied = bool(base.config.tie_word_embeddings)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    for new, old in (
        (model.model.embed_tokens.weight, base.model.embed_tokens.weight),
        (model.lm_head.weight, base.lm_head.weight),
    ):
        assert len(new) == plan.shape.embeddings == 5 * MULTIPLE
        assert torch.equal(new[:261], old[:261])
        for word, number in zip(WORDS, NUMBERS, strict=True):
            pieces = before(word).input_ids
            assert len(pieces) == len(word)
            assert torch.allclose(new[number], old[pieces].mean(0), atol=1e-7)


def test_rows_of_new_tokens_alone_are_trained_merged_and_told(finished: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(finished / "base", dtype=torch.float32)
    plan = plan_model(load(finished / "recipe.yaml"))
    MergedWeights(plan, finished / "run/adapter", "float32", None).write(tmp_path)
    tokenizer, merged = AutoTokenizer.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert tokenizer("<blue>").input_ids == [NUMBERS[1]]
    table = merged.model.embed_tokens.weight
    assert torch.equal(table[:261], base.model.embed_tokens.weight[:261])
    start, rows = (
        load_base(plan).model.embed_tokens.weight,
        load_file(finished / "run/adapter/adapter_model.safetensors"),
    )
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    assert torch.equal(table[NUMBERS], rows[name])
    assert not torch.equal(table[NUMBERS[:2]], start[NUMBERS[:2]])
    assert (merged.lm_head.weight is table) == bool(base.config.tie_word_embeddings)
    # Plain peft, on the base made larger, is the merged model.
    base.resize_token_embeddings(plan.shape.embeddings, mean_resizing=False)
    adapted = PeftModel.from_pretrained(base, str(finished / "run/adapter"))
    ids = torch.tensor([[5, 261, 9, 262]])
    with torch.no_grad():
        assert torch.allclose(adapted(ids).logits[..., :265], merged(ids).logits[..., :265], atol=1e-5)


def test_a_resumed_run_is_the_unbroken_one(finished: Path, tmp_path: Path) -> None:
    run(write_recipe(tmp_path, finished / "base", train={"max_steps": 2}))
    run(write_recipe(tmp_path, finished / "base"), resume=True)
    one, other = (load_file(f / "run/adapter/adapter_model.safetensors") for f in (tmp_path, finished))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_what_is_trained_whole_is_not_trained_by_rows_too(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tied=False)
    path = write_recipe(tmp_path, base, adapter={"r": 2, "modules_to_save": ["lm_head"]})
    plan = make_plan(load(path))
    assert plan.lora is not None
    assert plan.lora["trainable_token_indices"] == {"model.embed_tokens": NUMBERS}
    document = plan.document()
    assert document.model.added_tokens == dict(zip(WORDS, NUMBERS, strict=True))
    assert document.data.added_tokens == {"<red>": 8, "<blue>": 8, "<green>": 0, "<dark>": 0}
    assert document.model.trainable_parameters == plan.model.shape.trainable_parameters > 320 * 16 + 4 * 16


def test_special_tokens_stand_for_no_text(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tied=True)
    loaded = from_values({"model": {"path": str(base), "add_special_tokens": ["<|end|>"]}, "output_dir": "-"})
    tokenizer = plan_model(loaded).tokenizer
    assert tokenizer.decode(tokenizer("a<|end|>").input_ids, skip_special_tokens=True) == "a"


def test_what_cannot_be_added_is_refused(tmp_path: Path, finished: Path) -> None:
    write_base(tmp_path / "base", tied=False)

    def refused(field: str, *tokens: str, base: str = "base", **sections: Any) -> str:
        path = write_recipe(
            tmp_path, tmp_path / base, model={"path": str(tmp_path / base), field: list(tokens)}, **sections
        )
        with pytest.raises(RecipeError) as caught:
            plan_adapter(load(path))
        return str(caught.value)

    assert "recipe.yaml:6: model.add_tokens: 'a' is a token of the model already" in refused("add_tokens", "<b>", "a")
    assert "model.add_special_tokens: '<|bos|>' is a token" in refused("add_special_tokens", "<|bos|>")
    assert "model.add_tokens: ' ' is no text" in refused("add_tokens", " ")
    assert "model.add_tokens: '<b>' is named twice" in refused("add_tokens", "<b>", "<b>")
    write_tiny_model(tmp_path / "phi", "phi")
    assert "lm_head has a bias" in refused("add_tokens", "<b>", base="phi")
    write_tiny_model(tmp_path / "wide", "llama")
    in_few_bits = refused("add_special_tokens", "<b>", base="wide", quant={"mode": "qat", "target": "q8_0"})
    assert "model.add_special_tokens: a q8_0 file holds lm_head in few bits" in in_few_bits
    assert "name embed_tokens in adapter.modules_to_save" in in_few_bits
    alone = plan_model(from_values({"model": {"path": str(tmp_path / "base")}, "output_dir": "-"}))
    with pytest.raises(ModelError, match="it trains token 264, and the last one of the base is 260"):
        require_fit(finished / "run/adapter", alone)
