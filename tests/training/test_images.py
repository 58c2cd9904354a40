"""Training on images: a tiny model of random weights learns colours, and what sees is handed over as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from qft.checkpoint.language import beside_language
from qft.commands.conversation import ChatOptions, Conversation
from qft.commands.evaluate import EvalOptions, evaluate
from qft.data.batch import Collator
from qft.documents.training import Report
from qft.errors import DataError
from qft.model.merge import MergedWeights
from qft.model.target import load_target, parse_target
from qft.plan import make_plan, plan_model
from qft.progress import View
from qft.recipe import load
from qft.training.surviving import rows_of
from tests.support.once import once
from tests.support.pictures import draw_script, write_seeing_model
from tests.support.rows import chat, write_jsonl
from tests.support.runs import run

TRAIN: dict[str, Any] = {
    "max_steps": 40,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0.02,
}
TRAIN |= {"report_to": [], "save_strategy": "no"}


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on 80 drawn rows, and some of text alone among them."""

    def make(folder: Path) -> None:
        write_seeing_model(folder / "model", "llava")
        draw_script().write(folder / "shapes", {"What colour is it?": 0})
        write_jsonl(folder / "text.jsonl", [chat(f"say {i}", f"{i}") for i in range(4)])
        values = {
            "model": {"path": str(folder / "model"), "device": "cpu", "dtype": "float32"},
            "adapter": {"r": 8, "modules_to_save": ["embed_tokens", "lm_head"]},
            "data": {"train": ["shapes/rows.jsonl", "text.jsonl"], "eval_fraction": 0.2},
            "eval": {"metrics": ["exact_match"], "max_new_tokens": 8},
            "train": TRAIN,
            "output_dir": "run",
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
        run(folder / "recipe.yaml")

    return once(tmp_path_factory, "learnt-colours", make)


def test_a_model_of_random_weights_learns_the_colours_of_shapes(learnt: Path) -> None:
    report = Report.model_validate_json((learnt / "run/report.json").read_text("utf-8"))
    assert report.eval.before is not None
    assert report.eval.after is not None
    assert report.eval.before.scores["exact_match"] == 0
    assert report.eval.after.scores["exact_match"] >= 0.6  # of four colours; without seeing it would be a quarter
    document = evaluate([str(learnt / "run")], EvalOptions(batch_size=3), View())
    assert document.targets[0].scores["exact_match"].value == pytest.approx(report.eval.after.scores["exact_match"])


def test_part_of_a_batch_has_the_images_of_its_rows(learnt: Path) -> None:
    plan = make_plan(load(learnt / "recipe.yaml"))
    collate, rows = Collator(2, pictures=plan.model.pictures), [plan.data.train[i] for i in range(4)]
    part, alone = rows_of(collate(rows), 1, 3, collate), collate(rows[1:3])
    assert part.keys() == alone.keys()
    assert torch.equal(part["pixel_values"], alone["pixel_values"])
    assert len(part["pixel_values"]) == sum(len(row["images"] or ()) for row in rows[1:3]) > 0


def test_a_conversation_asks_about_an_image_as_training_does(learnt: Path) -> None:
    target = parse_target(str(learnt / "run"), adapter=None, data=None)
    plan = target.plan()
    row = make_plan(load(learnt / "recipe.yaml")).data.train[0]
    talk = Conversation(plan.tokenizer, ChatOptions(max_new_tokens=8), pictures=plan.pictures)
    with pytest.raises(DataError, match=r"none.png: no such image"):
        talk.show_image(str(learnt / "none.png"))
    talk.show_image(row["images"][0])
    assert talk.prompt("What colour is it?") == row["input_ids"][: row["answer_start"]]
    model = load_target(target, plan)
    reply = talk.ask(model, "What colour is it?", lambda piece: None)
    assert reply.text in ("red", "green", "blue", "yellow")
    talk.ask(model, "And now?", lambda piece: None)  # the image is still in the conversation
    said = talk.row()["messages"]
    assert said[0]["content"][0] == {"type": "image", "image": row["images"][0]}
    assert said[2]["content"] == "And now?"


def test_what_sees_is_handed_over_to_the_bit(learnt: Path, tmp_path: Path) -> None:
    plan = plan_model(load(learnt / "recipe.yaml"))
    MergedWeights(plan, learnt / "run/adapter", "bfloat16", None).write(tmp_path)
    before, after = AutoModelForImageTextToText.from_pretrained(learnt / "model"), tmp_path
    beside = beside_language(before)
    written = {name: value for path in after.glob("*.safetensors") for name, value in load_file(path).items()}
    stored = load_file(learnt / "model/model.safetensors")
    seen = [name for name in stored if any(part.rpartition(".")[2] in name for part in beside)]
    assert len(seen) > 20
    assert all(torch.equal(written[name], stored[name]) for name in seen)
    assert (after / "processor_config.json").read_bytes() == (learnt / "model/processor_config.json").read_bytes()
