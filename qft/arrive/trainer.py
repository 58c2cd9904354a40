"""Keys of transformers.TrainingArguments, which LLaMA-Factory and TRL have among theirs."""

from collections.abc import Iterator, Mapping
from typing import Any

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
    strategy,
    to,
    when_on,
)
from qft.arrive.shared import SEVERAL, beside, optimizer, processes, pushed, report_to, resumed, steps

SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)


@sets("train.report_to")
def trackers(key: str, value: Any, config: Config) -> Iterator[Line]:
    names = [name for name in ([value] if isinstance(value, str) else value) if name != "none"]
    names = ["tensorboard"] if names == ["all"] else names
    yield report_to(key, names)


@sets("train.warmup_steps")
def warmup(key: str, value: Any, config: Config) -> Iterator[Line]:
    if config.get("warmup_steps"):
        yield Line(key, Kind.NO_EFFECT, "warmup_steps is given")
    else:
        yield Line(key, Kind.OTHER_FIELD, sets={"train.warmup_steps": value})


@sets("memory.checkpoints")
def checkpointing(key: str, value: Any, config: Config) -> Iterator[Line]:
    for name, each in value.items():
        if name == "offload":
            yield Line(f"{key}.{name}", Kind.OTHER_FIELD, sets={"memory.checkpoints": "host" if each else "device"})
        elif name == "every_n_layers" and each != 1:
            text = "train.gradient_checkpointing: auto computes as few blocks again as must be"
            yield Line(f"{key}.{name}", Kind.UNSUPPORTED, text)
        else:
            yield Line(f"{key}.{name}", Kind.DECIDED, "each block by itself, non-reentrant, always")


def trainer_defaults(fields: Mapping[str, Any], logging_steps: int = 500) -> Iterator[Line]:
    """What a Trainer does without a key, where qft does another; `logging_steps` is their default."""
    if fields.get("train.eval_strategy") == "steps":
        often = fields.get("train.logging_steps", logging_steps)
        yield default("train.eval_steps", often, "eval_steps, which is logging_steps then")
    yield default("train.per_device_train_batch_size", 8, "per_device_train_batch_size")
    yield default("train.gradient_accumulation_steps", 1, "gradient_accumulation_steps")
    yield default("train.num_train_epochs", 3, "num_train_epochs")
    yield default("train.warmup_steps", 0, "warmup_steps")
    yield default("train.optim", "adamw_torch_fused", "optim")
    yield default("train.save_strategy", "steps", "save_strategy")
    yield default("train.save_total_limit", None, "save_total_limit")
    yield default("seed", 42, "seed")


