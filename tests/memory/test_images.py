"""Of rows with images, towers and projectors are traced with the rest of the model, on tensors without contents."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qft.checkpoint.skeleton import find_blocks
from qft.data.prepare import Prepared, prepare
from qft.memory.repeated import pattern
from qft.memory.trace import few_blocks, trace, traced
from qft.memory.work import MIDDLE, Batch, Step, Work
from qft.plan import ModelPlan, plan_model
from qft.plan.images import Looks
from qft.plan.memory import batch_of
from qft.quant.hold import SCHEMES
from qft.recipe.data import DataSection
from qft.recipe.load import from_values
from qft.recipe.training import QuantSection
from tests.support.once import once
from tests.support.pictures import families, picture, write_seeing_model
from tests.support.rows import chat, write_jsonl

LORA = {"r": 4, "lora_alpha": 8.0, "target_modules": ["q_proj", "v_proj"], "exclude_modules": ".*vision.*"}
FORWARD = "forward, images"


def shown(text: str, *colours: str) -> dict[str, Any]:
    images = [{"type": "image", "image": f"{colour}.png"} for colour in colours]
    question = {"role": "user", "content": [*images, {"type": "text", "text": text}]}
    return {"messages": [question, {"role": "assistant", "content": "it is"}]}


def seeing(factory: pytest.TempPathFactory, family: str) -> ModelPlan:
    folder = once(factory, f"seeing-{family}", lambda folder: write_seeing_model(folder, family))
    return plan_model(
        from_values({"model": {"path": str(folder), "device": "cpu", "dtype": "float32"}, "output_dir": "-"})
    )


def encoded(plan: ModelPlan, folder: Path, rows: list[Any]) -> Prepared:
    for colour in ("red", "blue"):
        picture(colour).save(folder / f"{colour}.png")
    data = {"train": str(write_jsonl(folder / "rows.jsonl", rows)), "max_length": 256}
    return prepare(DataSection.model_validate(data), plan.tokenizer, 0, plan.pictures)


def batch(plan: ModelPlan, data: Prepared, rows: int) -> Batch:
    return Looks(data, plan.pictures).trained(batch_of(data.lengths, rows))


def work(**changes: Any) -> Work:
    scheme = SCHEMES["none"](QuantSection.model_validate({"mode": "none"}), "float32", ())
    made = Work(scheme, LORA, "adamw_torch", 0.0, False, None, on_gpu=False, logit_bytes=None, offloads=False,
                held_out=None)  # fmt: skip
    return replace(made, **changes)


def skeleton(plan: ModelPlan, layers: int) -> Any:
    config = copy.deepcopy(plan.checkpoint.config)
    config.get_text_config().num_hidden_layers = layers
    with torch.device("meta"):
        return type(plan.skeleton)(config)


def totals(plan: ModelPlan, asked: Work, step: Step, *, real: bool, layers: int = 2) -> dict[str, int]:
    model = skeleton(plan, layers)
    blocks = find_blocks(model, layers)[1]
    tensors = nullcontext() if real else FakeTensorMode(allow_non_fake_inputs=True)
    return {
        part: peak.total for part, peak in traced(model, blocks, pattern(blocks), asked, step, tensors).peaks.items()
    }


MIXED = [shown("?", "red"), chat("a longer question that shows nothing at all", "no"), shown("both", "red", "blue")]


@pytest.mark.parametrize("family", families())
def test_a_step_without_contents_takes_what_a_real_one_does(
    family: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    plan = seeing(tmp_path_factory, family)
    made = batch(plan, encoded(plan, tmp_path, MIXED), 2)
    asked = work(held_out=made, answered=replace(made, padded=True))
    once_more = Step(made, kept="inputs", accumulates=True)
    found = totals(plan, asked, once_more, real=False)
    assert found == totals(plan, asked, once_more, real=True)
    assert {FORWARD, "evaluation, images", "answers, images"} <= found.keys()


def test_more_images_take_more(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    plan, text = seeing(tmp_path_factory, "llava"), "x" * 40
    few, many = (
        totals(
            plan,
            work(),
            Step(batch(plan, encoded(plan, tmp_path, [row] * 2), 2), kept="all", accumulates=False),
            real=False,
        )
        for row in (shown(text, "red"), shown(text, "red", "blue"))
    )
    patches = 2 * 4 * 32 * 4  # of one more image a row, four of 32 numbers in float32
    assert many[FORWARD] - few[FORWARD] > 2 * patches


def test_rows_with_the_most_images_stand_for_the_longest(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    plan = seeing(tmp_path_factory, "llava")
    made = batch(plan, encoded(plan, tmp_path, MIXED), 1)
    assert made.seen
    assert made.seen.inputs["pixel_values"].shape[0] == 2
    assert made.seen.inputs["input_ids"].shape == (1, made.tokens)
    assert batch(plan, encoded(plan, tmp_path, MIXED[1:2]), 1).seen is None


def test_few_blocks_tell_of_many_where_a_tower_is_the_most(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    plan = seeing(tmp_path_factory, "llava")
    made = batch(plan, encoded(plan, tmp_path, [shown("?", "red", *["blue"] * 6)] * 2), 2)
    step = Step(made, kept="inputs", accumulates=False)
    whole = totals(plan, work(), step, real=False, layers=5)
    ends = trace(few_blocks(skeleton(plan, 5), 5), work(), step)
    found = {part: peak.total for part, peak in ends.shorter.extrapolated(ends.longer, ends.times).peaks.items()}
    assert found == pytest.approx({part: size for part, size in whole.items() if part != MIDDLE}, abs=2048)
