"""Every field of the recipe changes what is done: not one is validated, documented and then read by nothing.

A case changes one field and looks at what does the work: the quantization config, LoraConfig, TrainingArguments, the
loaded model, the encoded rows; or at the refusal, where this machine cannot do it. A field whose work is seen only in
a run names the test that sees it.
"""

from __future__ import annotations

import functools
import hashlib
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, get_args, get_origin

import pytest
import torch
import yaml
from peft import LoraConfig
from pydantic import BaseModel
from transformers import BitsAndBytesConfig

from qft.distributed.world import Ranks
from qft.errors import QftError
from qft.model.adapter import attach_adapter
from qft.model.load import load_base
from qft.plan import Plan, make_plan, plan_calibration
from qft.recipe import LoadedRecipe, Recipe, Source, load
from qft.recipe.data import AuditSection
from qft.run.folder import Run
from qft.training.session import training_arguments
from tests.support.architectures import write_model
from tests.support.models import CHATML, byte_tokenizer, tiny_llama, write_remote_code_model
from tests.support.paths import ROOT
from tests.support.plugins import SHIPPED
from tests.support.rows import chat, write_jsonl
from tests.support.tiny import write_tiny_model


def training(plan: Plan) -> Any:
    """TrainingArguments, without what names the moment."""
    return training_arguments(plan, Run(Path(plan.recipe.output_dir))).to_dict()


def quantization(plan: Plan) -> Any:
    return BitsAndBytesConfig(**plan.model.scheme.config()).to_dict()


def lora(plan: Plan) -> Any:
    return LoraConfig(**plan.lora or {}).to_dict()


def rows(plan: Plan) -> Any:
    return [part.to_list() if part else None for part in (plan.data.train, plan.data.eval)]


def batched(plan: Plan) -> Any:
    """What shares a row, and what rows of a batch are laid out as."""
    return [getattr(plan.data.batched, "packs", None), plan.recipe.data.is_packed]


def model(plan: Plan) -> Any:
    """Kind, dtype and contents of the loaded base."""
    base = load_base(plan.model)
    contents = [hashlib.sha256(p.detach().cpu().view(torch.uint8).numpy()).hexdigest() for p in base.parameters()]
    layers = [type(module).__name__ for module in base.modules()]
    return base.config._attn_implementation, layers, contents


def trainable(plan: Plan) -> Any:
    """The trainable weights as they start."""
    torch.manual_seed(0)
    made = attach_adapter(load_base(plan.model), plan)
    return {name: p.detach().double().norm().item() for name, p in made.named_parameters() if p.requires_grad}


def balance(plan: Plan) -> Any:
    """The model's loss on some tokens, that of the balance included."""
    ids = torch.tensor([[1, 40, 41, 42]])
    with torch.no_grad():
        return load_base(plan.model)(input_ids=ids, labels=ids).loss.item()


def rounded(plan: Plan) -> Any:
    """What the model as it is trained makes of some tokens."""
    made = attach_adapter(load_base(plan.model), plan)
    with torch.no_grad():
        return made(input_ids=torch.tensor([[1, 40, 41, 42]])).logits.double().sum().item()


def calibration(loaded: LoadedRecipe) -> Any:
    """How each layer is to be held, the windows, and the rows that verify."""
    planned = plan_calibration(loaded)
    document = planned.document().model_dump(exclude={"data": {"sources"}})
    return document, planned.data.windows, planned.data.verify.to_list()


def together(plan: Plan) -> Any:
    """The same by two processes: how each holds the model, and TrainingArguments."""
    both = make_plan(plan.model.loaded, found=Ranks(0, 2, 0, 2))
    return both.placement, both.training


class Case(NamedTuple):
    value: str
    """The changed value, as written in YAML."""
    seen_in: Callable[[Any], Any]
    given: tuple[str, ...] = ()
    """What the field needs around it."""


FLOAT = "model.dtype=float32"
QAT = ("quant.mode=qat",)
FOUR, EIGHT, CUSTOM = "quant.mode=4bit", "quant.mode=8bit", "quant.mode=custom"
HELD_OUT = "data.eval_fraction=0.25"
EVERY_2 = (
    HELD_OUT,
    "train.eval_strategy=steps",
    "train.eval_steps=2",
    "train.save_strategy=steps",
    "train.save_steps=2",
)
RTN = ("calibrate.engine=rtn",)
RTN_8 = (*RTN, "calibrate.bits=8")
LLMCOMPRESSOR = ("calibrate.engine=llmcompressor", "calibrate.engine_python=some/python")  # which is not there
STATIC = (*RTN_8, "calibrate.activations=static", "calibrate.max_length=32")
UNEVEN = "data.train=[{path: chats.jsonl, weight: 2}, {path: other.jsonl}]"
PAIR = "data.train=[{path: chats.jsonl}, {path: other.jsonl}]"

