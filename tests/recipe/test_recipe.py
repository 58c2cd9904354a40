"""Recipe file and overrides -> a Recipe, or every problem at once by file, line and field."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from qft.errors import RecipeError
from qft.recipe import Recipe, load
from qft.recipe.load import from_values
from qft.recipe.training import AdapterSection
from tests.support.paths import ROOT

MINIMAL = "model: {path: org/model}\ndata: {train: rows.jsonl}\noutput_dir: run\n"
FILE = Path("recipe.yaml")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test works in an empty folder, so that messages name its file as it is given."""
    monkeypatch.chdir(tmp_path)


def write(text: str) -> Path:
    FILE.write_text(text, encoding="utf-8")
    return FILE


def recipe(text: str = MINIMAL, *overrides: str) -> Recipe:
    return load(write(text), overrides).recipe


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(write(text), overrides)
    assert caught.value.exit_code == 2
    return caught.value.problems


def test_the_smallest_recipe_is_clean_and_takes_every_default() -> None:
    assert recipe() == Recipe.model_validate(
        {"model": {"path": "org/model"}, "data": {"train": str(Path("rows.jsonl").absolute())},
         "output_dir": str(Path("run").absolute())}
    )  # fmt: skip


def test_all_problems_are_reported_at_once_in_the_order_of_their_lines() -> None:
    text = """\
model:
  pth: org/model
  dtype: fp16
seeed: 3
data:
  train:
    - rows.jsonl
    - {path: more.jsonl, wieght: 2}
train:
  max_steps: "3"
  learning_rate: -1
adapter: {r: 1.5}
"""
    assert problems(text) == [
        "recipe.yaml:1: model.path: this field is needed",
        "recipe.yaml:1: output_dir: this field is needed",
        "recipe.yaml:2: model.pth: unknown field, did you mean path?",
        "recipe.yaml:3: model.dtype: should be 'float32', 'bfloat16', 'float16' or 'auto', not 'fp16'",
        "recipe.yaml:4: seeed: unknown field, did you mean seed?",
        "recipe.yaml:8: data.train.1.wieght: unknown field, did you mean weight?",
        "recipe.yaml:10: train.max_steps: should be a valid integer, not '3'",
        "recipe.yaml:11: train.learning_rate: should be greater than 0, not -1",
        "recipe.yaml:12: adapter.r: should be a valid integer, not 1.5",
    ]


def test_an_unknown_field_of_a_bare_source_is_named_without_an_index() -> None:
    text = "model: {path: org/model}\noutput_dir: run\ndata:\n  train:\n    path: rows.jsonl\n    fromat: text\n"
    assert problems(text) == ["recipe.yaml:6: data.train.fromat: unknown field, did you mean format?"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("extend: base.yaml", "extend: unknown field, did you mean extends?"),
        ("qunat: {mode: 4bit}", "qunat: unknown field, did you mean quant?"),
        ("train: {xyzzy: 1}", "train.xyzzy: unknown field"),
        ("adapter: {lora_r: 4}", "adapter.lora_r: unknown field, did you mean r?"),
        ("train: {lr: 1e-4}", "train.lr: unknown field, did you mean learning_rate?"),
        ("eval: {lr: 1e-4}", "eval.lr: unknown field"),
    ],
)
def test_an_unknown_field_comes_with_a_close_name_if_there_is_one(line: str, message: str) -> None:
    assert problems(MINIMAL + line) == [f"recipe.yaml:4: {message}"]


