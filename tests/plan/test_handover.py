"""What a run can be handed over as is known before it is trained, and is what its export does."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

from qft.commands.check import planned
from qft.commands.train import train
from qft.errors import QftError, RecipeError
from qft.export import EXPORTERS, export
from qft.gguf.llamacpp import LlamaCpp
from qft.progress import View
from qft.recipe import load
from qft.registry import problems
from tests.support.cli import qft
from tests.support.exports import options
from tests.support.gguf import qwen, tokenizer_of
from tests.support.models import CHATML, byte_tokenizer, tiny_llama
from tests.support.rows import chat, write_jsonl

pytest.importorskip("cyllama", reason="needs llama.cpp (pip install 'qft[llamacpp]')")

GGUF = [name for name in EXPORTERS if name.startswith("gguf")]
IDS = {"vocab_size": 264, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2}
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}


def small(kind: str, **settings: Any) -> Any:
    head = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    return getattr(transformers, kind + head)(getattr(transformers, f"{kind}Config")(**IDS | settings))


def gpt2() -> Any:
    return small("GPT2", n_embd=64, n_layer=2, n_head=4, n_positions=512)


def odd() -> Any:
    """No row of it is a whole number of blocks."""
    return tiny_llama(hidden_size=80, num_attention_heads=5, num_key_value_heads=5, intermediate_size=100)


def write_recipe(folder: Path, model: Any, tokenizer: Any = None, **sections: Any) -> Path:
    model.save_pretrained(folder / "base")
    (tokenizer or byte_tokenizer()).save_pretrained(folder / "base")
    rows = [{"messages": [{"role": "system", "content": "be brief"}, *chat(f"say {i}", f"{i * 7}")["messages"]]}
            for i in range(10)]  # fmt: skip
    write_jsonl(folder / "rows.jsonl", rows)
    values = {
        "model": {"path": str(folder / "base"), "device": "cpu"},
        "adapter": {"r": 4},
        "data": {"train": "rows.jsonl", "eval_fraction": 0.2, "max_length": 128},
        "train": {"max_steps": 1, "report_to": [], "save_strategy": "no"},
        "output_dir": "run",
    }
    # Numbers are not what is looked at, and a random model's are far off once it is rounded to 4 bits.
    values["export"] = {"gate": {"kl": 100.0, "top1_agreement": 0.0, "perplexity_increase": 100.0}}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values | sections, sort_keys=False))
    return path


def exports(path: Path) -> dict[str, str | None]:
    plan = planned(load(path))
    assert plan.kind == "plan"
    return plan.exports


NF4 = {"quant": {"preset": "finetune"}}
RUNS: dict[str, tuple[Callable[[], Any], dict[str, Any], set[str]]] = {
    "llama on nf4": (tiny_llama, NF4, {"gguf-q4_k"}),
    "blocks that return tuples": (lambda: small("Bloom", hidden_size=64, n_layer=2, n_head=4), {}, set(GGUF)),
    "linear layers of its own": (
        lambda: small("Falcon", **SIZES),
        {},
        {"bnb-4bit", "bnb-8bit", "compressed-tensors", "torchao", *GGUF},
    ),
    "Conv1D": (gpt2, {}, {"bnb-4bit", "bnb-8bit", "compressed-tensors", "torchao", *GGUF}),
    "all weights of Conv1D": (
        gpt2,
        {"adapter": {"kind": "none"}},
        {"adapter", "bnb-4bit", "bnb-8bit", "compressed-tensors", "torchao", *GGUF},
    ),
    "odd rows": (odd, {}, {"compressed-tensors", *GGUF} - {"gguf-f16", "gguf-bf16"}),
    "odd rows between": (
        lambda: tiny_llama(intermediate_size=100),
        {},
        {"compressed-tensors", "gguf", "gguf-q8_0", "gguf-q4_0", "gguf-q4_k"},
    ),
    "biases and norms": (
        lambda: qwen("Qwen2", bos_token_id=0, eos_token_id=2),
        {"adapter": {"r": 4, "use_dora": True, "bias": "all", "modules_to_save": ["norm"]}},
        {"gguf-q4_k"},
    ),
    "an embedding": (
        tiny_llama,
        {"adapter": {"r": 4, "target_modules": ["q_proj", "embed_tokens"]}},
        set(EXPORTERS) - {"adapter"},
    ),
    "a plugin": (
        tiny_llama,
        {"quant": {"mode": "custom", "plugin": str(Path(__file__).parents[2] / "recipes/custom/int8_symmetric.py")}},
        set(EXPORTERS) - {"adapter"},
    ),
}  # fmt: skip
ASKED = ("adapter", "merged", "bnb-4bit", "compressed-tensors", "gguf", "gguf-q4_0", "gguf-q4_k_m")


def asked(kind: str, impossible: set[str]) -> tuple[str, ...]:
    """Not those that another stands for: files are all made from the one in float16, and layers of bitsandbytes are the
    same."""
    if kind in ("llama on nf4", "Conv1D"):
        return (*ASKED, "bnb-8bit")
    return tuple(name for name in ASKED if "gguf-f16" not in impossible or not name.startswith("gguf-"))


@pytest.mark.parametrize("kind", RUNS)
def test_what_is_foreseen_is_what_an_export_does(kind: str, tmp_path: Path) -> None:
    make, sections, impossible = RUNS[kind]
    path = write_recipe(tmp_path, make(), **sections)
    told = exports(path)
    assert list(told) == list(EXPORTERS)
    assert {name for name, why in told.items() if why} == impossible
    train(load(path), View())
    names = asked(kind, impossible)
    able = (name for name in names if name not in impossible)
    documents = export(tmp_path / "run", options(*able, overrides=("calibrate.engine=rtn",)), View())
    assert all(document.passed for document in documents)
    for name in impossible & {*names}:
        with pytest.raises(QftError):
            export(tmp_path / "run", options(name), View())


def several() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {
        "default": CHATML,
        "tool_use": "{% if not tools %}{{ raise_exception('none') }}{% endif %}",
    }
    return tokenizer


def changed(**changes: Any) -> Any:
    """The byte tokenizer with another part of its tokenizer.json."""
    from tokenizers import Tokenizer

    tokenizer = byte_tokenizer()
    definition = json.loads(tokenizer.backend_tokenizer.to_str()) | changes
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(definition))
    return tokenizer


def unigram() -> Any:
    words = sorted(byte_tokenizer().get_vocab().items(), key=lambda word: word[1])
    return changed(model={"type": "Unigram", "unk_id": 0, "vocab": [[word, -1.0] for word, _ in words]})


def without_end() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    return tokenizer


def wider() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(9)])
    return tokenizer


NO_END = {"eos_token_id": None}
TOKENIZERS: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "several templates": (several, {}, "several chat templates (default, tool_use): give one as data.chat_template"),
    "no end token": (without_end, NO_END, "no end token (eos_token)"),
    "unigram": (unigram, {}, "the tokenizer is Unigram; only byte-level BPE"),
    "no merges": (lambda: tokenizer_of(merges=()), {}, "no merges"),
    "another pre-tokenizer": (
        lambda: changed(pre_tokenizer={"type": "Digits", "individual_digits": False}), {}, "no pre-tokenizer",
    ),
    "a normalizer": (lambda: changed(normalizer={"type": "Lowercase"}), {}, "normalizer Lowercase"),
    "more tokens than embeddings": (wider, {}, "last id is"),
    "more ends than names": (byte_tokenizer, {"eos_token_id": [2, 1, 0, 9]}, "answers end at 4 tokens"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokenizers_that_gguf_cannot_hold_are_known(kind: str, tmp_path: Path) -> None:
    make, ids, reason = TOKENIZERS[kind]
    told = exports(write_recipe(tmp_path, tiny_llama(**ids), make()))
    assert {name for name, why in told.items() if why} == set(GGUF)
    assert all(reason in str(told[name]) for name in GGUF)


def test_what_is_asked_for_and_impossible_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_recipe(tmp_path, gpt2(), export={"target": ["adapter", "bnb-4bit", "gguf"]})
    line = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if "target:" in text)
    monkeypatch.setattr("qft.training.session.load_base", lambda plan: pytest.fail("loads weights"))
    for command in ("check", "train"):
        ran = qft(command, path)
        assert ran.exit_code == 2, ran.output
        refused = [text for text in ran.stderr.splitlines() if ": export.target: " in text]
        assert [text.split(": ")[:3] for text in refused] == [
            [f"{path}:{line}", "export.target", name] for name in ("bnb-4bit", "gguf")
        ]
        assert all("possible are adapter, merged)" in text for text in refused)
        assert "torch.nn.Linear" in refused[0]
    assert not (tmp_path / "run").exists()


def test_who_asks_for_nothing_is_told_and_goes_on(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, small("StableLm", **SIZES, intermediate_size=128, num_key_value_heads=4))
    ran = qft("check", path, "--json")
    told = json.loads(ran.stdout)["exports"]
    assert told["merged"] is None
    assert told["gguf"].startswith("GGUF: cannot write StableLmForCausalLM")
    text = " ".join(qft("check", path).stdout.split())
    assert "adapter, merged, bnb-4bit, bnb-8bit, compressed-tensors" in text
    assert text.count("cannot write StableLmForCausalLM") == 1
    ran = qft("train", path)
    assert ran.exit_code == 0
    assert "GGUF" not in ran.output


def test_missing_packages_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_recipe(tmp_path, tiny_llama())
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "cyllama" else find(name, *a))
    told = exports(path)
    assert {name for name, why in told.items() if why} == set(GGUF)
    assert told["gguf"] == "needs cyllama; pip install 'qft[llamacpp]'"


def test_rows_that_cannot_be_calibrated_on_stop_what_needs_them(tmp_path: Path) -> None:
    calibrate = {"engine": "autoround", "samples": 4, "data": "gone.jsonl"}
    path = write_recipe(tmp_path, tiny_llama(), calibrate=calibrate, export={"target": ["compressed-tensors"]})
    with pytest.raises(RecipeError, match=r"export\.target: compressed-tensors: .*gone\.jsonl"):
        train(load(path), View())


def test_a_run_that_cannot_be_merged_is_not_calibrated(tmp_path: Path) -> None:
    train(load(write_recipe(tmp_path, tiny_llama(), adapter={"target_modules": ["embed_tokens"]})), View())
    path = tmp_path / "calibrate.yaml"
    values = {"model": {"path": "run"}, "data": {"train": "rows.jsonl"}, "calibrate": {"engine": "rtn"}}
    path.write_text(yaml.safe_dump(values | {"output_dir": "calibrated"}))
    ran = qft("check", path)
    assert ran.exit_code == 6, ran.output
    assert "only peft can apply" in ran.stderr


@pytest.mark.parametrize("wants_system", [False, True])
def test_templates_are_compared_whichever_they_are(wants_system: bool, tmp_path: Path) -> None:
    tokenizer = several()
    if wants_system:
        head = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system') }}{% endif %}"
        tokenizer.chat_template = head + CHATML
    train(load(write_recipe(tmp_path, tiny_llama(), tokenizer)), View())
    names = ("adapter", "merged", "gguf" if wants_system else "bnb-8bit")
    documents = export(tmp_path / "run", options(*names, register="m", registry=tmp_path / "models"), View())
    assert all(document.passed for document in documents)
    assert problems(tmp_path / "models", "m") == []


@pytest.mark.parametrize(("of_model", "ends"), [([2, 1], {1, 2}), (None, {2}), ([1], {1, 2})])
def test_llamacpp_ends_answers_where_the_model_does(of_model: Any, ends: set[int], tmp_path: Path) -> None:
    model = tiny_llama(eos_token_id=of_model)
    train(load(write_recipe(tmp_path, model)), View())
    [document] = export(tmp_path / "run", options("gguf-f16"), View())
    assert document.passed
    assert ends <= set(LlamaCpp(next(Path(document.path).glob("*.gguf"))).stops) <= ends | {11}
