"""`qft serve`: the command line fits what is served, and nothing is served that no gate has passed."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from qft.documents.export import ExportDocument, Gate
from qft.documents.manifest import Base, Manifest
from qft.documents.registry import VersionManifest
from qft.registry import add, promote
from tests.support.cli import qft
from tests.support.forked import command, ended


def artifact(folder: Path, target: str, *, passed: bool | None = True, config: Any = None, name: str = "") -> Path:
    """An export as far as `qft serve` reads it."""
    folder.mkdir(parents=True)
    (folder / (name or "config.json")).write_text(json.dumps(config or {"max_position_embeddings": 2048}))
    document = ExportDocument(
        target=target,
        path=str(folder),
        run="run",
        passed=passed,
        bytes=1,
        sha256={},
        base=Base(path="base"),
        merge_into=None,
        dtype="bfloat16",
        gate=Gate(passed=passed, engine="transformers", rows=1, tokens=1, checks=[]),
        versions={},
    )
    (folder / "export.json").write_text(json.dumps(document.model_dump(mode="json")))
    return folder


def gguf(file: Path, context: int) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(str(file), "llama")
    writer.add_context_length(context)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def line(*words: object) -> list[str]:
    ran = qft("serve", *words)
    assert ran.exit_code == 0, ran.stderr
    return shlex.split(ran.stdout)


def value(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def test_a_merged_model_is_served_by_vllm_with_its_template_and_room(tmp_path: Path) -> None:
    folder = artifact(tmp_path / "a run" / "export" / "merged", "merged")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    words = line(folder, "--port", 9000)
    assert words[:3] == ["vllm", "serve", str(folder)]
    assert value(words, "--served-model-name") == "a run-merged"
    assert value(words, "--chat-template") == str(folder / "chat_template.jinja")
    assert value(words, "--dtype") == "bfloat16"
    assert value(words, "--max-model-len") == "2048"
    assert value(words, "--port") == "9000"
    assert "--enable-lora" not in words
    assert line(folder, "--", "--enforce-eager", "--seed", 3)[-3:] == ["--enforce-eager", "--seed", "3"]
    assert value(line(folder, "--context", 512, "--name", "mine"), "--max-model-len") == "512"


@pytest.mark.parametrize(
    ("config", "room"),
    [
        ({"n_positions": 1024}, "1024"),
        ({"text_config": {"max_position_embeddings": 64}, "max_position_embeddings": 7}, "64"),
        ({"model_type": "mamba"}, None),
    ],
)
def test_the_context_is_what_the_model_was_built_for(config: Any, room: str | None, tmp_path: Path) -> None:
    words = line(artifact(tmp_path / "merged", "merged", config=config))
    assert (value(words, "--max-model-len") if room else None) == room
    assert ("--max-model-len" in words) == (room is not None)


def test_an_adapter_is_served_on_its_base_with_its_own_tokenizer(tmp_path: Path) -> None:
    base = artifact(tmp_path / "base", "merged", config={"max_position_embeddings": 300})
    config = {"base_model_name_or_path": str(base), "r": 4, "rank_pattern": {"q_proj": 24}}
    folder = artifact(tmp_path / "adapter", "adapter", config=config, name="adapter_config.json")
    assert "--tokenizer" not in line(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    words = line(folder, "--name", "mine")
    assert words[:3] == ["vllm", "serve", str(base)]
    assert value(words, "--tokenizer") == str(folder)
    assert value(words, "--lora-modules") == f"mine={folder}"
    assert value(words, "--max-lora-rank") == "32"
    assert value(words, "--max-model-len") == "300"
    by_hub = config | {"base_model_name_or_path": "some/model", "revision": "abc"}
    words = line(artifact(tmp_path / "hub", "adapter", config=by_hub, name="adapter_config.json"))
    assert words[2] == "some/model"
    assert value(words, "--revision") == "abc"


def test_a_gguf_file_is_served_by_llamacpp_or_ollama(tmp_path: Path) -> None:
    folder = artifact(tmp_path / "gguf", "gguf", name="Modelfile")
    gguf(folder / "mine-q8_0.gguf", 4096)
    (folder / "Modelfile").write_text("FROM ./mine-q8_0.gguf\nTEMPLATE x\n")
    words = line(folder, "--name", "mine")
    assert words[:3] == ["llama-server", "-m", str(folder / "mine-q8_0.gguf")]
    assert "--jinja" in words
    assert (value(words, "--alias"), value(words, "--ctx-size"), value(words, "--parallel")) == ("mine", "4096", "1")
    words = line(folder, "--context", 128, "--", "-np", 4)
    assert (value(words, "--ctx-size"), value(words, "-np"), "--parallel" in words) == ("512", "4", False)
    ran = qft("serve", folder, "--engine", "ollama", "--context", 128)
    assert ran.stdout == f"FROM {folder / 'mine-q8_0.gguf'}\nTEMPLATE x\nPARAMETER num_ctx 128\n"
    assert "ollama create" in ran.stderr
    for unread in (("--port", 9000), ("--trust-remote-code",), ("--", "--verbose")):
        assert qft("serve", folder, "--engine", "ollama", *unread).exit_code == 2


ODD = 'it\'s "a, b"; $x = {é} #1 😀'


def test_signs_of_a_path_reach_the_engine_as_they_are(tmp_path: Path) -> None:
    base = artifact(tmp_path / ODD / "base", "merged")
    assert line(base, "--name", ODD)[2] == str(base)
    assert value(line(base, "--name", ODD), "--served-model-name") == ODD
    config = {"base_model_name_or_path": str(base), "r": 4}
    folder = artifact(tmp_path / ODD / "adapter", "adapter", config=config, name="adapter_config.json")
    module = value(line(folder, "--name", ODD), "--lora-modules")
    assert json.loads(module) == {"name": ODD, "path": str(folder)}

    folder = artifact(tmp_path / ODD / "gguf", "gguf", name="Modelfile")
    gguf(folder / "a b.gguf", 64)
    (folder / "Modelfile").write_text("FROM ./a b.gguf\nTEMPLATE x\n")
    assert value(line(folder), "-m") == str(folder / "a b.gguf")
    ran = qft("serve", folder, "--engine", "ollama", "--name", "me/orders:v2")
    assert ran.stdout.splitlines()[0] == f"FROM {folder / 'a b.gguf'}"


@pytest.mark.parametrize(
    ("engine", "name"),
    [
        *(("vllm", name) for name in ("-O3", "", "a\nb")),
        *(("llama.cpp", name) for name in ("a,b", " a", "--help")),
        *(("ollama", name) for name in ("a b", "é", "-a", "a/b/c/d", "a:b:c", "a" * 81)),
    ],
)
def test_a_name_that_an_engine_would_take_for_another_is_refused(engine: str, name: str, tmp_path: Path) -> None:
    folder = artifact(tmp_path / "it", "gguf", name="config.json" if engine == "vllm" else "Modelfile")
    if engine != "vllm":
        gguf(folder / "it.gguf", 64)
    ran = qft("serve", folder, "--engine", engine, f"--name={name}")
    assert (ran.exit_code, ran.stdout, "give one by --name" in " ".join(ran.stderr.split())) == (2, "", True)


def test_a_modelfile_of_another_file_and_a_path_that_none_can_hold(tmp_path: Path) -> None:
    folder = artifact(tmp_path / "a\u00a0b", "gguf", name="Modelfile")
    gguf(folder / "it.gguf", 64)
    (folder / "Modelfile").write_text("FROM ./it.gguf\n")
    assert "no Modelfile can hold this path" in qft("serve", folder, "--engine", "ollama", "--name", "it").stderr
    folder = folder.rename(tmp_path / "it")
    (folder / "Modelfile").write_text("FROM ./other.gguf\n")
    ran = qft("serve", folder, "--engine", "ollama")
    assert (ran.exit_code, "is it of another file" in " ".join(ran.stderr.split())) == (6, True)


@pytest.mark.parametrize("more", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}])
def test_an_adapter_that_vllm_cannot_put_on_is_refused(more: dict[str, Any], tmp_path: Path) -> None:
    config = {"base_model_name_or_path": "some/model", "r": 4} | more
    ran = qft("serve", artifact(tmp_path / "it", "adapter", config=config, name="adapter_config.json"))
    assert (ran.exit_code, next(iter(more)) in ran.stderr, "export --to merged" in ran.stderr) == (4, True, True)


def test_a_run_and_a_model_of_the_registry_lead_to_their_artifact(tmp_path: Path) -> None:
    run = tmp_path / "run"
    artifact(run / "export" / "merged", "merged")
    artifact(run / "export" / "adapter.failed", "adapter", passed=False, name="adapter_config.json")
    manifest = Manifest(status="complete", started="now", versions={"qft": "1"})
    (run / "manifest.json").write_text(manifest.model_dump_json())
    assert line(run)[2] == str(run / "export" / "merged")
    artifact(run / "export" / "bnb-4bit", "bnb-4bit")
    assert "say which by --to" in qft("serve", run).stderr
    assert line(run, "--to", "bnb-4bit")[2] == str(run / "export" / "bnb-4bit")
    assert "has no export gguf" in qft("serve", run, "--to", "gguf").stderr

    shelf = tmp_path / "models"
    for _ in range(2):
        add(shelf, "mine", run / "export" / "merged", VersionManifest.model_validate({"gate": {"passed": True}}))
    assert "nothing is current yet" in qft("serve", "mine", "--registry", shelf).stderr
    promote(shelf, "mine", 1)
    assert line("mine", "--registry", shelf)[2] == str(shelf / "mine" / "v1" / "artifact")
    words = line("mine", "--registry", shelf, "--version", 2)
    assert words[2] == str(shelf / "mine" / "v2" / "artifact")
    assert value(words, "--served-model-name") == "mine"


NO_BASE = {"base_model_name_or_path": "/nowhere/base", "r": 4}
REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...], int, str]] = {
    "refused by its gate": ({"passed": False}, (), 4, "its gate refused it"),
    "not looked at": ({"passed": None}, (), 4, "its gate was switched off"),
    "too long": ({}, ("--context", "4096"), 2, "is built for 2048 tokens"),
    "no GGUF file": ({}, ("--engine", "ollama"), 2, "ollama serves GGUF files alone"),
    "of no run": ({}, ("--to", "merged"), 2, "--to: says which export of a run"),
    "of no registry": ({}, ("--version", "2"), 2, "is no model of the registry"),
    "no base": ({"config": NO_BASE, "name": "adapter_config.json"}, (), 3, "/nowhere/base is not there"),
    "base is a GGUF file": (
        {"config": {"base_model_name_or_path": "package:a/b.gguf", "r": 4}, "name": "adapter_config.json"},
        (),
        2,
        "its base is a GGUF file",
    ),
    "no server": ({}, ("--run", "--engine-python", "/nowhere/python"), 3, "/nowhere/vllm: is not installed"),
    "a Python and no --run": ({}, ("--engine-python", "/nowhere/python"), 2, "give --run too"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_refused_with_the_reason(case: str, tmp_path: Path) -> None:
    made, words, code, text = REFUSED[case]
    target = "adapter" if "name" in made else "merged"
    ran = qft("serve", artifact(tmp_path / "it", target, **made), *words)
    assert (ran.exit_code, ran.stdout) == (code, "")
    assert text in ran.stderr.replace("\n", " ")


def test_a_path_that_is_not_there_is_no_name_of_a_model(tmp_path: Path) -> None:
    ran = qft("serve", tmp_path / "gone")
    assert (ran.exit_code, ran.stdout) == (3, "")
    assert "gone: is not there" in ran.stderr.replace("\n", "")


def test_force_serves_what_no_gate_has_passed_and_says_so(tmp_path: Path) -> None:
    ran = qft("serve", artifact(tmp_path / "it", "merged", passed=None), "--force")
    assert ran.stdout.startswith("vllm serve")
    assert "its gate was switched off" in ran.stderr


def test_run_becomes_the_server(tmp_path: Path) -> None:
    """Of a program that stands beside the Python, with the words that are printed without --run."""
    folder = artifact(tmp_path / "it", "merged")
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "served: $@"\n')
    program.chmod(0o755)
    done = ended(command("serve", folder, "--run", "--engine-python", program.with_name("python")))
    assert done.stdout.decode().strip() == "served: " + " ".join(line(folder)[1:])