DECIDED = {
    SEVERAL: (
        "deepspeed fsdp fsdp_config fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap accelerator_config "
        "parallelism_config"
    ),
    "an earlier run is replaced by qft train --overwrite": "overwrite_output_dir",
    "checkpoints hold the optimizer too, so that a run can go on": "save_only_model save_on_each_node",
    "non-reentrant, always": "gradient_checkpointing_kwargs",
    "the eval loss is what the best is chosen by": "metric_for_best_model greater_is_better",
    "held-out rows are measured as the training computes": "bf16_full_eval",
    "evaluated once before the training, too": "eval_on_start",
    "only the loss is kept of an evaluation": (
        "prediction_loss_only eval_accumulation_steps include_for_metrics eval_do_concat_batches "
        "eval_use_gather_object batch_eval_metrics"
    ),
    "how batches are brought to the device": (
        "dataloader_prefetch_factor dataloader_persistent_workers dataloader_multiprocessing_context "
        "dataloader_in_order remove_unused_columns"
    ),
    "kernels of qft's own (train.kernels, train.chunked_loss)": "use_liger_kernel liger_kernel_config",
    "curves and log of a run": (
        "logging_dir logging_first_step logging_nan_inf_filter log_level log_level_replica disable_tqdm "
        "include_num_input_tokens_seen include_tokens_per_second skip_memory_metrics"
    ),
    "the loss is averaged over the tokens of a step": "average_tokens_across_devices",
    "one process": (
        "local_rank ddp_backend log_on_each_node ddp_timeout ddp_find_unused_parameters ddp_bucket_cap_mb "
        "ddp_broadcast_buffers ddp_static_graph"
    ),
    "a loss that is no number stops the run (train.on_nonfinite)": "debug",
    "safetensors, always": "save_safetensors",
    "a signal has a checkpoint written (train.save_on_signal)": "enable_jit_checkpoint",
    "the labels are those of data.loss_on": "label_names",
}
REMEDIES = {
    "train.lr_scheduler_type names the shapes that there are": "lr_scheduler_kwargs",
    "train.optim and its adam_* fields are what an optimizer is told": "optim_args optim_target_modules",
    "set torch's own environment variables": (
        "torch_compile_backend torch_compile_mode torch_empty_cache_steps jit_mode_eval"
    ),
    "data.max_length and train.per_device_train_batch_size: auto fit a training to its memory": (
        "auto_find_batch_size"
    ),
    "the seed of the rows is that of all: seed": "data_seed",
    "every row is trained on": "dataloader_drop_last ignore_data_skip",
    "model.device: cpu": "use_cpu no_cuda use_mps_device",
    "evaluated after as many steps each time: train.eval_steps": "eval_delay",
    "a checkpoint's adapter is continued by --resume alone": "restore_callback_states_from_checkpoint",
    "group by length alone: train.train_sampling_strategy": "length_column_name",
    "float32 sums": "fp16_full_eval half_precision_backend fp16_opt_level",
}
TRAINER: dict[str, Rule] = {
    **many(DECIDED, decided),
    **many(REMEDIES, refused),
    "output_dir": to("output_dir"),
    "seed": to("seed"),
    "per_device_train_batch_size": to("train.per_device_train_batch_size"),
    "per_device_eval_batch_size": to("train.per_device_eval_batch_size"),
    "gradient_accumulation_steps": to("train.gradient_accumulation_steps"),
    "num_train_epochs": to("train.num_train_epochs"),
    "max_steps": to("train.max_steps"),
    "learning_rate": to("train.learning_rate"),
    "lr_scheduler_type": choose(
        "train.lr_scheduler_type",
        {name: name for name in SCHEDULERS},
        f"train.lr_scheduler_type: {', '.join(SCHEDULERS)}",
    ),
    "warmup_steps": to("train.warmup_steps"),
    "warmup_ratio": warmup,
    "weight_decay": to("train.weight_decay"),
    "adam_beta1": to("train.adam_beta1"),
    "adam_beta2": to("train.adam_beta2"),
    "adam_epsilon": to("train.adam_epsilon"),
    "max_grad_norm": to("train.max_grad_norm"),
    "optim": optimizer,
    "bf16": choose("train.bf16", {True: True, False: False}, "train.bf16"),
    "fp16": choose("train.fp16", {True: True, False: False}, "train.fp16"),
    "tf32": to("train.tf32"),
    "gradient_checkpointing": to("train.gradient_checkpointing"),
    "activation_checkpointing": to("train.gradient_checkpointing"),
    "activation_checkpointing_kwargs": checkpointing,
    "torch_compile": to("train.torch_compile"),
    "neftune_noise_alpha": to("train.neftune_noise_alpha"),
    "label_smoothing_factor": to("train.label_smoothing_factor"),
    "train_sampling_strategy": to("train.train_sampling_strategy"),
    "group_by_length": when_on(choose("train.train_sampling_strategy", {True: "group_by_length"}, "")),
    "dataloader_num_workers": processes("train.dataloader_num_workers"),
    "dataloader_pin_memory": to("train.dataloader_pin_memory"),
    "logging_steps": steps("train.logging_steps"),
    "logging_strategy": decided("every train.logging_steps steps"),
    "eval_strategy": to("train.eval_strategy", strategy),
    "evaluation_strategy": to("train.eval_strategy", strategy),
    "eval_steps": steps("train.eval_steps"),
    "save_strategy": to("train.save_strategy", strategy),
    "save_steps": steps("train.save_steps"),
    "save_total_limit": to("train.save_total_limit"),
    "load_best_model_at_end": to("train.load_best_model_at_end"),
    "full_determinism": to("train.full_determinism"),
    "report_to": trackers,
    "run_name": to("train.run_name"),
    "project": ignored("trackio's own"),
    "resume_from_checkpoint": resumed,
    "push_to_hub": when_on(pushed),
    **dict.fromkeys(
        ["hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push", "hub_revision"],
        beside("push_to_hub", Kind.DECIDED),
    ),
    "use_cache": ignored("a training keeps no keys and values"),
    **many({"read by scripts, and not by the Trainer": "do_train do_eval do_predict"}, ignored),
    **many(
        {"set what trackio reads in the environment": "trackio_space_id trackio_bucket_id trackio_static_space_id"},
        refused,
    ),
}
