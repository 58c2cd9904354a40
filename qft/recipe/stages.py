"""train.stages: what one training does in turn, each stage being the whole recipe that it amounts to.

A recipe with stages says of everything else what its last one says, so that whoever evaluates, exports or talks to the
result need know of none: `staged` makes that of the stages, and `stages_of` the stages of that.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from qft.errors import RecipeError
from qft.recipe.presets import PRESETS
from qft.recipe.rules import contradictions, unread_fields
from qft.recipe.section import plain
from qft.recipe.source import Place, Tree
from qft.recipe.training import QuantSection, TrainSection

if TYPE_CHECKING:
    from qft.recipe.load import LoadedRecipe
    from qft.recipe.schema import Recipe

RESETS = {
    "reset_optimizer": "Start with a new optimizer, and not with the state of the stage before.",
    "reset_lr_scheduler": "Begin the learning rate's schedule anew, over this stage and those behind it that go on "
    "with it, and not go on where the stage before came to.",
}
"""What a stage may say beside fields of the recipe, each false unless it does."""
WHOLE_RUN = {
    "stages", "train_sampling_strategy", "dataloader_num_workers", "dataloader_pin_memory", "full_determinism",
    "save_total_limit", "save_on_signal", "report_to", "run_name",
}  # fmt: skip
"""Fields of `train` that are one for all stages."""
FIELDS: dict[str, tuple[str, str]] = {f"quant.{name}": ("quant", name) for name in QuantSection.model_fields}
FIELDS |= {name: ("train", name) for name in TrainSection.model_fields if name not in WHOLE_RUN}
"""Fields that a stage may set, by their names there: those of `train`, in which it stands, by their own."""
LAST_ALONE = ("load_best_model_at_end", "early_stopping_patience")


class Stage(NamedTuple):
    """Which of the stages a recipe is."""

    place: int
    """In the list, from 0."""
    own: Mapping[str, Any]
    """What it sets, by the names of FIELDS and RESETS."""

    def sets(self, field: str) -> bool:
        return field.removeprefix("train.") in self.own

    def resets(self, what: str) -> bool:
        return bool(self.own.get(f"reset_{what}", False))


def stages_of(loaded: LoadedRecipe) -> tuple[LoadedRecipe, ...]:
    """The recipes that `loaded` comes to, one after another; itself, if it has no stages. Raises RecipeError."""
    if not loaded.recipe.train.stages:
        return (loaded,)
    return tuple(_stage(loaded, index) for index in range(len(loaded.recipe.train.stages)))


def staged(stages: Sequence[LoadedRecipe]) -> LoadedRecipe:
    """The recipe of them all: the last one, which says besides what each one sets, and in what it differs from it."""
    last = stages[-1]
    tree = Tree(copy.deepcopy(last.tree.values), dict(last.tree.where))
    ends, said = _values(last), []
    for each in stages:
        assert each.stage
        values, (place, own) = _values(each), each.stage
        unread = {field.removeprefix("train.") for field in unread_fields(each.recipe)}
        resets = {name: value for name, value in own.items() if name in RESETS}
        differs = {name for name in values if values[name] != ends[name]} - unread
        said.append({name: plain(value) for name, value in values.items() if name in own or name in differs} | resets)
        for name in own:
            where = each.tree.at(FIELDS.get(name, ("train", "stages", place)))
            tree.where["train", "stages", place, name] = where
    tree.values["train"] = tree.values.get("train", {}) | {"stages": said}
    return last.over(tree, None)


def require_stages(loaded: LoadedRecipe) -> LoadedRecipe:
    """A recipe as it was written -> the one that `staged` makes. Raises RecipeError with every problem found."""
    if problems := list(_misspelled(loaded.tree)):
        raise RecipeError(problems)
    stages = stages_of(loaded)
    found = [*_unheard(loaded, stages), *_broken_rules(loaded, stages), *_between(stages)]
    if problems := list(dict.fromkeys(found)):
        raise RecipeError(problems)
    return staged(stages)


def schema() -> dict[str, Any]:
    """JSON Schema of one stage, beside that of the sections."""
    sections = {"quant": QuantSection.__name__, "train": TrainSection.__name__}
    fields = {n: {"$ref": f"#/$defs/{sections[section]}/properties/{f}"} for n, (section, f) in FIELDS.items()}
    resets = {name: {"type": "boolean", "default": False, "description": text} for name, text in RESETS.items()}
    others = {"patternProperties": {r"^train\.": {}}, "additionalProperties": False}
    return {"type": "object", "properties": fields | resets, **others}


def effective(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """Yield all that each stage is, under names that begin with `train.stages.0.`, of a recipe that `staged` made."""
    for index, pairs in enumerate(recipe.train.stages):
        ends = {name: getattr(getattr(recipe, section), field) for name, (section, field) in FIELDS.items()}
        values = {name: plain(value) for name, value in (ends | dict.fromkeys(RESETS, False)).items()} | dict(pairs)
        yield from ((f"train.stages.{index}.{name}", value) for name, value in values.items())


def field_of(name: str) -> str | None:
    """The recipe's field that `train.stages.0.name` stands for; None: there is none."""
    own = name.split(".", 3)[-1]
    return ".".join(FIELDS[own]) if own in FIELDS else None