@pytest.mark.parametrize(
    "change",
    [
        "train.max_steps='3'", "train.max_steps=true", "train.max_steps=3.0", "train.learning_rate='1e-4'",
        "train.learning_rate=true", "train.learning_rate=.inf", "train.learning_rate=.nan", "train.fp16=1",
        "train.fp16='true'", "train.bf16=1", "train.run_name=3", "train.report_to=tensorboard", "seed=true", "seed=-1",
        "seed=4294967296", "adapter.lora_dropout=1", "adapter.r=0", "adapter.layers_to_transform=1",
        "quant.skip_modules={a: b}", "quant.preset=[finetune]", "data.train=[]", "data.train=null", "model.path=''",
        "output_dir=''", "adapter.init_lora_weights=pissa_niter_", "model=org/model", "train=[]",
    ],
)  # fmt: skip
def test_a_value_of_another_type_or_range_is_an_error_and_never_converted(change: str) -> None:
    field = change.partition("=")[0]
    [problem] = problems(MINIMAL, change)
    assert problem.startswith(f"--set {field}: {field}: should be ")


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ("adapter.layers_to_transform=[0, '3']", "adapter.layers_to_transform.1"),
        ("adapter.target_modules=[q_proj, 3]", "adapter.target_modules.1"),
        ("train.report_to=[wandb, none]", "train.report_to.1"),
        ("data.train=[rows.jsonl, 3]", "data.train.1"),
        ("data.train={path: rows.jsonl, weight: 0}", "data.train.weight"),
        ("data.eval=[{format: text}]", "data.eval.0.path"),
    ],
)
def test_a_wrong_item_of_a_list_is_reported_by_itself(change: str, place: str) -> None:
    [problem] = problems(MINIMAL, change)
    assert problem.startswith(f"--set {change.partition('=')[0]}: {place}: ")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("adapter: {target_modules: 3}", "adapter.target_modules: should be a valid string or a valid list, not 3"),
        ("train: {bf16: maybe}", "train.bf16: should be a valid boolean or 'auto', not 'maybe'"),
        ("quant: {mode: 4bit, compute_dtype: 16}",
         "quant.compute_dtype: should be 'float32', 'bfloat16', 'float16' or 'auto', not 16"),
    ],
)  # fmt: skip
def test_a_field_of_several_types_gives_one_readable_line(line: str, message: str) -> None:
    assert problems(MINIMAL + line) == [f"recipe.yaml:4: {message}"]


def test_a_long_value_is_not_repeated_in_full() -> None:
    [problem] = problems(MINIMAL + f"train: {list(range(5000))}")
    assert len(problem) < 250


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("train: {eval_strategy: no}", "no"), ("train: {save_strategy: off}", "off"), ("model: {path: on}", "on"),
        ("train: {report_to: [yes]}", "yes"),
    ],
)  # fmt: skip
def test_a_bare_boolean_where_a_word_is_wanted_comes_with_the_advice_to_quote(line: str, word: str) -> None:
    [problem] = problems((MINIMAL if "path" not in line else MINIMAL.partition("\n")[2]) + line)
    assert re.search(rf"\(a bare .*\b{word}\b.* is a boolean in YAML: put it in quotes", problem)


def test_a_later_problem_is_placed_where_its_field_was_written_or_in_its_section() -> None:
    loaded = load(write(MINIMAL + "train:\n  max_steps: 3\nseed: 1\n"), ["train.optim=sgd", "eval.metrics=[]"])
    assert loaded.problem("train.max_steps", "no") == "recipe.yaml:5: train.max_steps: no"
    assert loaded.problem("train.bf16", "no") == "recipe.yaml:4: train.bf16: no"
    assert loaded.problem("train.optim", "no") == "--set train.optim: train.optim: no"
    assert loaded.problem("eval.samples", "no") == "--set eval.metrics: eval.samples: no"
    assert loaded.problem("seed", "no") == "recipe.yaml:6: seed: no"


def test_overrides_win_over_the_file_and_the_last_over_the_others() -> None:
    found = recipe(MINIMAL + "train: {max_steps: 1, weight_decay: 0.5}\n", "train.max_steps=2", "train.max_steps=3")
    assert (found.train.max_steps, found.train.weight_decay) == (3, 0.5)


def test_an_override_mends_the_file() -> None:
    assert recipe(MINIMAL + "train: 5\nseed: x\n", "train={max_steps: 2}", "seed=1").train.max_steps == 2


