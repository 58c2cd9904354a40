"""A GGUF file is handed over like any other artifact: asked by llama.cpp, and refused if it is another model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from qft.commands.evaluate import EvalOptions, evaluate
from qft.export import export
from qft.export.gate.verify import Reference, judge
from qft.export.job import Job
from qft.gguf.file import read_gguf
from qft.gguf.modelfile import find_turns, modelfile
from qft.progress import View
from tests.support.cli import qft
from tests.support.exports import options, refusal
from tests.support.models import CHATML, byte_tokenizer, tiny_llama
from tests.support.runs import trained
from tests.support.tasks import answer_task, choice_task, text_task

pytest.importorskip("cyllama", reason="needs llama.cpp (pip install 'qft[llamacpp]')")


@pytest.fixture(scope="module")
def whole(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    export(run, options("gguf-f16", out=out), View())
    return out / "gguf-f16"


# What is broken in the file, and the check that is to see it.


@contextmanager
def edited(folder: Path) -> Iterator[gguf.GGUFReader]:
    reader = gguf.GGUFReader(next(folder.glob("*.gguf")), "r+")
    yield reader
    reader.data.flush()


def tensors(reader: gguf.GGUFReader, *kinds: str) -> Iterator[np.ndarray[Any, Any]]:
    for tensor in reader.tensors:
        if any(kind in tensor.name for kind in kinds):
            yield tensor.data


def wrong_scale(folder: Path) -> None:
    with edited(folder) as reader:
        for data in tensors(reader, "ffn_down"):
            data *= 16


def swapped_rows(folder: Path) -> None:
    """As Hugging Face has them."""
    with edited(folder) as reader:
        for data in tensors(reader, "attn_q", "attn_k"):
            data[:] = data.reshape(-1, 8, 2, data.shape[1]).swapaxes(1, 2).reshape(data.shape)


def dropped_token(folder: Path) -> None:
    with edited(folder) as reader:
        field = reader.fields["tokenizer.ggml.token_type"]
        field.parts[field.data[1]][0] = gguf.TokenType.NORMAL


def another_bos(folder: Path) -> None:
    with edited(folder) as reader:
        reader.fields["tokenizer.ggml.add_bos_token"].parts[-1][0] = True


def rename(folder: Path, old: bytes, new: bytes) -> None:
    path = next(folder.glob("*.gguf"))
    path.write_bytes(path.read_bytes().replace(old, new, 1))


def no_template(folder: Path) -> None:
    rename(folder, b"tokenizer.chat_template", b"tokenizer.chat_templatX")


def cut_file(folder: Path) -> None:
    path = next(folder.glob("*.gguf"))
    path.write_bytes(path.read_bytes()[:-1000])


NUMBERS = {"kl", "top1_agreement", "perplexity_increase"}
BROKEN: dict[str, tuple[Callable[[Path], None], set[str]]] = {
    "wrong scale": (wrong_scale, NUMBERS),
    "swapped q and k rows": (swapped_rows, NUMBERS),
    "dropped added token": (dropped_token, {"added_tokens", "token_ids"}),
    "a BOS more": (another_bos, {"bos_count"}),
    "no chat template": (no_template, {"chat_template"}),
    "a file that is cut": (cut_file, {"loads"}),
}
WORST = {"wrong scale": "mlp.down_proj", "swapped q and k rows": "_proj"}


@pytest.mark.parametrize("way", BROKEN)
def test_a_broken_file_is_caught(way: str, asked: tuple[Job, Reference], whole: Path, tmp_path: Path) -> None:
    breaks, seen_by = BROKEN[way]
    folder = tmp_path / "broken"
    shutil.copytree(whole, folder)
    assert judge(asked[0], "gguf-f16", folder, asked[1]).passed
    breaks(folder)
    gate = judge(asked[0], "gguf-f16", folder, asked[1])
    assert gate.passed is False
    missed = {check.name for check in gate.checks if not check.passed}
    assert missed & seen_by
    assert missed <= seen_by
    assert WORST.get(way, "None") in str(gate.worst_weight)


def test_weights_are_read_back_in_their_order(whole: Path, run: Path, tmp_path: Path) -> None:
    export(run, options("merged", out=tmp_path), View())
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    read = read_gguf(next(whole.glob("*.gguf")), model.config)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(read(name), value.float(), rtol=1e-3, atol=1e-4, msg=name)
    assert read("lm_head.bias") is None


def test_what_gguf_cannot_hold_is_refused_before_any_work(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    tokenizer = byte_tokenizer()
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    definition["normalizer"] = {"type": "Lowercase"}
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text(json.dumps(definition))
    run = trained(tmp_path, tmp_path / "base", train={"max_steps": 1})
    assert "normalizer Lowercase" in str(refusal(run, "gguf", out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_exported_file_is_a_target(run: Path, whole: Path, tmp_path: Path) -> None:
    file = next(whole.glob("*.gguf"))
    names = [str(run), str(whole), f"{file}@llama.cpp", str(file)]
    where = ("--out", tmp_path, "--json", "--quiet")
    ran = qft("eval", *names, "--reference", run, "--metric", "exact_match", *where)
    assert ran.exit_code == 0, ran.stderr
    of = {target["name"]: target for target in json.loads(ran.stdout)["targets"]}
    assert list(of) == names
    assert of[str(whole)]["weight_bytes"] == of[str(whole)]["disk_bytes"] == file.stat().st_size
    assert of[str(whole)]["decode_tokens_per_second"] > 0
    for name in names[1:]:
        assert of[name]["kl_mean"] < 0.01
        assert of[name]["scores"]["exact_match"] == of[str(run)]["scores"]["exact_match"]
    assert of[str(whole)]["kl_mean"] == pytest.approx(of[f"{file}@llama.cpp"]["kl_mean"])
    asked = ("--prompt", "say 3", "--max-new-tokens", "16", "--json")
    answers = [json.loads(qft("chat", name, *asked).stdout)["answer"] for name in names]
    assert len(set(answers)) == 1


def test_the_harness_asks_llamacpp_too(run: Path, whole: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-eval (pip install 'qft[eval]')")
    tasks = tuple(map(str, (choice_task(tmp_path), text_task(tmp_path), answer_task(tmp_path))))
    trained, exported = evaluate([str(run), str(whole)], EvalOptions(harness=tasks), View()).targets
    assert exported.harness
    for one, other in zip(trained.harness, exported.harness, strict=True):
        assert (one.task, one.metric) == (other.task, other.metric)
        assert other.value == pytest.approx(one.value, rel=0.01)


def test_what_llamacpp_does_not_run(run: Path, whole: Path) -> None:
    ran = qft("eval", f"{run}@llama.cpp", "--quiet")
    assert (ran.exit_code, "is no .gguf file" in ran.stderr) == (2, True)
    ran = qft("eval", whole, run, "--reference", run, "--layers", "--quiet")
    assert (ran.exit_code, "--layers" in ran.stderr) == (2, True)


# The Modelfile: its TEMPLATE is read here as Ollama does.

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|s|>' + m['role'] + '<|e|>\n\n' + m['content'] | trim + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|s|>assistant<|e|>\n\n' }}{% endif %}"
)
WITH_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe {{ '{{ \"good\" }}' }}.<|im_end|>\n{% endif %}"
    + CHATML
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('none') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
LAST_DIFFERS = (
    "{% for m in messages %}{% if loop.last %}[LAST]{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [{"role": role, "content": f"{role} speaks"} for role in ("user", "assistant", "user")]


@pytest.mark.parametrize("template", [CHATML, LLAMA3, WITH_SYSTEM, NO_SYSTEM], ids=range(4))
@pytest.mark.parametrize("system", [False, True])
def test_turns_render_as_the_template_does(template: str, system: bool) -> None:
    tokenizer = byte_tokenizer(template)
    turns = find_turns(tokenizer)
    assert turns is not None
    if system and template is NO_SYSTEM:
        assert "system" not in turns.around
        return
    talk = [{"role": "system", "content": "be brief"}] * system + TALK
    assert turns.render(talk) == tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)


def test_the_modelfile_says_what_ollama_needs() -> None:
    text = modelfile("m.gguf", byte_tokenizer(WITH_SYSTEM))
    assert text.startswith("FROM ./m.gguf\n")
    assert '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n{{ else' in text
    assert 'SYSTEM """Be {{ "good" }}."""\n' in text
    assert 'PARAMETER stop "<|im_end|>"\n' in text
    assert "{{ end }}{{ end }}<|im_start|>assistant\n" in text


@pytest.mark.parametrize("template", [LAST_DIFFERS, "{{ messages[0]['content'] }}"])
def test_other_templates_are_left_to_ollama_and_that_is_said(template: str) -> None:
    tokenizer = byte_tokenizer(template)
    assert find_turns(tokenizer) is None
    assert "TEMPLATE" not in modelfile("m.gguf", tokenizer)
    assert "# The chat template is more than turns" in modelfile("m.gguf", tokenizer)


def test_a_bos_that_llamacpp_adds_is_not_in_the_modelfile() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer(LLAMA3)
    assert 'TEMPLATE """<|bos|>{{ range' in modelfile("m.gguf", tokenizer)
    once = TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    tokenizer.backend_tokenizer.post_processor = once
    assert "<|bos|>" not in modelfile("m.gguf", tokenizer)


def test_what_ollama_would_leave_out_is_an_escape_or_no_template_at_all() -> None:
    turns = CHATML.replace("<|im_start|>", '\u00a0"<|im_start|>')
    text = modelfile("m.gguf", byte_tokenizer(turns))
    assert r'{{ "\U000000a0\"<|im_start|>user\n" }}{{ .Content }}<|im_end|>' in text
    assert "\u00a0" not in text
    assert "# The chat template is more" in modelfile("m.gguf", byte_tokenizer(WITH_SYSTEM.replace("Be ", "Be\u00a0")))
