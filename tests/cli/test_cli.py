"""The command line: what it prints where, and its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from qft import __version__
from tests.support.cli import qft
from tests.support.paths import ROOT
from tests.support.rows import chat, write_jsonl

RecipeFile = Callable[..., Path]


def python(code: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def test_help_imports_nothing_heavy() -> None:
    """Which is what keeps it under 0.4 s."""
    code = (
        "import sys; sys.argv = ['qft', '--help']\n"
        "from qft.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'peft', 'pydantic', 'yaml', 'numpy'} & set(sys.modules)))"
    )
    assert python(code).splitlines()[-1] == "[]"


def test_a_bad_recipe_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    """Which is what keeps it under 1 s."""
    (tmp_path / "bad.yaml").write_text("model: {path: a/b}\n")
    code = (
        f"import sys; sys.argv = ['qft', 'check', {str(tmp_path / 'bad.yaml')!r}]\n"
        "from qft.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: print(end.code, sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert python(code).splitlines()[-1] == "2 []"


def test_it_runs_as_a_module_and_prints_the_versions_that_matter() -> None:
    command = [sys.executable, "-m", "qft", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    names = {line.split()[0] for line in done.stdout.splitlines()}
    assert {"qft", "torch", "cuda", "transformers", "bitsandbytes", "peft", "gpu"} <= names
    assert __version__ in done.stdout


def test_shell_completion_is_offered() -> None:
    command = [sys.executable, "-c", "import sys; sys.argv = ['qft']; from qft.cli import main; main()"]
    environment = os.environ | {"_QFT_COMPLETE": "complete_bash", "COMP_WORDS": "qft ch", "COMP_CWORD": "1"}
    help_text = qft("--help").stdout
    assert "--install-completion" in help_text
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["check", "chat"]


def broken_line(path: Path) -> None:
    path.write_text('{"messages": [}\n')


@pytest.mark.parametrize(
    ("sections", "code", "message"),
    [
        ({"train": {"learning_rat": 1e-3}}, 2, "train.learning_rat: unknown field, did you mean learning_rate?"),
        ({"model": {"dtype": "fp16"}}, 2, "model.dtype: should be"),
        ({"adapter": {"kind": "none", "r": ...}}, 2, "adapter.kind: quantized weights cannot be trained themselves"),
        ({"train": {"tf32": True}}, 2, "train.tf32"),
        ({"data": {"train": "missing.jsonl"}}, 3, "missing.jsonl: no such data file"),
        ({"model": {"path": "/no/such/model"}}, 3, "/no/such/model does not exist"),
        ({"data": {"train": "broken.jsonl"}}, 5, "broken.jsonl:1: not valid JSON"),
        ({"data": {"max_length": 20}}, 5, "tokens, and data.max_length is 20"),
        ({"output_dir": "."}, 7, "output_dir is not empty"),
    ],
)
def test_each_mistake_is_one_message_and_its_own_exit_code(
    sections: dict[str, Any], code: int, message: str, recipe_file: RecipeFile, tmp_path: Path
) -> None:
    broken_line(tmp_path / "broken.jsonl")
    before = sorted(tmp_path.rglob("*"))
    path = recipe_file(**sections)
    result = qft("train", path)
    assert result.exit_code == code
    assert result.stdout.replace("Reading the data and the model's configuration\n", "") == ""
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(tmp_path.rglob("*")) == sorted([*before, path])


def test_a_duplicate_key_is_refused_with_its_line(recipe_file: RecipeFile) -> None:
    path = recipe_file()
    path.write_text(path.read_text() + "seed: 1\nseed: 2\n")
    lines = path.read_text().splitlines()
    result = qft("check", path)
    assert result.exit_code == 2
    assert f"{path}:{len(lines)}: seed: given twice" in result.stderr


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    result = qft("check", tmp_path / "none.yaml")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "none.yaml: no such recipe" in result.stderr


def test_debug_shows_where_an_error_comes_from(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qft", "check", str(tmp_path / "none.yaml"), "--debug"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "Traceback" in done.stderr


def test_check_loads_and_writes_nothing_and_prints_the_plan(recipe_file: RecipeFile, tmp_path: Path) -> None:
    path = recipe_file()
    before = sorted(tmp_path.rglob("*"))
    shown = qft("check", path)
    assert shown.exit_code == 0
    assert "LoRA r=4 on all-linear" in shown.stdout
    facts = json.loads(qft("check", path, "--json").stdout)
    assert facts["steps"] == 2
    assert facts["quantization"]["bnb_4bit_quant_type"] == "nf4"
    assert facts["data"]["sources"][0]["format"] == "messages"
    assert sorted(tmp_path.rglob("*")) == before


def test_check_says_what_the_model_would_be(recipe_file: RecipeFile) -> None:
    """Counted on the meta device, and equal to what a real model has."""
    from qft.model.adapter import attach_adapter
    from qft.model.load import load_base
    from qft.plan import make_plan
    from qft.recipe import load

    plan = make_plan(load(recipe_file(quant=None)))
    model = attach_adapter(load_base(plan.model), plan)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan.model.shape.trainable_parameters == trainable
    assert plan.model.shape.parameters == sum(p.numel() for p in model.parameters()) - trainable


def test_train_prints_one_json_document_and_nothing_else(recipe_file: RecipeFile, tmp_path: Path) -> None:
    result = qft("train", recipe_file(), "--json")
    document = json.loads(result.stdout)
    assert "step 2/2" in result.stderr
    assert document == json.loads((tmp_path / "run" / "report.json").read_text())
    Draft202012Validator(json.loads(qft("schema", "report").stdout)).validate(document)
    for path in (
        "throughput.tokens_per_second",
        "throughput.samples_per_second",
        "memory.peak_gpu_bytes",
        "memory.peak_host_bytes",
        "memory.components",
        "loss.first",
        "loss.last",
        "eval.before",
        "eval.after",
        "steps",
        "tokens",
        "wall_seconds",
    ):
        value = document
        for key in path.split("."):
            value = value[key]


def test_train_speaks_in_lines_where_there_is_no_terminal_and_is_quiet_on_request(
    recipe_file: RecipeFile, tmp_path: Path
) -> None:
    spoken = qft("train", recipe_file())
    assert spoken.exit_code == 0
    assert "step 2/2  loss" in spoken.stdout
    assert "Memory" in spoken.stdout
    assert "\x1b[" not in spoken.stdout
    quiet = qft("train", recipe_file(), "--overwrite", "--quiet")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")
    again = qft("report", tmp_path / "run")
    assert "held as" in again.stdout
    assert json.loads(qft("report", tmp_path / "run", "--json").stdout)["steps"] == 2
    assert qft("report", tmp_path / "run", "--svg", tmp_path / "report.svg").exit_code == 0
    assert (tmp_path / "report.svg").read_text().startswith("<svg")


def test_report_of_what_is_no_run(tmp_path: Path) -> None:
    assert qft("report", tmp_path).exit_code == 3
    (tmp_path / "report.json").write_text("{}")
    assert qft("report", tmp_path).exit_code == 7


def test_resume_and_overwrite_exclude_each_other(recipe_file: RecipeFile) -> None:
    assert qft("train", recipe_file(), "--resume", "--overwrite").exit_code == 2


def test_set_overrides_the_file(recipe_file: RecipeFile) -> None:
    facts = json.loads(
        qft("check", recipe_file(), "--json", "--set", "train.max_steps=9", "--set", "adapter.r=2").stdout
    )
    assert (facts["steps"], facts["adapter"]["r"]) == (9, 2)


def test_init_writes_a_recipe_that_passes_check(tiny_model: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [chat("a", "b")] * 40)
    path = tmp_path / "new" / "mine.yaml"
    assert qft("init", path, "--model", tiny_model, "--data", rows).exit_code == 0
    assert path.read_text().startswith("# yaml-language-server: $schema=recipe.schema.json")
    assert qft("check", path, "--set", "model.device=cpu").exit_code == 0
    text = path.read_text()
    assert qft("init", path, "--model", tiny_model, "--data", rows).exit_code == 2
    assert path.read_text() == text
    assert qft("init", tmp_path / "other.yaml", "--model", "org/m", "--data", tmp_path / "no.jsonl").exit_code == 3


def test_schema_knows_its_documents() -> None:
    assert "extends" in json.loads(qft("schema").stdout)["properties"]
    assert qft("schema", "nothing").exit_code == 2
