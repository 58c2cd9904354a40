"""`qft export --check-target`: what an environment loads is told before anything is written."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

from qft.documents.export import LoadCheck
from qft.errors import GateError, RecipeError
from qft.export import EXPORTERS, ExportOptions, check_target, refuse_unloadable
from qft.export.deploy import check_loads, environments
from qft.progress import View
from qft.recipe.engines import ENGINES, PACKAGES, RULES, Rule
from qft.recipe.loads import Environment
from tests.support.cli import qft
from tests.support.exports import job_of
from tests.support.paths import ROOT
from tests.support.runs import trained

DOCS = ROOT / "docs" / "deployment.md"
W4A16 = "compressed-tensors W4A16"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """An adapter on an nf4 base that computes in bfloat16."""
    return trained(tmp_path_factory.mktemp("deployment"), tiny_model, train={"max_steps": 1})


def check(weights: str, environment: str, dtype: str = "bfloat16") -> LoadCheck:
    (found,) = check_loads("target", weights, dtype, environments(environment))
    return found


def problems(text: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        environments(text)
    return [problem.removeprefix(f"--check-target {text}: ") for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("weights", "environment", "dtype", "loads"),
    [
        ("merged", "vllm=0.11.0,cuda=8.0", "bfloat16", True),
        ("merged", "vllm=0.11.0,cuda=7.5", "bfloat16", False),
        ("merged", "vllm=0.11.0,cuda=7.5", "float16", True),
        ("merged", "vllm=0.11.0,cuda=7.0", "float16", True),
        ("merged", "vllm=0.21.0,cuda=7.0", "float16", False),
        ("merged", "vllm=0.11.0,cpu", "bfloat16", True),
        ("merged", "vllm=0.1,cuda=8.0", "bfloat16", None),
        ("merged", "sglang=0.5.1,cuda=9.0", "bfloat16", True),
        ("merged", "sglang=0.5.1,cpu", "bfloat16", None),
        ("merged", "transformers=5.17,cuda=7.5", "bfloat16", True),
        ("merged", "llama.cpp,cpu", "bfloat16", False),
        ("merged", "ollama", "bfloat16", None),
        ("bnb-4bit", "transformers=5.17,cuda=6.0,bitsandbytes=0.49", "bfloat16", True),
        ("bnb-8bit", "transformers=5.17,cuda=6.0,bitsandbytes=0.49", "bfloat16", False),
        ("bnb-8bit", "transformers=5.17,cuda=7.5,bitsandbytes=0.49", "bfloat16", True),
        ("bnb-4bit", "transformers=5.17,cpu,bitsandbytes=0.48", "bfloat16", False),
        ("bnb-4bit", "vllm=0.11.0,cpu,bitsandbytes=0.49", "bfloat16", False),
        (W4A16, "vllm=0.11.0,cuda=8.0", "float16", True),
        (W4A16, "vllm=0.11.0,cuda=7.5", "float16", False),
        (W4A16, "vllm=0.23.0,cuda=7.5", "float16", True),
        (f"{W4A16} with zero points", "vllm=0.23.0,cuda=8.0", "float16", None),
        ("compressed-tensors W8A8 dynamic", "vllm=0.11.0,cuda=7.5", "float16", True),
        ("compressed-tensors W8A8 dynamic", "vllm=0.11.0,cuda=12.0", "bfloat16", False),
        ("compressed-tensors W8A8 static", "vllm=0.11.0,cpu", "bfloat16", True),
        ("compressed-tensors FP8 dynamic", "sglang=0.5.1,cuda=8.0", "bfloat16", False),
        ("compressed-tensors FP8 dynamic", "sglang=0.5.23,cuda=8.0", "bfloat16", True),
        ("gguf", "vllm=0.11.0,cuda=8.0", "bfloat16", True),
        ("gguf", "vllm=0.24.0,cuda=8.0", "bfloat16", None),
        ("gguf", "vllm=0.24.0,cuda=8.0,vllm-gguf-plugin=0.0.2", "bfloat16", True),
        ("gguf", "ollama", "bfloat16", True),
        ("gguf", "llama.cpp,cpu", "bfloat16", True),
        ("adapter on a bnb-4bit base", "vllm=0.11.0,cuda=8.0,bitsandbytes=0.46.1", "bfloat16", True),
        ("adapter on a bnb-8bit base", "vllm=0.11.0,cuda=8.0,bitsandbytes=0.46.1", "bfloat16", None),
        ("adapter on a 16-bit base, with DoRA or modules_to_save", "vllm=0.11.0,cuda=8.0", "bfloat16", False),
    ],
)
def test_an_environment_loads_what_the_sources_say(
    weights: str, environment: str, dtype: str, loads: bool | None
) -> None:
    found = check(weights, environment, dtype)
    assert found.loads is loads, found
    assert bool(found.reasons) == (loads is not True)
    assert found.loads is None or found.source


def test_what_was_not_said_and_matters_is_asked_for_and_never_assumed() -> None:
    found = check("bnb-4bit", "vllm")
    assert found.loads is None
    assert found.remedies == ["give vllm=VERSION", "give cuda=MAJOR.MINOR or cpu", "give bitsandbytes=VERSION"]
    assert check("bnb-4bit", "vllm=0.11.0,cuda=8.0,bitsandbytes").remedies[0] == "give bitsandbytes=VERSION"


def test_all_obstacles_are_told_at_once_each_with_its_remedy() -> None:
    found = check("bnb-4bit", "vllm=0.11.0,cuda=6.1,bitsandbytes=0.45")
    assert found.loads is False
    assert [reason.split(" (")[0] for reason in found.reasons] == [
        "vllm needs compute capability 7.0 for bnb-4bit, not 6.1",
        "bfloat16 needs compute capability 8.0, not 6.1: it is refused or cast to another type",
        "vllm needs bitsandbytes 0.46.1 or newer, not 0.45",
    ]
    assert "a GPU of compute capability 7.0 or newer" in found.remedies
    assert "pip install 'bitsandbytes>=0.46.1'" in found.remedies


def test_a_refusal_names_what_the_engine_does_load() -> None:
    assert check("merged", "llama.cpp,cpu").remedies == ["or export what it loads: gguf"]


def test_words_that_make_no_sense_are_refused_all_at_once() -> None:
    known = f"the engines {', '.join(ENGINES)}, the packages {', '.join(PACKAGES)}, cuda=MAJOR.MINOR and cpu"
    engines = f"give one of {', '.join(ENGINES)}"
    assert problems("tpu,vllm") == [f"tpu is not known; known are here alone, or {known}"]
    assert problems("vllm,") == [f"an empty word is not known; known are here alone, or {known}"]
    assert problems("vllm=new,cuda=8") == [
        "vllm=new is no version; give one as in vllm=0.11.0",
        "cuda=8 is no compute capability; give cuda=MAJOR.MINOR, as in cuda=8.0",
    ]
    assert problems("vllm=,cuda=8.0") == ["vllm= is no version; give one as in vllm=0.11.0"]
    assert problems("cuda=8.0") == [f"names no engine; {engines}"]
    assert problems("vllm,sglang,cpu=2,cuda=8.0") == [
        "cpu takes no value",
        f"names vllm and sglang; {engines}",
        "names cpu and cuda; give one of them",
    ]
    assert problems("vllm,vllm,cpu") == ["vllm is given twice"]


def test_here_is_every_installed_engine_on_this_machines_device() -> None:
    found = {one.engine: one for one in environments("here")}
    here = found["transformers"]
    assert here.version == version("transformers")
    assert here.packages["peft"] == version("peft")
    if not torch.cuda.is_available():
        assert here.device == "cpu"
        assert check_loads("bnb-4bit", "bnb-4bit", "bfloat16", list(found.values()))[0].loads is True


def test_here_loads_a_target_if_one_engine_does_and_asks_only_readers() -> None:
    old = Environment("vllm", "0.11.0", "7.5", here=True)
    plain = Environment("transformers", "5.24.0", "7.5", here=True)
    checks = check_loads("merged", "merged", "bfloat16", [old, plain])
    assert [(one.engine, one.loads) for one in checks] == [("vllm", False), ("transformers", True)]
    refuse_unloadable(checks)
    lacking = check_loads("bnb-4bit", "bnb-4bit", "float16", [plain])
    assert lacking[0].reasons == ["transformers needs bitsandbytes 0.46.1 or newer, not none"]
    (none,) = check_loads("gguf", "gguf", "bfloat16", [])
    assert (none.engine, none.loads) == (None, False)
    assert none.remedies == ["install one of llama.cpp, ollama, sglang, transformers, vllm"]


def test_what_cannot_be_loaded_and_what_is_not_known_are_refused_together() -> None:
    with pytest.raises(GateError) as caught:
        refuse_unloadable(
            [check("merged", "ollama"), check("merged", "vllm=0.11.0,cuda=7.5").model_copy(update={"target": "other"})]
        )
    unknown, refused = str(caught.value).splitlines()
    assert unknown.startswith("target (merged): it is not known whether it can be loaded: no source")
    assert refused.startswith("other (merged): cannot be loaded: bfloat16 needs compute capability 8.0, not 7.5")
    assert "Remedy: a GPU of compute capability 8.0" in refused


def test_every_target_and_scheme_of_a_run_has_a_format_that_some_engine_loads(run: Path) -> None:
    known = {name for rule in RULES if rule.loads for name in rule.formats}
    job = job_of(run)
    assert EXPORTERS["adapter"].weight_format(job) == "adapter on a bnb-4bit base"
    assert {exporter.weight_format(job) for exporter in EXPORTERS.values()} <= known
    found = []
    for preset in ("w4a16", "w8a16", "w8a8-dynamic", "w8a8-static", "fp8"):
        options = ExportOptions(to=("compressed-tensors",), overrides=(f"calibrate.preset={preset}",))
        found += [one.format for one in check_target(run, options, "vllm=0.11.0,cuda=9.0", View())]
    assert found == [
        f"compressed-tensors {name}" for name in ("W4A16", "W8A16", "W8A8 dynamic", "W8A8 static", "FP8 dynamic")
    ]


def test_the_command_tells_refuses_and_writes_nothing(run: Path, tmp_path: Path) -> None:
    before = sorted(path for path in run.rglob("*"))

    def ask(*more: Any) -> Any:
        return qft("export", run, "--out", tmp_path / "out", *more)

    ran = ask(
        "--to", "merged", "--to", "bnb-4bit", "--check-target", "vllm=0.11.0,cuda=7.5,bitsandbytes=0.49", "--json"
    )
    assert ran.exit_code == 4
    documents = json.loads(ran.stdout)
    assert [(one["target"], one["loads"]) for one in documents] == [("merged", False), ("bnb-4bit", False)]
    assert documents[0].keys() == LoadCheck.model_fields.keys()
    assert "merged (merged): cannot be loaded" in ran.stderr
    assert "bnb-4bit (bnb-4bit): cannot be loaded" in ran.stderr
    good = ask("--to", "merged", "--check-target", "vllm=0.11.0,cuda=8.0")
    assert good.exit_code == 0, good.stderr
    assert "yes" in good.stdout
    assert ask("--to", "merged", "--check-target", "tpu").exit_code == 2
    unknown = ask("--to", "onnx", "--check-target", "here")
    assert unknown.exit_code == 2
    assert "--to onnx: is none of" in unknown.stderr
    assert sorted(path for path in run.rglob("*")) == before
    assert not (tmp_path / "out").exists()


def row(rule: Rule) -> str:
    versions = "any" if not rule.since else f"{rule.since}+" + (f", before {rule.before}" if rule.before else "")
    gpu = "-" if rule.cuda is None else "any" if rule.cuda == "0.0" else f"{rule.cuda}+"
    gpu += f", below {rule.below}" if rule.below else ""
    cpu = {True: "yes", False: "no", None: "-"}[rule.cpu]
    if not rule.loads:
        gpu = cpu = "no"
    packages = ", ".join(f"{name} {lowest}" for name, lowest in rule.packages.items())
    cells = (rule.engine, versions, "; ".join(rule.formats), gpu, cpu, packages, rule.source)
    return "| " + " | ".join(cells) + " |"


def test_the_docs_show_the_table_as_it_is() -> None:
    shown = re.findall(rf"^\| (?:{'|'.join(map(re.escape, ENGINES))}) \|.*$", DOCS.read_text(), flags=re.MULTILINE)
    assert shown == [row(rule) for rule in RULES]


def test_every_row_is_in_words_that_the_check_knows_and_has_a_source() -> None:
    for rule in RULES:
        assert rule.engine in ENGINES
        assert rule.packages.keys() <= set(PACKAGES)
        assert re.match(r"https://|\w+ [\d.]+: ", rule.source), rule.source
        for number in (rule.since, rule.before, rule.cuda, rule.below, *rule.packages.values()):
            assert number is None or Version(number)
