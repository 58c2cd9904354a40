"""Keys of torchtune's LoRA recipes (version 0.7), by their dotted names."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from qft.arrive import templates
from qft.arrive import torchtune_rules as rules
from qft.arrive.line import (
    Config,
    Kind,
    Line,
    Rule,
    choose,
    decided,
    default,
    ignored,
    many,
    refused,
    sets,
    to,
    when_on,
)
from qft.arrive.shared import processes
from qft.arrive.torchtune_data import dataset

NAME = "torchtune"
TEMPLATES = {"alpaca.jinja": templates.ALPACA}
UNKNOWN = rules.unknown


def knows(values: Mapping[str, Any]) -> bool:
    model = values.get("model")
    return isinstance(model, Mapping) and "_component_" in model


def flat(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """By dotted keys, with ${other.key} in the values; lists are values."""
    found = dict(rules.leaves(values, ""))
    return {key: rules.interpolated(value, found) for key, value in found.items()}


def defaults(config: Config, fields: Mapping[str, Any]) -> Iterator[Line]:
    yield default("adapter.lora_dropout", 0.0, "model.lora_dropout")
    yield default("train.warmup_steps", 0, "lr_scheduler")
    yield default("train.lr_scheduler_type", "constant", "lr_scheduler")
    yield default("train.max_grad_norm", 0, "clip_grad_norm")
    yield default("train.weight_decay", 0.01, "optimizer.weight_decay, of torch.optim.AdamW")
    yield default("train.gradient_accumulation_steps", 1, "gradient_accumulation_steps")
    yield default("data.on_too_long", "truncate", "tokenizer.max_seq_len")
    yield default("train.save_total_limit", None, "a checkpoint each epoch, all kept")


ALPHA = "the update is scaled by lora_alpha / lora_rank there, too"
DECIDED = {
    "found from the model's own files": (
        "tokenizer tokenizer._component_ tokenizer.path tokenizer.merges_file tokenizer.vocab_path "
        "tokenizer.merges_path checkpointer checkpointer._component_ checkpointer.checkpoint_files "
        "checkpointer.model_type checkpointer.checkpoint_files.filename_format "
        "checkpointer.checkpoint_files.max_filename tokenizer.special_tokens_path checkpointer.safe_serialization"
    ),
    "the run folder is output_dir": (
        "checkpointer.output_dir metric_logger metric_logger.log_dir metric_logger.filename"
    ),
    "adapters are saved alone; qft export --to merged adds them": "save_adapter_weights_only",
    "read with resume_from_checkpoint": "checkpointer.recipe_checkpoint checkpointer.adapter_checkpoint",
    "logits of some thousand tokens at a time, the same loss (train.chunked_loss)": (
        "loss loss.num_output_chunks loss.ignore_index"
    ),
    "memory and tokens a second are always reported": (
        "log_peak_memory_stats profile_memory log_level profiler profiler._component_ profiler.enabled "
        "profiler.output_dir profiler.cpu profiler.cuda profiler.profile_memory profiler.with_stack "
        "profiler.record_shapes profiler.with_flops profiler.wait_steps profiler.warmup_steps profiler.active_steps "
        "profiler.num_cycles"
    ),
    "the architecture is that of the model's own files": (
        "model.vocab_size model.num_layers model.num_heads model.num_kv_heads model.embed_dim model.max_seq_len "
        "model.intermediate_dim model.norm_eps model.rope_base model.head_dim model.scale_factor "
        "model.tie_word_embeddings"
    ),
    "distributed.strategy auto decides": (
        "fsdp_reshard_after_forward enable_async_checkpointing context_parallel_dim tensor_parallel_plan "
        "tensor_parallel_plan._component_"
    ),
    "how a model is loaded": ("low_cpu_ram fsdp_cpu_offload custom_sharded_layers fsdp.cpu_offload fsdp"),
    "the update and its backward pass are apart": "optimizer_in_bwd",
    "how an update is computed": "optimizer.foreach",
}
NO_EFFECT = {
    "trains on one device, too": "tensor_parallel_dim data_parallel_shard_dim data_parallel_replicate_dim",
}
REMEDIES = {
    "train on the chosen answers: qft learns from demonstrations": (
        "ref_checkpointer rlhf_loss grpo_samples grpo_size kl_coeff loss.beta loss.label_smoothing loss.loss_type"
    ),
    "attention without dropout is learnt": "model.attn_dropout",
    "adapters are those of the language part: adapter.target_towers adds the towers": (
        "model.decoder_trainable model.encoder_trainable model.fusion_trainable"
    ),
    "images are sized by the model's own processor (its preprocessor_config.json)": (
        "model.image_size tokenizer.image_size tokenizer.max_num_tiles collate_fn dataloader.collate_fn"
    ),
    "write it into the rows, as system (docs/rows.md)": "dataset.new_system_prompt",
    "write the prompt as a Jinja file, and name that as data.chat_template": "dataset.chat_format dataset.template",
    "write rows with images as docs/rows.md has them": "dataset.image_tag dataset.image_dir",
    "quant.mode qat trains for a format in groups of 32 (quant.target)": (
        "quantizer quantizer._component_ quantizer.groupsize"
    ),
    "quant.distill learns from the model itself": (
        "teacher_model teacher_model._component_ teacher_checkpointer teacher_checkpointer._component_ "
        "teacher_checkpointer.checkpoint_dir teacher_checkpointer.checkpoint_files "
        "teacher_checkpointer.recipe_checkpoint teacher_checkpointer.output_dir teacher_checkpointer.model_type "
        "kd_loss kd_loss._component_ kd_ratio teacher_checkpointer.checkpoint_files.filename_format "
        "teacher_checkpointer.checkpoint_files.max_filename teacher_model.lora_attn_modules"
    ),
    "held-out rows count all": "max_validation_batches",
    "give data.train as a list of sources": "datasets dataset_val dataloader.parallel_method",
}


@sets("data.train")
def several(key: str, value: Any, config: Config) -> Iterator[Line]:
    """Data sets that are one behind the other: what they say beside their rows must be the same."""
    found: list[Any] = []
    templates = set()
    for i, each in enumerate(value):
        template = None
        values = dict(rules.leaves(each, "dataset."))
        inner = replace(config, values={**config.values, **values})
        for name in values:
            place = f"{key}.{i}.{name.removeprefix('dataset.')}"
            for line in (TABLE.get(name) or UNKNOWN)(name, values[name], inner) if values[name] is not None else ():
                found += line.sets.get("data.train", [])
                template = line.sets.get("data.chat_template", template)
                others = {field: mine for field, mine in line.sets.items() if field != "data.train"}
                yield replace(line, key=place, sets=others)
        templates.add(template)
    if len(templates) > 1:
        yield Line(key, Kind.UNSUPPORTED, "one chat template renders all rows: train on them one after the other")
    yield Line(key, Kind.OTHER_FIELD, "", {"data.train": found} if found else {})


TABLE: dict[str, Rule] = {
    **many(DECIDED, decided),
    **many(NO_EFFECT, ignored),
    **many(REMEDIES, refused),
    "output_dir": to("output_dir"),
    "dataset": several,
    "loss._component_": rules.loss,
    "metric_logger._component_": rules.logger,
    "metric_logger.project": decided("with metric_logger._component_"),
    "metric_logger.name": to("train.run_name"),
    "resume_from_checkpoint": rules.resumed,
    "save_every_n_steps": rules.saved,
    "cudnn_deterministic_mode": choose(
        "train.full_determinism",
        {0: None, "default": None, 1: True, 2: True, "warn": True, "error": True},
        "train.full_determinism",
    ),
    "model._component_": rules.model,
    "model.lora_attn_modules": rules.attention_modules,
    "model.apply_lora_to_mlp": rules.with_modules,
    "model.apply_lora_to_output": rules.with_modules,
    "model.lora_rank": to("adapter.r"),
    "model.lora_alpha": to("adapter.lora_alpha", text=ALPHA),
    "model.lora_dropout": to("adapter.lora_dropout"),
    "model.use_dora": to("adapter.use_dora"),
    "model.quantize_base": rules.quantized,
    "tokenizer.max_seq_len": to("data.max_length"),
    "tokenizer.prompt_template": rules.prompt_template,
    "checkpointer.checkpoint_dir": to("model.path"),
    "dataset._component_": dataset,
    **dict.fromkeys(
        ("dataset.source", "dataset.split", "dataset.subset", "dataset.name", "dataset.data_files",
         "dataset.data_dir", "dataset.use_clean", "dataset.column",
         "dataset.column_map", "dataset.column_map.instruction", "dataset.column_map.input",
         "dataset.column_map.output", "dataset.conversation_column", "dataset.conversation_style",
         "dataset_val._component_", "dataset_val.split", "dataset_val.source", "dataset.filename",
         "dataset_val.train_on_input", "dataset_val.packed"),
        decided("with dataset._component_"),
    ),
    "dataset.train_on_input": choose("data.loss_on", {True: "all", False: "assistant"}, "data.loss_on"),
    "dataset.masking_strategy": choose(
        "data.loss_on", {"train_on_all": "all", "train_on_assistant": "assistant"}, "all assistant turns are learnt"
    ),
    "dataset.packed": to("data.packing"),
    "dataset.max_seq_len": to("data.max_length"),
    "dataloader.packed": to("data.packing"),
    "dataloader.shuffle": choose("train.train_sampling_strategy", {True: "random", False: "sequential"}, ""),
    "dataloader.num_workers": processes("train.dataloader_num_workers"),
    "dataloader.pin_memory": to("train.dataloader_pin_memory"),
    "dataloader.prefetch_factor": decided("how batches are brought to the device"),
    "run_val_every_n_steps": rules.validation,
    "shuffle": choose("train.train_sampling_strategy", {True: "random", False: "sequential"}, ""),
    "seed": to("seed"),
    "batch_size": to("train.per_device_train_batch_size"),
    "batch_size_val": to("train.per_device_eval_batch_size"),
    "epochs": to("train.num_train_epochs"),
    "max_steps_per_epoch": rules.most_steps,
    "gradient_accumulation_steps": to("train.gradient_accumulation_steps"),
    "clip_grad_norm": to("train.max_grad_norm"),
    "compile": when_on(choose("train.torch_compile", {True: True}, "")),
    "optimizer._component_": rules.optimizer,
    "optimizer.fused": rules.fused,
    "optimizer.lr": to("train.learning_rate"),
    "optimizer.weight_decay": to("train.weight_decay"),
    "optimizer.eps": to("train.adam_epsilon"),
    "optimizer.betas": rules.betas,
    "lr_scheduler._component_": rules.scheduler,
    "lr_scheduler.num_warmup_steps": to("train.warmup_steps"),
    "log_every_n_steps": to("train.logging_steps"),
    "device": choose("model.device", {"cuda": "auto", "cpu": "cpu"}, "model.device: cpu, or the GPU"),
    "dtype": choose(
        "model.dtype", {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}, "model.dtype names the dtypes"
    ),
    "enable_activation_checkpointing": to("train.gradient_checkpointing"),
    "enable_activation_offloading": when_on(choose("memory.checkpoints", {True: "host"}, "")),
}  # fmt: skip