def test_the_problems_of_all_overrides_are_reported_with_those_of_the_file() -> None:
    assert problems(MINIMAL + "seed: x\n", "trian.max_steps=1", "train.max_stesp=1", "a.b.c=1", "eval.samples=0") == [
        "--set a.b.c: a: unknown field",
        "--set eval.samples: eval.samples: should be greater than or equal to 1, not 0",
        "--set train.max_stesp: train.max_stesp: unknown field, did you mean max_steps?",
        "--set trian.max_steps: trian: unknown field, did you mean train?",
        "recipe.yaml:4: seed: should be a valid integer, not 'x'",
    ]


@pytest.mark.parametrize("text", ["train", "=3", "train.=3", ".train=3", "a..b=3", "a b=3", "train-x=3", ""])
def test_an_override_that_is_no_assignment_is_refused(text: str) -> None:
    assert problems(MINIMAL, text) == [f"--set {text}: write section.field=value"]


@pytest.mark.parametrize("value", ["[1", "a: b: c", "!!python/object/apply:os.system ls", "1\nother: 2", "*x"])
def test_an_override_that_is_no_value_is_refused_by_its_field(value: str) -> None:
    [problem] = problems(MINIMAL, f"seed={value}")
    assert re.match(r"--set seed: \D", problem)


PRESETS = {"inference": ("4bit", "fp4", "float32", False), "finetune": ("4bit", "nf4", "bfloat16", True)}


def quant(*overrides: str) -> tuple[object, ...]:
    found = recipe(MINIMAL, *overrides).quant
    return found.mode, found.quant_type, found.compute_dtype, found.double_quant


def test_a_recipe_that_no_file_holds_takes_its_preset() -> None:
    quant = from_values({"model": {"path": "m"}, "quant": {"preset": "finetune"}, "output_dir": "-"}).recipe.quant
    assert (quant.mode, quant.quant_type, quant.compute_dtype, quant.double_quant) == PRESETS["finetune"]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_gives_its_values_and_no_others(preset: str) -> None:
    assert quant(f"quant.preset={preset}") == PRESETS[preset]
    plain = recipe(MINIMAL, "quant.mode=4bit").quant
    fields = dict(zip(["mode", "quant_type", "compute_dtype", "double_quant"], PRESETS[preset], strict=True))
    assert recipe(MINIMAL, f"quant.preset={preset}").quant == plain.model_copy(update={"preset": preset, **fields})


@pytest.mark.parametrize("preset", PRESETS)
def test_explicit_fields_win_over_the_preset(preset: str) -> None:
    changes = ["quant.compute_dtype=float16", "quant.double_quant=true", "quant.mode=4bit"]
    assert quant(f"quant.preset={preset}", *changes) == ("4bit", PRESETS[preset][1], "float16", True)


def test_fields_of_a_preset_count_as_given_and_stand_where_it_stands() -> None:
    loaded = load(write(MINIMAL + "quant:\n  preset: finetune\n"))
    given = [name for name in type(loaded.recipe.quant).model_fields if loaded.given(f"quant.{name}")]
    assert given == ["preset", "mode", "quant_type", "double_quant", "compute_dtype"]
    assert loaded.problem("quant.mode", "no") == "recipe.yaml:5: quant.mode: no"