def with_paths(stages: Any, local: Callable[[Any], Any]) -> Any:
    """The list as it is written, its paths made `local`."""
    for stage in stages if isinstance(stages, list) else ():
        if isinstance(stage, dict) and "quant.plugin" in stage:
            stage["quant.plugin"] = local(stage["quant.plugin"])
    return stages


def _values(loaded: LoadedRecipe) -> dict[str, Any]:
    """What a stage may set, as it stands. Presets have been applied."""
    fields = {name: place for name, place in FIELDS.items() if place[1] != "preset"}
    return {name: getattr(getattr(loaded.recipe, section), field) for name, (section, field) in fields.items()}


def _own(tree: Tree, index: int) -> dict[str, Any]:
    """What is written of a stage."""
    return {name.removeprefix("train."): value for name, value in tree.values["train"]["stages"][index].items()}


def _stage(loaded: LoadedRecipe, index: int) -> LoadedRecipe:
    """The recipe, with what the stage sets, and without what then has no meaning and the stage has not set."""
    own = _own(loaded.tree, index)
    tree = Tree(copy.deepcopy(loaded.tree.values), dict(loaded.tree.where))
    del tree.values["train"]["stages"]
    gone = []
    if own.keys() & {"quant.mode", "quant.preset"}:
        gone.append(("quant", "preset"))
    if "num_train_epochs" in own:
        gone.append(("train", "max_steps"))  # which would take precedence
    _remove(tree, gone)
    tree.merge(_laid_over(loaded.tree, index))
    stage = Stage(index, own)
    made = loaded.over(tree, stage)
    unread = [field for field in unread_fields(made.recipe) if not stage.sets(field)]
    _remove(tree, [(section, name) for section, _, name in (field.partition(".") for field in unread)])
    return loaded.over(tree, stage)


def _remove(tree: Tree, fields: Sequence[tuple[str, str]]) -> None:
    for section, name in fields:
        (tree.values.get(section) or {}).pop(name, None)


def _laid_over(tree: Tree, index: int) -> Tree:
    """What a stage sets, as sections, and where it is written."""
    over, written = Tree(), tree.values["train"]["stages"][index]
    for key, value in written.items():
        if (name := key.removeprefix("train.")) not in FIELDS:
            continue
        section, field = FIELDS[name]
        over.values.setdefault(section, {})[field] = copy.deepcopy(value)
        start: Place = ("train", "stages", index, key)
        over.where |= {(section, field, *at[4:]): where for at, where in tree.where.items() if at[:4] == start}
    quant = over.values.get("quant", {})
    chosen = PRESETS["quant"].get(str(quant.get("preset")), {})
    if quant.get("mode", chosen.get("mode")) == chosen.get("mode"):  # else the rules refuse the preset
        for field in chosen.keys() - quant.keys():
            quant[field] = chosen[field]
            over.where["quant", field] = over.at(("quant", "preset"))
    return over


def _misspelled(tree: Tree) -> Iterator[str]:
    for index, written in enumerate(tree.values["train"]["stages"]):
        seen = set[str]()
        for key, value in written.items():
            name = key.removeprefix("train.")
            text = "given twice" if name in seen else _wrong_key(name)
            if name in RESETS and not isinstance(value, bool):
                text = f"should be true or false, not {value!r}"
            seen.add(name)
            if text:
                place = ("train", "stages", index, key)
                yield f"{tree.at(place)}: {'.'.join(map(str, place))}: {text}"


def _wrong_key(name: str) -> str | None:
    """What is wrong with a key of a stage; None: nothing."""
    if name in FIELDS or name in RESETS:
        return None
    if name in WHOLE_RUN:
        return "is one for the whole run; set it under train itself"
    section = name.partition(".")[0]
    if section in ("model", "adapter", "data", "memory", "eval", "calibrate", "export", "output_dir", "seed"):
        text = "is the same in all stages, which may set fields of quant and train"
        return f"{text}; set it in the section of that name" if "." in name else text
    close = difflib.get_close_matches(name, [*FIELDS, *RESETS], n=1)
    return "unknown field" + (f", did you mean {close[0]}?" if close else "")