CASES: dict[str, Case] = {
    "model.path": Case("other-model", model),
    "model.dtype": Case("bfloat16", model, (FLOAT,)),
    "model.device": Case("cpu", training, ("model.device=cuda",)),
    "model.attn_implementation": Case("eager", model),
    "model.trust_remote_code": Case("true", model, ("model.path=remote",)),
    "model.add_tokens": Case("[<a>, <b>]", model),
    "model.add_special_tokens": Case("[<a>, <b>]", trainable),
    "quant.preset": Case("inference", quantization, ("quant.preset=finetune",)),
    "quant.mode": Case("8bit", model),
    "quant.plugin": Case("coarse.py", model, (CUSTOM, "quant.plugin=int8_symmetric.py")),
    "quant.quant_type": Case("fp4", quantization, (FOUR,)),
    "quant.double_quant": Case("false", quantization, (FOUR,)),
    "quant.compute_dtype": Case("float32", quantization, (FOUR,)),
    "quant.quant_storage": Case("bfloat16", quantization, (FOUR,)),
    "quant.threshold": Case("3.0", quantization, (EIGHT,)),
    "quant.skip_modules": Case("[up_proj]", model, (FOUR,)),
    "quant.target": Case("int4-g64", rounded, (*QAT, "quant.target=int4-g32")),
    "quant.allow_partial": Case("true", quantization, (FOUR, "model.path=own-layers")),
    "adapter.kind": Case("none", trainable, (FLOAT,)),
    "adapter.r": Case("3", lora),
    "adapter.lora_alpha": Case("5", lora),
    "adapter.lora_dropout": Case("0.5", lora),
    "adapter.target_modules": Case("[q_proj]", trainable),
    "adapter.target_experts": Case("true", trainable, ("model.path=experts",)),
    "adapter.exclude_modules": Case("[q_proj]", trainable),
    "adapter.target_towers": Case("true", trainable, ("model.path=pictures",)),
    "adapter.layers_to_transform": Case("[1]", trainable, ("adapter.target_modules=[q_proj]",)),
    "adapter.use_rslora": Case("true", lora),
    "adapter.use_dora": Case("true", trainable),
    "adapter.init_lora_weights": Case("gaussian", trainable),
    "adapter.bias": Case("all", lora),
    "adapter.modules_to_save": Case("[lm_head]", trainable),
    "data.train": Case("other.jsonl", rows),
    "data.train.path": Case("other.jsonl", rows, ("data.train={path: chats.jsonl}",)),
    "data.train.format": Case("text", rows, ("data.train={path: both.jsonl, format: alpaca}",)),
    "data.train.weight": Case("2", rows, ("data.train={path: chats.jsonl}",)),
    "data.train.sample_by": Case("document", rows, ("data.train={path: lines.txt}",)),
    "data.train.columns": Case("{text: input}", rows, ("data.train={path: both.jsonl, format: alpaca}",)),
    "data.train.sql": Case("SELECT 'a' AS text", rows, ("data.train={path: rows.db, sql: SELECT text FROM rows}",)),
    "data.mix_by": Case("rows", rows, (UNEVEN,)),
    "data.mix_temperature": Case("9.0", rows, (UNEVEN, "data.mix_by=rows")),
    "data.eval": Case("other.jsonl", rows),
    "data.eval_fraction": Case("0.5", rows),
    "data.format": Case("text", rows, ("data.train=both.jsonl", "data.format=alpaca")),
    "data.max_length": Case("34", rows, ("data.on_too_long=truncate",)),
    "data.on_too_long": Case("truncate", rows, ("data.max_length=34", "data.on_too_long=skip")),
    "data.on_bad_row": Case("skip", rows, ("data.train=bad.jsonl",)),
    "data.packing": Case("true", batched),
    "data.padding_free": Case("true", batched),
    "data.streaming": Case("true", lambda plan: plan.data.stream is not None, ("train.max_steps=2",)),
    "data.loss_on": Case("all", rows),
    "data.train_on_eos": Case("none", rows),
    "data.prompt_loss_weight": Case("0.5", rows),
    "data.ignore_fields": Case("[messages.aside]", rows, ("data.chat_template=aside.jinja", "data.train=asides.jsonl")),
    "data.template": Case("none", rows, ("data.train=both.jsonl", "data.format=alpaca")),
    "data.chat_template": Case("shout.jinja", rows),
    "data.template_kwargs": Case("{aloud: true}", rows, ("data.chat_template=aside.jinja",)),
    "train.bf16": Case("false", training),
    "train.fp16": Case("true", training, ("train.bf16=false",)),
    "train.tf32": Case("true", training, ("train.tf32=false",)),
    "train.per_device_train_batch_size": Case("3", training),
    "train.per_device_eval_batch_size": Case("3", training),
    "train.gradient_accumulation_steps": Case("3", training),
    "train.num_train_epochs": Case("3", training),
    "train.max_steps": Case("7", training),
    "train.learning_rate": Case("1e-5", training),
    "train.lr_scheduler_type": Case("cosine", training),
    "train.warmup_steps": Case("5", training),
    "train.weight_decay": Case("0.1", training),
    "train.adam_beta1": Case("0.8", training),
    "train.adam_beta2": Case("0.95", training),
    "train.adam_epsilon": Case("1e-6", training),
    "train.max_grad_norm": Case("0.3", training),
    "train.optim": Case("adamw_8bit", training),
    "train.gradient_checkpointing": Case("true", training),
    "train.chunked_loss": Case("true", lambda plan: plan.logit_bytes),
    "distributed.strategy": Case("fsdp2", together),
    "distributed.gpus": Case("2", training),
    "distributed.nodes": Case("2", training),
    "distributed.global_batch": Case("4", training),
    "distributed.timeout": Case("60", together),
    "memory.checkpoints": Case("host", lambda plan: plan.checkpoints),
    "memory.budget": Case("1GiB", lambda plan: plan.memory.budget_bytes),
    "train.kernels": Case("plain", lambda plan: plan.kernels),
    "train.matmul": Case("fp8", lambda plan: plan.kernels),
    "train.router_aux_loss_coef": Case("0.5", balance, ("model.path=experts",)),
    "train.torch_compile": Case("true", training),
    "train.neftune_noise_alpha": Case("5", training),
    "train.label_smoothing_factor": Case("0.1", training),
    "train.train_sampling_strategy": Case("group_by_length", training),
    "train.dataloader_num_workers": Case("2", training),
    "train.dataloader_pin_memory": Case("false", training, ("train.dataloader_pin_memory=true",)),
    "train.logging_steps": Case("5", training),
    "train.eval_strategy": Case("epoch", training, (HELD_OUT,)),
    "train.eval_steps": Case("3", training, EVERY_2),
    "train.save_strategy": Case("'no'", training),
    "train.save_steps": Case("3", training, ("train.save_strategy=steps",)),
    "train.save_total_limit": Case("5", training),
    "train.load_best_model_at_end": Case("true", training, EVERY_2),
    "train.full_determinism": Case("true", training),
    "train.report_to": Case("[wandb]", training),
    "train.run_name": Case("second", training),
    "train.stages": Case("[{max_steps: 3}, {max_steps: 4}]", training),
    "calibrate.preset": Case("w8a16", calibration, ("calibrate.preset=w8a8-dynamic",)),
    "calibrate.engine": Case("torchao", calibration, RTN_8),
    "calibrate.engine_python": Case("other/python", calibration, LLMCOMPRESSOR),
    "calibrate.algorithm": Case("awq", calibration, (*LLMCOMPRESSOR, "calibrate.bits=8")),
    "calibrate.data": Case("other.jsonl", calibration, STATIC),
    "calibrate.samples": Case("3", calibration, STATIC),
    "calibrate.max_length": Case("48", calibration, STATIC),
    "calibrate.data_type": Case("float", calibration, (*RTN_8, "calibrate.activations=dynamic")),
    "calibrate.bits": Case("8", calibration, RTN),
    "calibrate.group_size": Case("32", calibration, RTN),
    "calibrate.symmetric": Case("false", calibration, RTN),
    "calibrate.activations": Case("dynamic", calibration, RTN_8),
    "calibrate.skip_modules": Case("[up_proj]", calibration, RTN),
    "calibrate.allow_partial": Case("true", calibration, (*RTN, "model.path=experts")),
    "calibrate.seed": Case("7", calibration, STATIC),
    "calibrate.verify_samples": Case("3", calibration, RTN),
    "output_dir": Case("elsewhere", training),
    "seed": Case("7", training),
}