HELD_OUT = "data.eval_fraction=0.1"
STEPS = (HELD_OUT, "train.eval_strategy=steps", "train.eval_steps=4", "train.save_strategy=steps")
BEST = "train.load_best_model_at_end=true"
UNREAD_ADAPTER = [
    (["adapter.kind=none", f"adapter.{name}={json.dumps(value)}"], f"adapter.{name}")
    for name, value in AdapterSection().model_dump(mode="json").items()
    if name != "kind"
]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        (["quant.quant_type=nf4"], "quant.quant_type"),
        (["quant.mode=8bit", "quant.double_quant=true"], "quant.double_quant"),
        (["quant.mode=8bit", "quant.compute_dtype=auto"], "quant.compute_dtype"),
        (["quant.quant_storage=uint8"], "quant.quant_storage"),
        (["quant.mode=4bit", "quant.threshold=6.0"], "quant.threshold"),
        (["quant.skip_modules=[]"], "quant.skip_modules"),
        *UNREAD_ADAPTER,
        (["train.eval_steps=4"], "train.eval_steps"),
        ([HELD_OUT, "train.eval_strategy=epoch", "train.eval_steps=4"], "train.eval_steps"),
        (["train.save_steps=4"], "train.save_steps"),
        (["train.save_strategy='no'", "train.save_total_limit=2"], "train.save_total_limit"),
        (["eval.max_new_tokens=9"], "eval.max_new_tokens"),
        (["eval.batch_size=9"], "eval.batch_size"),
        (["eval.samples=9"], "eval.samples"),
        (["eval.harness_limit=9"], "eval.harness_limit"),
        (["eval.harness=[arc_easy]", "eval.samples=9"], "eval.samples"),
        (["quant.preset=finetune", "quant.mode=8bit"], "quant.preset"),
        (["quant.preset=inference", "quant.mode=none"], "quant.preset"),
        (["quant.mode=4bit", "adapter.kind=none"], "adapter.kind"),
        (["quant.mode=8bit", "adapter.kind=none"], "adapter.kind"),
        (["quant.mode=4bit", "train.torch_compile=true"], "train.torch_compile"),
        (["quant.mode=8bit", "train.torch_compile=true"], "train.torch_compile"),
        (["adapter.init_lora_weights=loftq"], "adapter.init_lora_weights"),
        (["quant.mode=8bit", "adapter.init_lora_weights=loftq"], "adapter.init_lora_weights"),
        (["quant.mode=4bit", "adapter.init_lora_weights=pissa"], "adapter.init_lora_weights"),
        (["quant.mode=4bit", "adapter.init_lora_weights=pissa_niter_4"], "adapter.init_lora_weights"),
        (["quant.mode=8bit", "adapter.init_lora_weights=olora"], "adapter.init_lora_weights"),
        (["adapter.layers_to_transform=[0]"], "adapter.layers_to_transform"),
        (["data.eval=e.jsonl", HELD_OUT], "data.eval_fraction"),
        (["data.train={path: t.jsonl, split: test}"], "data.train.0.split"),
        (["data.train={path: t.parquet, split: 'train[:9]'}"], "data.train.0.split"),
        (["data.train={path: t.csv, name: small}"], "data.train.0.name"),
        (["data.train={path: t.jsonl, revision: main}"], "data.train.0.revision"),
        (["data.train={path: a/b, sample_by: document}"], "data.train.0.sample_by"),
        (["train.eval_strategy=epoch"], "train.eval_strategy"),
        (["eval.metrics=[exact_match]"], "eval.metrics"),
        (["train.fp16=true", "train.bf16=true"], "train.fp16"),
        (["adapter.kind=none", "model.dtype=float16"], "model.dtype"),
        (["train.max_steps=0"], "train.max_steps"),
        ([HELD_OUT, "train.eval_strategy=steps", "train.save_strategy=steps", BEST], "train.eval_strategy"),
        (["train.early_stopping_patience=2"], "train.early_stopping_patience"),
        (["train.save_strategy='no'", BEST], "train.load_best_model_at_end"),
        ([HELD_OUT, "train.eval_strategy=epoch", "train.save_strategy='no'", BEST], "train.load_best_model_at_end"),
        ([*STEPS, "train.save_steps=6", BEST], "train.load_best_model_at_end"),
    ],
)  # fmt: skip
def test_a_broken_rule_is_reported_at_its_field(changes: list[str], field: str) -> None:
    assert [problem.split(": ")[1] for problem in problems(MINIMAL, *changes)] == [field]


