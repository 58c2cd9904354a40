"""Names, patterns and indices of modules: what each matches is counted, and what matches nothing is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from qft.checkpoint.skeleton import without_contents
from qft.commands.check import planned
from qft.errors import RecipeError
from qft.model.target import parse_target
from qft.plan import make_plan, plan_calibration
from qft.recipe import load
from qft.views.terminal.plan import render_plan
from tests.support.architectures import write_model
from tests.support.cli import qft

RecipeFile = Callable[..., Path]
Models = Callable[[str], Path]


def sections(**adapter: Any) -> dict[str, Any]:
    return {"adapter": adapter}


def skips(*names: str) -> dict[str, Any]:
    return {"quant": {"preset": "finetune", "skip_modules": list(names)}}


MATCHES: list[tuple[str, dict[str, Any], dict[str, dict[str, int]]]] = [
    ("llama", sections(), {"adapter.target_modules": {"all-linear": 14}}),
    ("gpt2", sections(), {"adapter.target_modules": {"all-linear": 8}}),
    ("llama", sections(target_modules=["q_proj", "up_proj"]), {"adapter.target_modules": {"q_proj": 2, "up_proj": 2}}),
    ("llama", sections(target_modules=r".*1\.mlp\.\w+_proj"), {"adapter.target_modules": {r".*1\.mlp\.\w+_proj": 3}}),
    (
        "llama",
        sections(target_modules=r".*(mlp|attn)\.(up|q|k)_proj"),
        {"adapter.target_modules": {r".*(mlp|attn)\.(up|q|k)_proj": 6}},
    ),
    ("gpt_neox", sections(target_modules=["dense"]), {"adapter.target_modules": {"dense": 2}}),
    (
        "phi",
        sections(target_modules=["fc1", "fc2"], layers_to_transform=[1]),
        {"adapter.target_modules": {"fc1": 1, "fc2": 1}, "adapter.layers_to_transform": {"1": 2}},
    ),
    (
        "llama",
        sections(exclude_modules=["lm_head", "q_proj"], modules_to_save=["norm"]),
        {
            "adapter.exclude_modules": {"lm_head": 1, "q_proj": 2},
            "adapter.modules_to_save": {"norm": 5},
            "adapter.target_modules": {"all-linear": 12},
        },
    ),
    # The names that transformers 5 has fused are peft's to know.
    ("mixtral", sections(target_modules=["q_proj", "w2"]), {"adapter.target_modules": {"q_proj": 2, "w2": 2}}),
    (
        "llama",
        skips("up_proj", "lm_head", "model.layers.0"),
        {
            "quant.skip_modules": {"up_proj": 2, "lm_head": 1, "model.layers.0": 9},
            "adapter.target_modules": {"all-linear": 14},
        },
    ),
]


@pytest.mark.parametrize(("kind", "changes", "matched"), MATCHES)
def test_what_each_entry_matches_is_counted(
    kind: str, changes: dict[str, Any], matched: dict[str, dict[str, int]], models: Models, recipe_file: RecipeFile
) -> None:
    path = recipe_file(model={"path": str(models(kind))}, **{"quant": None} | changes)
    assert make_plan(load(path)).document().matched == matched


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "phi"])
def test_the_counts_are_those_of_the_layers_that_peft_adapts(
    kind: str, models: Models, recipe_file: RecipeFile
) -> None:
    plan = make_plan(load(recipe_file(model={"path": str(models(kind))}, quant=None)))
    adapted = get_peft_model(without_contents(plan.model.checkpoint, plan.recipe.model), LoraConfig(**plan.lora or {}))
    layers = sum(isinstance(module, BaseTunerLayer) for module in adapted.modules())
    assert plan.model.matched == {"adapter.target_modules": {"all-linear": layers}}


REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    ("llama", sections(target_modules=["q_proj", "v_porj"]), "adapter.target_modules", "did you mean v_proj"),
    ("llama", sections(target_modules="(q_proj"), "adapter.target_modules", "is no regular expression"),
    (
        "llama",
        sections(target_modules=r".*\.(q_proj|v_porj)"),
        "adapter.target_modules",
        "v_porj in .* did you mean v_proj",
    ),
    ("llama", sections(exclude_modules=r".*q_proj|.*mlp\.x"), "adapter.exclude_modules", r"mlp.*x in .* adds nothing"),
    ("llama", sections(target_modules="q_proj"), "adapter.target_modules", r"write \[q_proj\], or .\*q_proj"),
    ("llama", sections(target_modules=["q_proj", "norm"]), "adapter.target_modules", "LlamaRMSNorm"),
    ("llama", sections(target_modules=["self_attn"]), "adapter.target_modules", "LlamaAttention"),
    ("llama", sections(target_modules=[]), "adapter.target_modules", "names no module"),
    ("llama", sections(target_modules=["q_proj", ""]), "adapter.target_modules", "an empty text"),
    ("gpt2", sections(target_modules=["q_proj"]), "adapter.target_modules", "called c_attn, c_fc, c_proj, lm_head"),
    ("mixtral", sections(target_modules=["q_proj", "w1"]), "adapter.target_modules", "without also targeting w3"),
    ("mixtral", sections(target_modules=["experts"]), "adapter.target_modules", "MixtralExperts"),
    (
        "mixtral",
        sections(target_modules=["w1", "w2", "w3"], exclude_modules=["experts"]),
        "adapter.exclude_modules",
        "nevertheless",
    ),
    ("llama", sections(exclude_modules=["gate"]), "adapter.exclude_modules", "did you mean gate_proj"),
    ("llama", sections(exclude_modules=["self_attn"]), "adapter.exclude_modules", "holds no weights but"),
    ("llama", sections(exclude_modules="*proj"), "adapter.exclude_modules", "is no regular expression"),
    (
        "llama",
        sections(target_modules=["q_proj", "k_proj"], exclude_modules=["q_proj"]),
        "adapter.target_modules",
        "q_proj: exclude_modules leave none",
    ),
    (
        "llama",
        sections(target_modules=["q_proj", "down_proj"], modules_to_save=["mlp"]),
        "adapter.target_modules",
        "down_proj: modules_to_save leave none",
    ),
    ("llama", sections(modules_to_save=["lm_haed"]), "adapter.modules_to_save", "did you mean lm_head"),
    ("llama", sections(modules_to_save=["layers"]), "adapter.modules_to_save", "a list of modules"),
    ("llama", sections(modules_to_save=["rotary_emb"]), "adapter.modules_to_save", "holds no weights"),
    ("llama", sections(modules_to_save=["lm_head("]), "adapter.modules_to_save", "is no regular expression"),
    (
        "llama",
        skips() | sections(modules_to_save=["q_proj"]),
        "adapter.modules_to_save",
        "name it in quant.skip_modules",
    ),
    ("llama", skips() | sections(modules_to_save=["mlp"]), "adapter.modules_to_save", "mlp.down_proj is quantized"),
    ("llama", skips("up_porj"), "quant.skip_modules", "did you mean up_proj"),
    ("llama", skips("mlp"), "quant.skip_modules", "holds no weights but"),
    ("llama", skips("model.layers.7"), "quant.skip_modules", "nor another module"),
    ("llama", skips("*proj"), "quant.skip_modules", "is no regular expression"),
    ("llama", skips("up_proj", ""), "quant.skip_modules", "an empty text"),
]
REFUSED += [
    ("llama", sections(target_modules=["q_proj"], layers_to_transform=blocks), "adapter.layers_to_transform", text)
    for blocks, text in (([0, 2], "2: no block"), ([0, -1], "-1: no block"), ([1, 1], "2 times"), ([], "no block"))
]


@pytest.mark.parametrize(("kind", "changes", "field", "text"), REFUSED)
def test_what_matches_nothing_is_refused_at_its_line(
    kind: str, changes: dict[str, Any], field: str, text: str, models: Models, recipe_file: RecipeFile
) -> None:
    path = recipe_file(model={"path": str(models(kind))}, **changes)
    with pytest.raises(RecipeError) as caught:
        make_plan(load(path))
    name = field.partition(".")[2]
    line = next(i for i, line in enumerate(path.read_text().splitlines(), 1) if line.strip().startswith(f"{name}:"))
    [problem] = [each for each in caught.value.problems if each.startswith(f"{path}:{line}: {field}: ")]
    assert re.search(text, problem)


def test_every_wrong_entry_is_told_at_once(recipe_file: RecipeFile) -> None:
    path = recipe_file(**skips("up_porj", "up_proj") | sections(target_modules=["qproj"], exclude_modules=["vproj"]))
    with pytest.raises(RecipeError) as caught:
        make_plan(load(path))
    assert [problem.split(": ")[1] for problem in caught.value.problems] == [
        "quant.skip_modules",
        "adapter.exclude_modules",
        "adapter.target_modules",
    ]


def test_the_tied_head_is_a_module_of_the_model(tmp_path: Path, recipe_file: RecipeFile) -> None:
    tied = write_model(tmp_path / "tied", "llama", tie_word_embeddings=True)
    plan = make_plan(load(recipe_file(model={"path": str(tied)}, **skips("lm_head"))))
    assert plan.model.matched["quant.skip_modules"] == {"lm_head": 1}
    path = recipe_file(model={"path": str(tied)}, **sections(modules_to_save=["lm_head"]))
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        plan = make_plan(load(path))
    assert plan.model.matched["adapter.modules_to_save"] == {"lm_head": 1}


def test_what_is_left_of_a_calibration_is_counted_and_refused(recipe_file: RecipeFile) -> None:
    def calibration(*names: str) -> dict[str, Any]:
        return {"quant": None, "calibrate": {"engine": "rtn", "skip_modules": list(names)}}

    plan = plan_calibration(load(recipe_file(**calibration("up_proj", "layers.0.mlp.down_proj"))))
    assert plan.document().matched == {"calibrate.skip_modules": {"up_proj": 2, "layers.0.mlp.down_proj": 1}}
    path = recipe_file(**calibration("up_proj", "down_porj"))
    with pytest.raises(RecipeError, match=r"recipe.yaml:\d+: calibrate.skip_modules: down_porj .* down_proj"):
        plan_calibration(load(path))


def test_an_evaluation_reads_the_recipes_names_too(recipe_file: RecipeFile) -> None:
    target = parse_target(str(recipe_file(**skips("up_porj"))), adapter=None, data=None)
    with pytest.raises(RecipeError, match=r"recipe.yaml:\d+: quant.skip_modules: up_porj"):
        target.plan()


def test_check_tells_the_counts(recipe_file: RecipeFile) -> None:
    path = recipe_file(**skips("up_proj") | sections(target_modules=["q_proj", "v_proj"]))
    told = qft("check", path)
    assert told.exit_code == 0
    assert re.search(r"target_modules +q_proj: 2, v_proj: 2", told.output)
    assert re.search(r"skip_modules +up_proj: 2", told.output)
    assert render_plan(planned(load(path)))
