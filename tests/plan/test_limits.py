"""Limits of a model, told before it is loaded: tokens that its embeddings lack, and positions behind a table's end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qft.checkpoint.skeleton import without_contents
from qft.commands.evaluate import EvalOptions, evaluate
from qft.commands.train import train
from qft.data.batch import Collator
from qft.errors import DataError, ModelError, QftError, RecipeError
from qft.plan import make_plan, plan_calibration
from qft.plan.limits import table_of_positions
from qft.progress import View
from qft.recipe import load
from tests.support.architectures import MODELS, write_model
from tests.support.cli import qft
from tests.support.models import byte_tokenizer
from tests.support.rows import chat, write_jsonl
from tests.support.tasks import answer_task

RecipeFile = Callable[..., Path]
Models = Callable[[str], Path]

KNOWN = 264
"""Tokens that the embeddings know; the byte tokenizer has fewer."""


def refusal(path: Path, kind: type[QftError], plan: Callable[..., Any] = make_plan) -> str:
    with pytest.raises(kind) as caught:
        plan(load(path))
    return str(caught.value)


@pytest.fixture
def enlarged(tmp_path: Path) -> Path:
    """The tiny model with a tokenizer that knows more than its embeddings: <|new|> is 264, <|pad|> 265."""
    folder = write_model(tmp_path / "enlarged", "llama")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<|spare{i}|>" for i in range(KNOWN - len(tokenizer))] + ["<|new|>", "<|pad|>"])
    assert tokenizer.convert_tokens_to_ids("<|new|>") == KNOWN
    tokenizer.save_pretrained(folder)
    return folder


def told_of_row_2(path: Path, plan: Callable[..., Any] = make_plan) -> bool:
    told = refusal(path, DataError, plan)
    return ".jsonl:2: the token '<|new|>' has the number 264, and the model's embeddings end at 263" in told


ROWS = [chat("say 1", "it is 1"), chat("say 2", "it is <|new|>"), *[chat(f"say {i}", f"{i}") for i in range(3, 20)]]


def test_a_token_beyond_the_embeddings_is_told_with_its_row(
    enlarged: Path, tmp_path: Path, recipe_file: RecipeFile
) -> None:
    model, rows = {"path": str(enlarged)}, str(write_jsonl(tmp_path / "rows.jsonl", ROWS))
    assert make_plan(load(recipe_file(model=model))).model.shape.embeddings == KNOWN
    assert told_of_row_2(recipe_file(model=model, data={"train": rows}))
    assert told_of_row_2(recipe_file(model=model, data={"eval": rows}))
    calibrated = {"quant": None, "calibrate": {"engine": "rtn", "data": rows}}
    assert told_of_row_2(recipe_file(model=model, **calibrated), plan_calibration)
    path = recipe_file(model=model, data={"train": rows})
    assert qft("check", path).exit_code == DataError.exit_code
    assert qft("train", path).exit_code == DataError.exit_code


def test_a_last_token_that_is_known_passes(tmp_path: Path, enlarged: Path, recipe_file: RecipeFile) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [chat("say", f"<|spare{KNOWN - len(byte_tokenizer()) - 1}|>")] * 4)
    plan = make_plan(load(recipe_file(model={"path": str(enlarged)}, data={"train": str(rows)})))
    assert max(plan.data.train[0]["input_ids"]) == KNOWN - 1


def special(folder: Path, **tokens: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
    tokenizer.save_pretrained(folder)


def test_special_tokens_beyond_the_embeddings_are_refused(
    enlarged: Path, tmp_path: Path, recipe_file: RecipeFile
) -> None:
    special(enlarged, pad_token="<|pad|>")
    assert "pads with" in refusal(recipe_file(model={"path": str(enlarged)}), ModelError)
    assert "'<|pad|>' has the number 265" in refusal(recipe_file(model={"path": str(enlarged)}), ModelError)
    special(enlarged, pad_token="<|im_end|>", eos_token="<|new|>")
    scored = {"data": {"eval_fraction": 0.5}, "eval": {"metrics": ["exact_match"]}}
    assert "ends an answer with" in refusal(recipe_file(model={"path": str(enlarged)}, **scored), ModelError)
    assert make_plan(load(recipe_file(model={"path": str(enlarged)})))  # nothing is generated
    assert "ends an answer with" in qft("chat", enlarged, "--prompt", "Hello").output


def test_eval_and_chat_look_before_they_load(enlarged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("qft.commands.evaluate.load_target", never)
    monkeypatch.setattr("qft.commands.chat.load_target", never)
    rows = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(DataError, match=r"rows.jsonl:2: the token '<\|new\|>'"):
        evaluate([str(enlarged)], EvalOptions(data=str(rows)), View())
    text = tmp_path / "text.txt"
    text.write_text("a text with <|new|> in it")
    with pytest.raises(DataError, match=r"text.txt: the token '<\|new\|>'"):
        evaluate([str(enlarged)], EvalOptions(data=str(text)), View())
    assert "the token '<|new|>' has the number 264" in qft("chat", enlarged, "--prompt", "what is <|new|>?").output


ROOM = 72


def table(kind: str, folder: Path) -> Path:
    positions = {"gpt2": {"n_positions": ROOM}}.get(kind, {"max_position_embeddings": ROOM})
    return write_model(folder, kind, **positions)


@pytest.mark.parametrize("kind", MODELS)
def test_tables_of_positions_are_told_from_what_is_computed(
    kind: str, models: Models, tmp_path: Path, recipe_file: RecipeFile
) -> None:
    plan = make_plan(load(recipe_file(model={"path": str(models(kind))}, quant=None))).model
    known = {"gpt2": 256, "opt": 256}.get(kind)
    assert plan.shape.position_table == known
    assert table_of_positions(without_contents(plan.checkpoint, plan.recipe.model)) == known
    if known is not None:  # the very last position is there, and none behind it
        model = AutoModelForCausalLM.from_pretrained(models(kind))
        with torch.no_grad():
            model(torch.zeros(1, known, dtype=torch.long))
            with pytest.raises(IndexError):
                model(torch.zeros(1, known + 1, dtype=torch.long))


def test_rows_may_be_as_long_as_the_table_and_no_longer(tmp_path: Path, recipe_file: RecipeFile) -> None:
    """A batch is padded to a multiple of 8, but not beyond the table's end."""
    base = write_model(tmp_path / "odd", "gpt2", n_positions=61)
    rows = write_jsonl(tmp_path / "rows.jsonl", [chat("q", "a" * n) for n in (1, 5, 50)])
    data = {"train": str(rows), "max_length": ..., "on_too_long": "truncate", "loss_on": "all"}
    path = recipe_file(model={"path": str(base)}, data=data, train={"report_to": [], "max_steps": 1})
    plan = make_plan(load(path))
    assert max(plan.data.train["length"]) == 61
    batch = Collator(2, most=plan.model.shape.position_table)(plan.data.train.to_list())
    assert batch["input_ids"].shape == batch["labels"].shape
    assert batch["input_ids"].shape[1] == 61
    assert train(load(path), View()).steps == 1
    data["max_length"] = 62
    assert "data.max_length: 62, and the model was built for 61" in refusal(
        recipe_file(model={"path": str(base)}, data=data), RecipeError
    )