def _unheard(loaded: LoadedRecipe, stages: Sequence[LoadedRecipe]) -> Iterator[str]:
    """What the command line sets for all, and each stage for itself."""
    sets = [{*each.stage.own} for each in stages if each.stage]
    for own in sets:
        own |= {"max_steps"} if "num_train_epochs" in own else set()
    for name, place in FIELDS.items():
        if loaded.tree.where.get(place, "").startswith("--set") and all(name in own for own in sets):
            yield loaded.problem(".".join(place), "each of train.stages sets it for itself; change it there")


def _broken_rules(loaded: LoadedRecipe, stages: Sequence[LoadedRecipe]) -> Iterator[str]:
    """Rules of each stage as a recipe; what is the same in all of them is told once."""
    unread, quant = [unread_fields(stage.recipe) for stage in stages], loaded.recipe.quant
    of_preset = {f"quant.{name}" for name in PRESETS["quant"].get(str(quant.preset), {})}
    for field, reason in unread[-1].items():
        of_stages = field.startswith(("quant.", "train."))  # else it is read once all stages are over
        if not loaded.given(field) or (of_stages and not all(field in each for each in unread)):
            continue
        if field in of_preset:
            yield loaded.problem("quant.preset", f"{quant.preset} is a preset for 4bit, which no stage is; remove it")
        else:
            yield loaded.problem(field, f"{reason}; remove it")
    for stage, fields in zip(stages, unread, strict=True):
        own = (field for field in fields if stage.stage and stage.stage.sets(field))
        yield from (stage.problem(field, f"{fields[field]}; remove it") for field in own)
    if loaded.recipe.data.streaming:
        text = "cannot go on from stage to stage: set it to false, or leave train.stages away"
        yield loaded.problem("data.streaming", text)
    broken = [list(contradictions(stage.recipe)) for stage in stages]
    for stage, found in zip(stages, broken, strict=True):
        for problem in found:
            of_all = all(problem in each for each in broken)
            yield (loaded if of_all else stage).problem(*problem)


def _between(stages: Sequence[LoadedRecipe]) -> Iterator[str]:
    """What stages need of each other."""
    for each in stages:
        yield from _of_each(each)
    for name in RESETS:
        if stages[0].stage and name in stages[0].stage.own:
            where = stages[0].tree.at(("train", "stages", 0, name))
            yield f"{where}: train.stages.0.{name}: the first stage has nothing to reset; remove it"
    for each in stages[:-1]:
        for name in LAST_ALONE:
            if getattr(each.recipe.train, name):
                text = "a stage that another one follows hands over what its last step came to: set it in the last"
                yield each.problem(f"train.{name}", f"{text} of train.stages alone")
    for one, other in pairwise(stages):
        yield from _after(one, other)


def _of_each(each: LoadedRecipe) -> Iterator[str]:
    """What no stage may ask for."""
    quant = each.recipe.quant
    if quant.skip_modules == "auto":
        text = "auto is measured once, before a training that holds its base in one way: name layers"
        yield each.problem("quant.skip_modules", text)


def _after(one: LoadedRecipe, other: LoadedRecipe) -> Iterator[str]:
    """What a stage may not change of the one before it."""
    was, now, stage = one.recipe.train, other.recipe.train, other.stage
    assert stage
    if was.step_rows != now.step_rows:
        text = f"steps have {now.step_rows} rows, and {was.step_rows} in the stage before, whose order of rows goes on"
        remedy = "keep per_device_train_batch_size x gradient_accumulation_steps as it is"
        yield other.problem("train.gradient_accumulation_steps", f"{text}: {remedy}")
    if was.optim != now.optim and not stage.resets("optimizer"):
        text = f"{now.optim} cannot go on with the state of {was.optim}: set reset_optimizer to true"
        yield other.problem("train.optim", text)
    if _scales(one) != _scales(other) and not stage.resets("optimizer"):
        text = "scales are trained in one stage that are not in the other, whose optimizer state does not fit"
        yield other.problem("quant.learn_scales", f"{text}: set reset_optimizer to true")
    for name in ("lr_scheduler_type", "warmup_steps"):
        if getattr(was, name) != getattr(now, name) and not stage.resets("lr_scheduler"):
            text = "the schedule of the stage before goes on, of which this is a part: set reset_lr_scheduler to true"
            yield other.problem(f"train.{name}", f"{text}, or remove it")


def _scales(each: LoadedRecipe) -> Any:
    """Which scales of weights are trained in a stage; None: none."""
    quant = each.recipe.quant
    return (quant.target, quant.named_skips) if quant.learn_scales else None
