"""What a resumed run may change, field by field."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from qft.documents.manifest import Manifest
from qft.documents.plan import PlanDocument
from qft.plan import make_plan
from qft.recipe import LoadedRecipe, load
from qft.recipe.data import Source
from qft.recipe.schema import CalibrateSection, Recipe
from qft.run.resume import CLASSES, Before, Planned, class_of, compare


def leaves(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        inner = CalibrateSection if name == "calibrate" else field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from leaves(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


@pytest.mark.parametrize("kind", CLASSES)
def test_every_field_has_one_class_and_every_class_a_field(kind: str) -> None:
    fields = {*leaves(Recipe), *leaves(Source, "data.train.0.")}
    assert {class_of(kind, field) for field in fields} == {"fixed", "honoured", "free"}
    known = {*fields, *(field.rpartition(".")[0] for field in fields)}
    assert CLASSES[kind].keys() <= known
    with pytest.raises(KeyError):
        class_of(kind, "data.of_tomorrow")


def test_no_field_of_what_a_training_reads_is_classed_with_its_section() -> None:
    assert not CLASSES["plan"].keys() & {"model", "quant", "adapter", "data", "train"}


@pytest.fixture
def loaded(recipe_file: Callable[..., Path]) -> LoadedRecipe:
    return load(recipe_file())


@pytest.fixture
def before(loaded: LoadedRecipe) -> Before:
    return Before(loaded.recipe, make_plan(loaded).document(), Manifest())


def judged(before: Before, now: LoadedRecipe, plan: Planned) -> list[list[str]]:
    """The fields that are refused, and those that are honoured."""
    return [[field for field, _ in each] for each in compare(before, now.recipe, plan, Manifest())]


def test_what_auto_comes_to_elsewhere_counts(before: Before, loaded: LoadedRecipe) -> None:
    assert isinstance(before.plan, PlanDocument)
    device = before.plan.device.model_copy(update={"kind": "cuda"})
    training = before.plan.training.model_copy(update={"bf16": False, "fp16": True, "tf32": True})
    elsewhere = before.plan.model_copy(update={"device": device, "training": training})
    assert judged(before, loaded, before.plan) == [[], []]
    assert judged(before, loaded, elsewhere) == [["train.bf16", "train.fp16"], ["model.device", "train.tf32"]]
    said = loaded.having(train={"bf16": True}, data={"max_length": 128})
    assert judged(before, said, before.plan) == [[], []]
    said = loaded.having(model={"dtype": "float32"})
    assert make_plan(said).document().training.bf16 is False
    assert judged(before, said, make_plan(said).document()) == [["model.dtype"], []]


FIXED: list[tuple[str, str, object]] = [
    ("model", "attn_implementation", "eager"),
    ("quant", "double_quant", False),
    ("adapter", "r", 8),
    ("adapter", "lora_dropout", 0.1),
    ("data", "loss_on", "all"),
    ("train", "gradient_accumulation_steps", 1),
    ("train", "train_sampling_strategy", "sequential"),
    ("train", "lr_scheduler_type", "cosine"),
    ("train", "warmup_steps", 1.0),
]


def test_what_the_checkpoint_was_made_by_is_refused(before: Before, loaded: LoadedRecipe) -> None:
    for section, field, value in FIXED:
        asked = loaded.having(**{section: {field: value}})
        assert judged(before, asked, before.plan) == [[f"{section}.{field}"], []]


def test_a_source_is_told_by_its_field(before: Before, loaded: LoadedRecipe, tmp_path: Path) -> None:
    one = {"path": str(tmp_path / "chats.jsonl")}
    assert judged(before, loaded.having(data={"train": [one | {"weight": 2.0}]}), before.plan)[0] == [
        "data.train.0.weight"
    ]
    assert judged(before, loaded.having(data={"train": [one, one]}), before.plan)[0] == ["data.train"]
    facts = Manifest(data={one["path"]: "another"})
    was = before._replace(manifest=Manifest(data={one["path"]: "one"}))
    problems, _ = compare(was, before.recipe, before.plan, facts)
    assert [field for field, _ in problems] == ["data.train"]


def test_an_older_plan_that_tells_less_is_taken(before: Before, loaded: LoadedRecipe) -> None:
    assert isinstance(before.plan, PlanDocument)
    data = before.plan.data.model_copy(update={"max_length": None})
    older = before._replace(plan=before.plan.model_copy(update={"data": data}))
    assert judged(older, loaded, before.plan) == [[], []]
