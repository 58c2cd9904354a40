"""Images in rows: where they are named, what the model reads of them, and what is learnt beside them."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from qft.data.batch import Collator, pad_token_id
from qft.data.formats import FORMATS
from qft.data.images import open_image
from qft.data.prepare import Prepared, prepare
from qft.data.sources import BadRow
from qft.data.template import IGNORED
from qft.errors import DataError
from qft.measure.likelihood import Passage, measure
from qft.plan import ModelPlan, plan_model
from qft.recipe.data import DataSection
from qft.recipe.load import from_values
from tests.support.once import once
from tests.support.pictures import families, picture, write_seeing_model
from tests.support.rows import chat, write_jsonl

IMAGE = {"type": "image"}


def said(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def turns(question: list[Any], answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def uri(image: Any) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


Seeing = Callable[[str], ModelPlan]


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Seeing:
    """The plan of the tiny model of a family."""

    def plan(family: str) -> ModelPlan:
        folder = once(tmp_path_factory, f"seeing-{family}", lambda folder: write_seeing_model(folder, family))
        model = {"path": str(folder), "device": "cpu", "dtype": "float32"}
        return plan_model(from_values({"model": model, "output_dir": "-"}))

    return plan


def encoded(plan: ModelPlan, folder: Path, rows: list[Any], **changes: Any) -> Prepared:
    for colour in ("red", "blue"):
        picture(colour).save(folder / f"{colour}.png")
    write_jsonl(folder / "rows.jsonl", rows)
    data = DataSection.model_validate({"train": str(folder / "rows.jsonl"), "max_length": 512, **changes})
    return prepare(data, plan.tokenizer, 0, plan.pictures)


RED, BLUE = IMAGE | {"image": "red.png"}, IMAGE | {"image": "blue.png"}
MIXED = [
    {"messages": turns([RED, said("what is it?")], "red") + turns([said("and "), BLUE, RED, said("?")], "blue, red")},
    chat("no image", "none"),
    {"messages": turns([said("this: "), BLUE], "blue")},
]


@pytest.mark.parametrize("family", families())
def test_what_is_learnt_is_what_the_assistant_says_and_what_is_read_is_the_processors(
    family: str, seeing: Seeing, tmp_path: Path
) -> None:
    plan = seeing(family)
    rows = encoded(plan, tmp_path, MIXED).train
    learnt = [[label for label in row["labels"] if label != IGNORED] for row in rows]
    texts = [plan.tokenizer.decode(ids) for ids in learnt]
    assert texts == ["red<|im_end|>blue, red<|im_end|>", "none<|im_end|>", "blue<|im_end|>"]
    for row in rows:
        answer = plan.tokenizer.decode(row["input_ids"][row["answer_start"] :])
        assert answer.rstrip("\n") in ("blue, red<|im_end|>", "none<|im_end|>", "blue<|im_end|>")
    # The library's own processor and model, one row at a time, against a padded batch of all.
    processor = AutoProcessor.from_pretrained(plan.checkpoint.folder)
    model = AutoModelForImageTextToText.from_pretrained(plan.checkpoint.folder, dtype=torch.float32).eval()
    losses: list[float] = []
    for row, images in zip(rows, (["red", "blue", "red"], [], ["blue"]), strict=True):
        one = {"input_ids": torch.tensor([row["input_ids"]])}
        if images:
            pictures = [open_image(str(tmp_path / f"{colour}.png"))[0] for colour in images]
            asked = {"text": [row["rendered"]], "images": [pictures], "return_tensors": "pt"}
            one = processor(**asked, add_special_tokens=False)
            assert one["input_ids"][0].tolist() == row["input_ids"]
        with torch.no_grad():
            losses.append(float(model(**one, labels=torch.tensor([row["labels"]])).loss) * len(learnt[len(losses)]))
    batch = Collator(pad_token_id(plan.tokenizer), pictures=plan.pictures)(list(rows))
    del batch["rows"], batch["learnt_tokens"]
    with torch.no_grad():
        found = float(model(**batch).loss) * sum(map(len, learnt))
    assert found == pytest.approx(sum(losses), rel=1e-4)
    measured = measure(model, [Passage.of(row) for row in rows], batch_size=2, pad=2, pictures=plan.pictures)
    assert measured.nll.tolist() == pytest.approx(losses, rel=1e-4)
    assert any(name.startswith("pixel_values") for name in batch)


def test_all_but_what_stands_for_images_can_be_learnt(seeing: Seeing, tmp_path: Path) -> None:
    plan = seeing("llava")
    row = encoded(plan, tmp_path, MIXED[2:], loss_on="all").train[0]
    assert [label == IGNORED for label in row["labels"]] == [number == 261 for number in row["input_ids"]]
    assert row["input_ids"].count(261) == 4


SAME = {
    "a path": turns([RED, said("?")], "red"),
    "OpenAI's": turns([{"type": "image_url", "image_url": {"url": uri(picture("red"))}}, said("?")], "red"),
    "a path as OpenAI's": turns([{"type": "image_url", "image_url": "red.png"}, said("?")], "red"),
    "base64": turns([IMAGE | {"base64": uri(picture("red")).partition(",")[2]}, said("?")], "red"),
}
BESIDE: dict[str, dict[str, Any]] = {
    "in order": {"messages": turns([IMAGE, said("?")], "red"), "images": ["red.png"]},
    "one": {"messages": turns([IMAGE, said("?")], "red"), "image": {"path": "red.png"}},
    "in front": {"prompt": "?", "completion": "red", "images": ["red.png"]},
    "at a mark": {
        "conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "red"}],
        "image": "red.png",
    },
}


def test_images_are_named_in_many_ways(seeing: Seeing, tmp_path: Path) -> None:
    plan = seeing("llava")
    found = []
    for row in [*({"messages": each} for each in SAME.values()), *BESIDE.values()]:
        train = encoded(plan, tmp_path, [row]).train
        found.append((train[0]["input_ids"], open_image(train[0]["images"][0])[0].tobytes()))
    assert all(each == found[0] for each in found)


def test_a_data_set_brings_its_images(seeing: Seeing, tmp_path: Path) -> None:
    rows = {"question": ["?"] * 2, "images": [[picture("red")], [picture("blue")]], "prompt": ["?"] * 2}
    kinds = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "completion": datasets.Value("string"),
            "images": datasets.List(datasets.Image()),
        }
    )
    made = datasets.Dataset.from_dict(
        {"prompt": rows["prompt"], "completion": ["red", "blue"], "images": rows["images"]}, features=kinds
    )
    made.to_parquet(str(tmp_path / "rows.parquet"))
    plan = seeing("llava")
    data = DataSection.model_validate({"train": str(tmp_path / "rows.parquet"), "max_length": 512})
    prepared = prepare(data, plan.tokenizer, 0, plan.pictures)
    assert [open_image(row["images"][0])[0].tobytes() for row in prepared.train] == [
        picture(colour).tobytes() for colour in ("red", "blue")
    ]
    assert prepared.sources[0].images == 2


REFUSED = {
    "green.png: no such image": {"messages": turns([IMAGE | {"image": "green.png"}], "x")},
    "rows.jsonl: cannot be read as an image": {"messages": turns([IMAGE | {"image": "rows.jsonl"}], "x")},
    "data:image/png;base64,!!: cannot be read": {
        "messages": turns([IMAGE | {"image": "data:image/png;base64,!!"}], "x")
    },
    "nothing is fetched": {"messages": turns([IMAGE | {"url": "https://example.org/a.png"}], "x")},
    "messages.0.content.0: names no image": {"messages": turns([IMAGE], "x")},
    "images.1: the messages have no place": {"messages": turns([IMAGE], "x"), "images": ["red.png"] * 2},
    "the assistant shows none": {
        "messages": [{"role": "user", "content": "draw"}, {"role": "assistant", "content": [RED]}]
    },
    "its text says <image>": {"messages": turns([RED, said("what is <image>?")], "x")},
    "messages.0.content.0: only parts": {"messages": turns([{"type": "video"}], "x")},
    "needs a path or a data URI, not int": {"messages": turns([IMAGE | {"image": 7}], "x")},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_no_image_is_told_by_its_row(reason: str, seeing: Seeing, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        encoded(seeing("llava"), tmp_path, [chat("a", "b"), REFUSED[reason]])
    assert f"{tmp_path / 'rows.jsonl'}:2: " in str(caught.value)
    assert reason in str(caught.value)


def test_rows_beside_such_with_images_must_not_speak_of_any(seeing: Seeing, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:2: its text says <image>, which stands for an image"):
        encoded(seeing("llava"), tmp_path, [MIXED[2], chat("what is <image>?", "a token")])
    assert len(encoded(seeing("llava"), tmp_path, [chat("what is <image>?", "a token")]).train) == 1


def test_tokens_of_images_count(seeing: Seeing, tmp_path: Path) -> None:
    plan = seeing("llava")
    whole = encoded(plan, tmp_path, MIXED[2:]).train[0]
    assert whole["length"] == len(whole["input_ids"])
    with pytest.raises(DataError, match=rf"rows.jsonl:1: {whole['length']} tokens, and data.max_length is 30"):
        encoded(plan, tmp_path, MIXED[2:], max_length=30)
    cut = encoded(plan, tmp_path, MIXED[2:], max_length=whole["length"] - 3, on_too_long="truncate").train[0]
    assert cut["input_ids"] == whole["input_ids"][:-3]
    assert Collator(2, pictures=plan.pictures)([cut])["pixel_values"].shape[0] == 1
    most = len(whole["input_ids"]) - whole["input_ids"][::-1].index(261)
    with pytest.raises(
        DataError, match=rf"rows.jsonl:1: {most} tokens up to its last image, and data.max_length is {most - 1}"
    ):
        encoded(plan, tmp_path, MIXED[2:], max_length=most - 1, on_too_long="truncate")


def test_an_image_that_is_another_one_is_told(seeing: Seeing, tmp_path: Path) -> None:
    plan = seeing("llava")
    before = encoded(plan, tmp_path, MIXED[2:])
    (tmp_path / "blue.png").write_bytes((tmp_path / "red.png").read_bytes())
    write_jsonl(tmp_path / "rows.jsonl", MIXED[2:])
    data = DataSection.model_validate({"train": str(tmp_path / "rows.jsonl"), "max_length": 512})
    assert prepare(data, plan.tokenizer, 0, plan.pictures).sources[0].digest != before.sources[0].digest
    (tmp_path / "blue.png").unlink()
    with pytest.raises(DataError, match=r"blue.png: no such image"):
        Collator(2, pictures=plan.pictures)(list(before.train))


def test_a_model_of_text_reads_none(tiny_model: Path, tmp_path: Path) -> None:
    plan = plan_model(from_values({"model": {"path": str(tiny_model)}, "output_dir": "-"}))
    with pytest.raises(
        DataError, match=r"rows.jsonl:1: the model reads no images; name their field in data.ignore_fields"
    ):
        encoded(plan, tmp_path, [BESIDE["in front"]])
    assert len(encoded(plan, tmp_path, [BESIDE["in front"]], ignore_fields=["images"]).train) == 1


def test_what_a_row_says_is_kept_beside_its_images() -> None:
    row = {"messages": turns([said("a"), RED, said("b")], "c")}
    conversation = FORMATS["messages"](json.loads(json.dumps(row)))
    assert conversation.messages[0]["content"] == [said("a"), IMAGE, said("b")]
    assert conversation.images == (("messages.0.content.1.image", "red.png"),)
    with pytest.raises(BadRow, match="the assistant says nothing"):
        FORMATS["messages"]({"messages": turns([RED], " ")})