ELSEWHERE = {
    "checkpoint/test_packed.py": {
        "model.dequantize": "test_every_layout_is_read_as_what_it_means",
    },
    "checkpoint/test_weights.py": {
        "model.ignore_unexpected": "test_unexpected_tensors_can_be_meant",
    },
    "checkpoint/test_hub.py": {
        "model.revision": "test_a_revision_is_resolved_to_its_commit",
        "data.train.name": "test_a_hub_dataset_is_read_by_configuration_split_and_revision",
        "data.train.split": "test_a_hub_dataset_is_read_by_configuration_split_and_revision",
        "data.train.revision": "test_a_hub_dataset_is_read_by_configuration_split_and_revision",
    },
    "memory/test_offload.py": {
        "memory.offload": "test_the_files_are_in_the_run_and_say_what_they_are",
        "memory.offload_folder": "test_a_run_is_the_resident_one_from_its_first_evaluation_to_its_export",
    },
    "data/test_prepare.py": {
        "data.num_proc": "test_rows_are_encoded_by_as_many_processes_as_asked",
    },
    "training/test_train.py": {
        "train.early_stopping_patience": "test_early_stopping_and_the_best_checkpoint",
        "train.on_nonfinite": "test_skipped_updates_are_counted_and_change_nothing",
        "eval.metrics": "test_generated_answers_are_scored_and_kept",
        "eval.samples": "test_generated_answers_are_scored_and_kept",
        "eval.regex": "test_generated_answers_are_scored_and_kept",
    },
    "training/test_leaks.py": {
        "memory.leak_threshold": "test_the_threshold_is_the_recipes",
    },
    "training/test_surviving.py": {
        "memory.on_oom": "test_fail_stops_at_the_first_time_and_says_what_helps",
    },
    "distributed/test_launch.py": {
        "distributed.max_restarts": "test_max_restarts_starts_all_again",
    },
    "training/test_qat.py": {
        "quant.fake_quant_after_steps": "test_rounding_begins_when_it_is_asked_to",
        "quant.freeze_observers_after_steps": "test_the_range_of_activations_is_frozen",
        "quant.learn_scales": "test_a_resumed_run_is_the_unbroken_one",
        "quant.distill": "test_distilling_learns_the_unrounded_models_predictions",
    },
    "training/test_signals.py": {
        "train.save_on_signal": "test_without_save_on_signal_it_ends_at_once",
    },
    "calibration/test_calibrate.py": {
        "calibrate.iters": "test_tuning_changes_the_rounding",
        "calibrate.accept.perplexity_increase": "test_a_miss_is_refused_with_its_figures_and_leaves_no_model",
        "calibrate.accept.kl": "test_a_miss_is_refused_with_its_figures_and_leaves_no_model",
        "calibrate.accept.score_drop": "test_a_drop_of_a_score_is_refused",
        "calibrate.remedy": "test_the_remedy_keeps_the_worst_layers_until_it_is_accepted",
        "calibrate.max_bytes": "test_the_remedy_stays_within_its_bytes",
    },
    "calibration/test_distill.py": {
        "calibrate.distill_steps": "test_a_result_that_is_refused_learns_and_is_judged_again",
        "calibrate.distill_learning_rate": "test_it_starts_from_what_the_calibration_made",
    },
    "calibration/test_served.py": {"calibrate.serve": "test_what_the_engine_does_not_load_is_refused_by_field"},
    "export/test_export.py": {
        "export.target": "test_the_recipe_names_targets_and_weights",
        "export.merge_into": "test_the_recipe_names_targets_and_weights",
        "export.gate.kl": "test_the_recipes_thresholds_win",
        "export.gate.top1_agreement": "test_the_recipes_thresholds_win",
        "export.gate.perplexity_increase": "test_the_recipes_thresholds_win",
    },
    "export/test_served.py": {
        "export.engine_python": "test_what_the_serving_engine_finds_is_in_the_document_and_the_card",
    },
    "gguf/test_converter.py": {
        "export.converter": "test_fields_that_do_not_fit_are_refused",
        "export.converter_path": "test_what_it_writes_passes_the_gate",
    },
    "export/test_publish.py": {
        "export.register_as": "test_the_recipe_names_the_model_and_its_registry",
        "export.registry": "test_the_recipe_names_the_model_and_its_registry",
    },
    "calibration/test_mixed.py": {
        "quant.skip_budget_bits": "test_a_budget_in_bits_is_one_in_bytes",
        "quant.skip_budget_bytes": "test_the_worst_layers_are_left_and_that_brings_the_model_closer",
    },
    "model/test_models.py": {
        "eval.max_new_tokens": "test_answers_come_in_batches_and_end_at_the_limit",
        "eval.batch_size": "test_answers_come_in_batches_and_end_at_the_limit",
    },
    "data/test_audit.py": {
        f"data.audit.{name}": "test_each_level_is_asked_for_by_its_field" for name in AuditSection.model_fields
    },
    "measure/test_harness.py": {
        "eval.harness": "test_every_kind_of_target_is_asked",
        "eval.harness_limit": "test_the_limit_is_that_of_the_recipe",
    },
}
"""Test file -> field -> its test there."""