def test_answers_must_find_room_behind_their_prompts(tmp_path: Path, recipe_file: RecipeFile) -> None:
    base = table("opt", tmp_path / "base")
    rows = write_jsonl(tmp_path / "rows.jsonl", [chat("say", "a"), chat("say it", "b"), chat("s", "c"), chat("t", "d")])
    asked = {"data": {"train": str(rows), "eval": str(rows), "max_length": ...}, "model": {"path": str(base)}}
    quiet = {"report_to": [], "max_steps": 1, "save_strategy": "no"}

    def recipe(tokens: int, **more: Any) -> Path:
        metrics = {"metrics": ["exact_match"], "max_new_tokens": tokens, **more}
        return recipe_file(**asked, train=quiet, eval=metrics)

    prompt = max(make_plan(load(recipe(1))).data.train["answer_start"])
    room = ROOM - prompt + 1
    told = refusal(recipe(room + 1), RecipeError)
    assert f"eval.max_new_tokens: {room + 1} after a prompt of {prompt} tokens" in told
    assert "recipe.yaml:" in told
    assert f"set it to {room} or less" in told
    assert train(load(recipe(room)), View()).eval.after is not None
    assert make_plan(load(recipe(room + 2, samples=1)))  # the first prompt is shorter
    with pytest.raises(RecipeError, match=r"eval.max_new_tokens: 256 after"):
        evaluate([str(base)], EvalOptions(data=str(rows), metrics=("exact_match",)), View())
    assert evaluate([str(recipe(room))], EvalOptions(), View()).targets[0].scores


def test_what_computes_its_positions_may_write_as_it_likes(recipe_file: RecipeFile) -> None:
    scored = {"data": {"eval_fraction": 0.5}, "eval": {"metrics": ["exact_match"], "max_new_tokens": 5000}}
    assert make_plan(load(recipe_file(**scored)))


def test_windows_of_an_evaluation_must_fit(tmp_path: Path) -> None:
    base = table("gpt2", tmp_path / "base")
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox. " * 40)
    with pytest.raises(RecipeError, match=r"--window: a sequence of 73 tokens, .* ends at 72"):
        evaluate([str(base)], EvalOptions(data=str(text), window=ROOM + 1, stride=10), View())
    assert evaluate([str(base)], EvalOptions(data=str(text), window=ROOM, stride=40), View()).targets
    task = answer_task(tmp_path / "tasks")
    limited = EvalOptions(data=str(text), window=ROOM, stride=40, harness=(str(task),))
    assert evaluate([str(base)], limited, View()).targets[0].harness  # it writes up to 8 tokens
    task.write_text(task.read_text().replace("max_gen_toks: 8", "max_gen_toks: 80"))
    with pytest.raises(RecipeError, match=r"eval.harness: answers: writes up to 80 tokens"):
        evaluate([str(base)], limited, View())


def test_windows_and_rows_of_a_calibration_must_fit(tmp_path: Path, recipe_file: RecipeFile) -> None:
    base = table("opt", tmp_path / "base")
    rows = write_jsonl(tmp_path / "rows.jsonl", [chat(f"say {i}", "it is a long answer " * 9) for i in range(24)])
    sections = {"quant": None, "model": {"path": str(base)}, "data": {"max_length": ...}}
    settings = {"preset": "w8a8-static", "engine": "rtn", "data": str(rows)}
    told = refusal(recipe_file(**sections, calibrate=settings), RecipeError, plan_calibration)
    assert "calibrate.max_length: a sequence of" in told
    fitting = recipe_file(**sections, calibrate=settings | {"max_length": ROOM - 1})
    data = plan_calibration(load(fitting)).data
    assert max([*map(len, data.windows), *data.verify["length"]]) == ROOM


def test_a_chat_looks_for_room_before_it_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("qft.commands.chat.load_target", never)
    base = table("opt", tmp_path / "base")
    told = qft("chat", base, "--prompt", "Hello", "--max-new-tokens", ROOM)
    assert told.exit_code == RecipeError.exit_code
    assert f"built for {ROOM}" in told.output