@pytest.mark.parametrize(
    "changes",
    [
        ["quant.mode=8bit", "quant.threshold=5", "quant.skip_modules=[a]"],
        ["quant.mode=4bit", "quant.quant_storage=bfloat16", "adapter.init_lora_weights=loftq"],
        ["adapter.init_lora_weights=pissa_niter_4", "train.torch_compile=true"],
        ["adapter.target_modules=[a]", "adapter.layers_to_transform=[0]"],
        ["adapter.kind=none", "train.fp16=true", "model.dtype=float32"],
        ["model.dtype=float16"],
        ["train.fp16=true", "train.bf16=false"],
        ["train.fp16=false", "train.bf16=true"],
        ["train.max_steps=-1", "train.num_train_epochs=2"],
        ["train.save_strategy='no'"],
        ["data.eval=e.jsonl", "train.eval_strategy=epoch", BEST, "train.early_stopping_patience=2"],
        ["data.train={path: a/b, split: 'train[:9]', name: small, revision: main}"],
        ["data.train={path: t.jsonl, split: train}", "data.eval={path: t.txt, sample_by: document}"],
        [*STEPS, "train.save_steps=8", BEST],
        [HELD_OUT, "eval.metrics=[exact_match]", "eval.samples=9"],
        [HELD_OUT, "eval.metrics=[exact_match]", "eval.batch_size=9"],
        ["eval.harness=[arc_easy]", "eval.harness_limit=9", "eval.batch_size=9"],
    ],
)
def test_what_the_rules_ask_for_is_accepted(changes: list[str]) -> None:
    assert isinstance(recipe(MINIMAL, *changes), Recipe)


def test_what_is_wrong_of_all_files_of_a_folder_is_told_once(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.jsonl").touch()
    assert len(problems(MINIMAL, f"data.train={{path: {tmp_path}, split: test}}")) == 1


def test_all_broken_rules_are_reported_at_once_in_the_order_of_their_lines() -> None:
    text = "train:\n  max_steps: 0\n  eval_steps: 3\neval:\n  samples: 3\n\nadapter: {init_lora_weights: loftq}\n"
    assert [problem.split(": ")[:2] for problem in problems(MINIMAL + text)] == [
        ["recipe.yaml:5", "train.max_steps"],
        ["recipe.yaml:6", "train.eval_steps"],
        ["recipe.yaml:8", "eval.samples"],
        ["recipe.yaml:10", "adapter.init_lora_weights"],
    ]


def sections(model: type[BaseModel] = Recipe) -> set[type[BaseModel]]:
    inner = {a for f in model.model_fields.values() for a in (f.annotation, *get_args(f.annotation))}
    return {model}.union(*(sections(a) for a in inner if isinstance(a, type) and issubclass(a, BaseModel)))


def test_every_field_is_described() -> None:
    assert {section.__name__ for section in sections()} >= {"Recipe", "TrainSection", "Source", "EvalSection"}
    for section in sections():
        named = {name for name, field in section.model_fields.items() if not field.description}
        assert named <= (
            {"model", "quant", "adapter", "data", "train", "memory", "distributed", "eval", "calibrate", "export"}
            if section is Recipe
            else set()
        )
        assert section.__doc__


def test_a_recipe_does_not_change() -> None:
    found = recipe()
    with pytest.raises(ValidationError):
        found.seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError):
        found.train.max_steps = 1  # type: ignore[misc]
    assert hash(found) == hash(recipe())


def test_the_json_schema_accepts_recipes_and_refuses_unknown_fields() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(Recipe.model_json_schema())
    shipped = {
        "model": {"path": "org/model", "dtype": "bfloat16"},
        "quant": {"preset": "finetune", "skip_modules": ["lm_head"]},
        "adapter": {"r": 8, "target_modules": ["q_proj"]},
        "data": {"train": ["a.jsonl", {"path": "b.jsonl", "weight": 2}], "eval": "e.jsonl"},
        "train": {"learning_rate": 1e-4, "bf16": True, "save_total_limit": None},
        "output_dir": "run",
    }
    for accepted in (shipped, yaml.safe_load(MINIMAL)):
        assert not list(validator.iter_errors(accepted))
    for section, value in {"trian": {}, "train": {"max_stesp": 1}, "seed": "x", "model": {}}.items():
        assert list(validator.iter_errors({**shipped, section: value})), section


def test_importing_the_recipe_imports_no_heavy_library() -> None:
    code = "import sys, qft.recipe; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["torch", "transformers", "datasets", "peft", "bitsandbytes", "numpy"]
    ran = subprocess.run([sys.executable, "-c", code, *heavy], cwd=ROOT, check=True, capture_output=True, text=True)
    assert ran.stdout.strip() == "[]"