def fields(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """Every field of the schema, those of a data source included."""
    for name, field in section.model_fields.items():
        optional = get_args(field.annotation) if get_origin(field.annotation) is UnionType else ()
        members = (field.annotation, *optional)
        sections = [inner for inner in members if isinstance(inner, type) and issubclass(inner, BaseModel)]
        if sections:
            yield from fields(sections[0], f"{prefix}{name}.")
            continue
        yield f"{prefix}{name}"
        if f"{prefix}{name}" == "data.train":
            yield from fields(Source, "data.train.")


def test_every_field_has_a_case() -> None:
    elsewhere = [field for tests in ELSEWHERE.values() for field in tests]
    assert sorted(fields()) == sorted([*CASES, *elsewhere])
    for file, tests in ELSEWHERE.items():
        code = (ROOT / "tests" / file).read_text("utf-8")
        assert [name for name in tests.values() if f"\ndef {name}(" not in code] == []


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder with a recipe and everything that the cases point to."""
    folder = tmp_path_factory.mktemp("workshop")
    write_jsonl(folder / "chats.jsonl", [chat(f"say {i}", f"it is {i}") for i in range(6, 14)])
    write_jsonl(folder / "other.jsonl", [chat("another", "file")] * 4)
    write_jsonl(folder / "both.jsonl", [{"text": "a text", "instruction": "do", "output": "done"}] * 4)
    write_jsonl(folder / "bad.jsonl", [{"messages": []}, *[chat("good", "row")] * 4])
    (folder / "lines.txt").write_text("one\ntwo\nthree\n")
    with closing(sqlite3.connect(folder / "rows.db")) as made:
        made.execute("CREATE TABLE rows (text TEXT)")
        made.executemany("INSERT INTO rows VALUES (?)", [(f"text {i}",) for i in range(6)])
        made.commit()
    asides = [{"messages": [turn | {"aside": "hm"} for turn in chat("hi", "yo")["messages"]]}] * 4
    write_jsonl(folder / "asides.jsonl", asides)
    aside = CHATML.replace("m['content']", "m['content'] + ('!' if aloud else '') + (m.aside or '')")
    (folder / "aside.jinja").write_text(aside)
    (folder / "shout.jinja").write_text(CHATML.replace("m['content']", "m['content'] + '!'"))
    tiny_llama(num_hidden_layers=1).save_pretrained(folder / "other-model")
    byte_tokenizer().save_pretrained(folder / "other-model")
    write_remote_code_model(folder / "remote")
    write_model(folder / "experts", "mixtral")
    write_model(folder / "own-layers", "falcon")
    write_tiny_model(folder / "pictures", "gemma3")
    code = SHIPPED.read_text()
    (folder / "int8_symmetric.py").write_text(code)
    (folder / "coarse.py").write_text(code.replace("LEVELS = 127", "LEVELS = 3"))
    recipe = {
        "model": {"path": str(tiny_model)},
        "data": {"train": "chats.jsonl", "max_length": 128},
        "output_dir": "run",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.mark.parametrize("field", CASES)
def test_changing_a_field_changes_what_is_done(field: str, workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workshop)  # overrides are relative to where one stands
    value, seen_in, given = CASES[field]
    before, after = (look(workshop, (*given, *change), seen_in) for change in ((), (f"{field}={value}",)))
    assert before != after


@functools.cache
def planned(folder: Path, overrides: tuple[str, ...]) -> Plan:
    """Many cases change one thing of the same recipe."""
    return make_plan(load(folder / "recipe.yaml", [*overrides]))


@functools.cache
def look(folder: Path, overrides: tuple[str, ...], seen_in: Callable[[Any], Any]) -> Any:
    try:
        if seen_in is calibration:
            return calibration(load(folder / "recipe.yaml", [*overrides]))
        return seen_in(planned(folder, overrides))
    except QftError as refusal:
        return str(refusal)
