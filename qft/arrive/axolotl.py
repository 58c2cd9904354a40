"""Axolotl's keys (axolotl.utils.schemas of version 0.18), and what becomes of each."""

from collections.abc import Iterator, Mapping
from typing import Any

from qft.arrive import axolotl_rules as rules
from qft.arrive import shared, templates
from qft.arrive.axolotl_data import sources
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
    number,
    refused,
    strategy,
    to,
    when_on,
)
from qft.arrive.shared import SEVERAL

NAME = "Axolotl"
TEMPLATES = {
    "alpaca.jinja": templates.ALPACA,
    "alpaca-chat.jinja": templates.ALPACA_CHAT,
    "alpaca-phi.jinja": templates.ALPACA_PHI,
    "alpaca-chatml.jinja": templates.ALPACA_CHATML,
    "alpaca-concise.jinja": templates.ALPACA_CONCISE,
    "alpaca-turns.jinja": templates.ALPACA_TURNS,
    "alpaca-unprompted.jinja": templates.ALPACA_UNPROMPTED,
    "open-orca.jinja": templates.OPEN_ORCA,
    "open-orca-chatml.jinja": templates.OPEN_ORCA_CHATML,
    "chatml.jinja": templates.CHATML,
}
UNKNOWN = ignored("Axolotl knows no such key, and says nothing")


def knows(values: Mapping[str, Any]) -> bool:
    return "base_model" in values


def flat(values: Mapping[str, Any]) -> Mapping[str, Any]:
    return values


def defaults(config: Config, fields: Mapping[str, Any]) -> Iterator[Line]:
    yield default("adapter.kind", "lora" if config.get("adapter") else "none", "adapter")
    yield default("data.max_length", 512, "sequence_len")
    texts = any(source.get("format") == "text" for source in fields.get("data.train", ()))
    yield default("data.on_too_long", "stop" if texts else "skip", "excess_length_strategy")
    yield default("train.lr_scheduler_type", "cosine", "lr_scheduler")
    yield default("train.optim", "adamw_torch_fused", "optimizer")
    yield default("train.gradient_accumulation_steps", 1, "gradient_accumulation_steps")
    yield default(
        "train.per_device_eval_batch_size", fields.get("train.per_device_train_batch_size", 1), "eval_batch_size"
    )
    yield default("train.save_total_limit", 4, "save_total_limit")
    yield default("seed", 42, "seed")


DECIDED = {
    SEVERAL: (
        "fsdp fsdp_config fsdp_version fsdp_final_state_dict_type deepspeed deepcompile dp_shard_size "
        "dp_replicate_size use_ray ray_num_workers ray_run_name resources_per_worker accelerator_config"
    ),
    "how rows are laid out, which changes no loss: data.packing, data.padding_free": (
        "eval_sample_packing pad_to_sequence_len pad_to_multiple_of sample_packing_group_size "
        "sample_packing_bin_size sample_packing_mp_start_method batch_flattening max_packed_sequence_len "
        "sample_packing_sequentially multipack_real_batches sample_packing_eff_est"
    ),
    "the fastest that computes the same; model.attn_implementation names one": (
        "flash_attention xformers_attention sdp_attention flex_attention sage_attention eager_attention "
        "flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_mlp flash_optimum flex_attn_compile_kwargs "
        "gemma4_hybrid_attn_impl flash_attn_d512 sdpa_varlen fused_attn_kernel large_head_attention "
        "experts_implementation"
    ),
    "kernels of qft's own (train.kernels, train.chunked_loss)": (
        "lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel liger_rope liger_rms_norm "
        "liger_rms_norm_gated liger_layer_norm liger_swiglu liger_glu_activation liger_cross_entropy "
        "liger_fused_linear_cross_entropy liger_use_token_scaling cut_cross_entropy chunked_cross_entropy "
        "chunked_cross_entropy_num_chunks use_scattermoe use_sonicmoe use_kernels moe_grouped_backend "
        "moe_bnb_fast moe_dequant_chunk_size expert_backend tiled_mlp tiled_mlp_num_shards "
        "tiled_mlp_use_original_mlp"
    ),
    "experts are held as quant.mode says": "quantize_moe_experts llama4_linearized_experts",
    "found from the model's own files": (
        "model_type type_of_model tokenizer_type tokenizer_use_fast "
        "tokenizer_legacy processor_type processor_kwargs is_falcon_derived_model is_llama_derived_model "
        "is_mistral_derived_model is_qwen_derived_model tokenizer_use_mistral_common lora_fan_in_fan_out "
        "tokenizer_save_jinja_files peft_layers_pattern"
    ),
    "prepared rows are kept within the run folder": (
        "dataset_prepared_path skip_prepare_dataset dataset_keep_in_memory num_dataset_shards_to_save "
        "remove_unused_columns dataset_shard_num dataset_shard_idx"
    ),
    "qft train --resume goes on where a run ended": "auto_resume_from_checkpoints",
    "non-reentrant, always": "gradient_checkpointing_kwargs",
    "the end of each assistant turn is learnt, as the chat template writes it": "eot_tokens",
    "rows are shuffled once all sources are one": "shuffle_merged_datasets shuffle_before_merging_datasets",
    "a loss that is no number stops the run (train.on_nonfinite)": "loss_watchdog_threshold loss_watchdog_patience",
    "the eval loss is what the best is chosen by": "metric_for_best_model greater_is_better",
    "memory and tokens a second are always reported": (
        "include_tokens_per_second include_tkps use_otel_metrics otel_metrics_host otel_metrics_port "
        "profiler_steps profiler_steps_start"
    ),
    "perplexity is always reported; scores are eval.metrics": (
        "do_causal_lm_eval eval_causal_lm_metrics eval_table_size eval_max_new_tokens"
    ),
    "how a model is loaded": (
        "low_cpu_mem_usage device_map max_memory gpu_memory_limit device lora_on_cpu "
        "experimental_skip_move_to_device qlora_sharded_model_loading embeddings_skip_upcast fp32_norms "
        "fp32_norm_classes save_safetensors gc_steps gc_collect_steps torch_empty_cache_steps "
        "dataloader_prefetch_factor peft_autocast_adapter_dtype"
    ),
    "adapters and their optimizer are kept whole in each checkpoint": "save_only_model save_first_step",
    "one process": (
        "local_rank world_size ddp ddp_timeout ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers"
    ),
}
NO_EFFECT = {
    "Axolotl itself no longer reads it": (
        "strict torchdistx_path gptq_groupsize gptq_model_v1 debug lora_target_linears bfloat16_full_eval"
    ),
    "made by Axolotl itself": "axolotl_config_path is_preprocess total_num_tokens total_supervised_tokens",
}
REMEDIES = {
    "long rows are split over GPUs there: memory.offload and train.gradient_checkpointing take less of one": (
        "sequence_parallel_degree context_parallel_size heads_k_stride ring_attn_func tensor_parallel_size "
        "expert_parallel_size expert_parallel_num_nvl_bytes expert_parallel_token_capacity"
    ),
    "qft learns from demonstrations: train on the chosen answers": (
        "rl trl vllm ebft reward_model process_reward_model center_rewards_coefficient num_labels "
        "dpo_use_weighting dpo_label_smoothing precompute_ref_log_probs dpo_use_liger_kernel dpo_padding_free "
        "dpo_loss_type dpo_loss_weights max_prompt_len orpo_alpha simpo_gamma cpo_alpha kto_desirable_weight "
        "kto_undesirable_weight rl_beta dpo_beta dpo_use_logits_to_keep dpo_generate_during_eval dpo_norm_loss "
        "rpo_alpha trainer_cls"
    ),
    "name layers with adapter.target_modules, or modules to train in full with adapter.modules_to_save": (
        "unfrozen_parameters freeze_mm_modules lora_rank_pattern lora_alpha_pattern peft_layer_replication "
        "peft_trainable_token_indices peft_ensure_weight_tying lr_groups embedding_lr embedding_lr_scale "
        "loraplus_lr_ratio loraplus_lr_embedding lisa_n_layers lisa_step_interval lisa_layers_attribute"
    ),
    "go on from the merged model: qft export --to merged, or base_model of a merged adapter": (
        "lora_model_dir relora relora_prune_ratio relora_prune_method relora_cpu_offload jagged_restart_steps "
        "jagged_restart_warmup_steps jagged_restart_anneal_steps merge_lora merge_method"
    ),
    "train.lr_scheduler_type names the shapes that there are": (
        "lr_scheduler_kwargs cosine_min_lr_ratio cosine_constant_lr_ratio lr_div_factor lr_quadratic_warmup"
    ),
    "train.optim and its adam_* fields are what an optimizer is told": (
        "optim_args optim_target_modules adam_epsilon2 adam_beta3 dion_lr dion_momentum dion_rank_fraction "
        "dion_rank_multiple_of qgalore_rank qgalore_update_proj_gap qgalore_scale qgalore_proj_type "
        "qgalore_proj_quant qgalore_proj_bits qgalore_proj_group_size qgalore_cos_threshold qgalore_gamma_proj "
        "qgalore_queue_size"
    ),
    "export and publish afterwards: qft export": "hub_revision quantization hf_mlflow_log_artifacts",
    "upload the rows by themselves: hf upload": "push_dataset_to_hub",
    "train.matmul: fp8 multiplies gradients by frozen weights in float8": "fp8 fp8_enable_fsdp_float8_all_gather",
    "a model that comes quantized is taken as it is; see docs/models.md": (
        "gptq gptq_disable_exllama model_quantization_config model_quantization_config_kwargs use_onebitllms "
        "nonexpert_quantization"
    ),
    "quant.mode qat trains for a format: quant.target": (
        "qat nvfp4_merge_aware nvfp4_merge_aware_start_step "
        "dsv4_fp4_grouped_mode use_dsv4_kernels use_glm_dsa_kernels gemma4_fp8_nonexpert gemma4_nf4_nonexpert "
        "dsv4_fp8_nonexpert_mode dsv4_fp8_lora_kernel dsv4_shared_mlp_lora_kernel dsv4_bf16_all"
    ),
    "save the model with such a tokenizer or config.json": (
        "added_tokens_overrides overrides_of_model_config overrides_of_model_kwargs rope_scaling "
        "resize_token_embeddings_to_32x mean_resizing_embeddings shrink_embeddings fix_untrained_tokens "
        "reinit_weights scaling_softmax scaling_softmax_factor scaling_softmax_bias cls_model_config"
    ),
    "plain texts: name them in data.train, each with format: text, and read them with data.streaming": (
        "pretraining_dataset streaming"
    ),
    "prepare the rows so": (
        "streaming_multipack_buffer_size pretrain_multipack_buffer_size "
        "pretrain_multipack_attn pretraining_sample_concatenation preprocess_iterable curriculum_sampling "
        "min_sample_len use_pose pose_split_on_token_ids pose_max_context_len pose_num_chunks "
        "dataset_exact_deduplication default_system_message eval_sequence_len role_boundaries s2_attention "
        "dataloader_drop_last"
    ),
    "the loss is the mean over the tokens that are learnt": "use_eaft eaft_alpha eaft_k",
    "images are sized by the model's own processor (its preprocessor_config.json)": (
        "image_size image_resize_algorithm"
    ),
    "layers wait off the device with memory.offload": "layer_offloading selective_checkpointing",
    "qft eval scores answers, qft chat shows them": (
        "do_bench_eval bench_dataset bench_split generate_samples num_generation_samples "
        "generation_max_new_tokens generation_temperature generation_top_p generation_top_k "
        "generation_prompt_ratio generation_do_sample gradio_title gradio_share gradio_server_name "
        "gradio_server_port gradio_max_new_tokens gradio_temperature"
    ),
    "train.report_to: tensorboard, wandb, mlflow or trackio": (
        "use_comet comet_api_key comet_workspace comet_project_name comet_experiment_key comet_mode comet_online "
        "comet_experiment_config use_swanlab swanlab_project swanlab_experiment_name swanlab_description "
        "swanlab_mode swanlab_workspace swanlab_api_key swanlab_log_model swanlab_log_completions "
        "swanlab_web_host swanlab_api_host"
    ),
    "set it by the step counts of train": "auto_find_batch_size dynamic_checkpoint",
    "set torch's own environment variables": "torch_compile_backend torch_compile_mode torch_compile_options",
}
TABLE: dict[str, Rule] = {
    **many(DECIDED, decided),
    **many(NO_EFFECT, ignored),
    **many(REMEDIES, refused),
    "base_model": to("model.path"),
    "tokenizer_config": shared.of_model("base_model", "save the model with such a tokenizer"),
    "base_model_config": shared.of_model("base_model", "save the model with such a config.json"),
    "revision_of_model": to("model.revision"),
    "trust_remote_code": to("model.trust_remote_code"),
    "output_dir": to("output_dir"),
    "adapter": rules.adapter,
    "load_in_4bit": rules.in_4bit,
    "load_in_8bit": rules.in_8bit,
    "bnb_config_kwargs": rules.bnb_config,
    "lora_r": to("adapter.r"),
    "lora_alpha": to("adapter.lora_alpha"),
    "lora_dropout": to("adapter.lora_dropout"),
    "lora_target_modules": rules.modules,
    "lora_target_linear": when_on(choose("adapter.target_modules", {True: "all-linear"}, "name layers")),
    "lora_target_parameters": shared.experts,
    "lora_modules_to_save": to("adapter.modules_to_save"),
    "peft": rules.loftq,
    "peft_use_dora": to("adapter.use_dora"),
    "peft_use_rslora": to("adapter.use_rslora"),
    "peft_layers_to_transform": to("adapter.layers_to_transform"),
    "peft_init_lora_weights": when_on(
        choose(
            "adapter.init_lora_weights",
            {True: "default", "gaussian": "gaussian", "pissa": "pissa", "olora": "olora", "loftq": "loftq"},
            "adapter.init_lora_weights has default, gaussian, pissa, olora and loftq",
        )
    ),
    "datasets": sources("data.train"),
    "test_datasets": sources("data.eval"),
    "val_set_size": shared.held_out,
    "chat_template": rules.template,
    "chat_template_jinja": rules.jinja,
    "chat_template_kwargs": to("data.template_kwargs"),
    "train_on_inputs": choose("data.loss_on", {True: "all", False: "assistant"}, "data.loss_on"),
    "special_tokens": rules.tokens,
    "sample_packing": choose("data.packing", {True: True, False: False}, "data.packing"),
    "tokens": to("model.add_tokens"),
    "sequence_len": to("data.max_length"),
    "excess_length_strategy": choose(
        "data.on_too_long", {"drop": "skip", "truncate": "truncate", "raise": "stop"}, "data.on_too_long"
    ),
    "dataset_num_proc": shared.processes("data.num_proc"),
    "dataset_processes": shared.processes("data.num_proc"),
    "micro_batch_size": to("train.per_device_train_batch_size"),
    "eval_batch_size": to("train.per_device_eval_batch_size"),
    "batch_size": rules.batch_size,
    "gradient_accumulation_steps": to("train.gradient_accumulation_steps"),
    "num_epochs": to("train.num_train_epochs", number),
    "max_steps": to("train.max_steps"),
    "learning_rate": to("train.learning_rate"),
    "lr_scheduler": to("train.lr_scheduler_type", str),
    "warmup_steps": to("train.warmup_steps"),
    "warmup_ratio": rules.warmup_ratio,
    "weight_decay": to("train.weight_decay"),
    "optimizer": shared.optimizer,
    "adam_beta1": to("train.adam_beta1"),
    "adam_beta2": to("train.adam_beta2"),
    "adam_epsilon": to("train.adam_epsilon"),
    "max_grad_norm": to("train.max_grad_norm"),
    "neftune_noise_alpha": to("train.neftune_noise_alpha"),
    "noisy_embedding_alpha": to("train.neftune_noise_alpha"),
    "bf16": rules.bf16,
    "bfloat16": when_on(choose("model.dtype", {True: "bfloat16"}, "model.dtype")),
    "fp16": choose("train.fp16", {True: True, False: False}, "train.fp16"),
    "float16": when_on(choose("model.dtype", {True: "float16"}, "model.dtype")),
    "float32": when_on(choose("model.dtype", {True: "float32"}, "model.dtype")),
    "tf32": to("train.tf32"),
    "torch_compile": when_on(choose("train.torch_compile", {True: True, "auto": None}, "train.torch_compile")),
    "attn_implementation": shared.attention,
    "gradient_checkpointing": rules.checkpointing,
    "activation_offloading": when_on(
        lambda key, value, config: [
            Line(key, Kind.OTHER_FIELD, "with train.gradient_checkpointing", {"memory.checkpoints": "host"})
        ]
    ),
    "group_by_length": when_on(choose("train.train_sampling_strategy", {True: "group_by_length"}, "")),
    "dataloader_num_workers": shared.processes("train.dataloader_num_workers"),
    "dataloader_pin_memory": to("train.dataloader_pin_memory"),
    "logging_steps": to("train.logging_steps"),
    "eval_strategy": to("train.eval_strategy", strategy),
    "evaluation_strategy": to("train.eval_strategy", strategy),
    "eval_steps": rules.steps_between("eval"),
    "evals_per_epoch": when_on(rules.a_time_or_more("eval", "evaluated")),
    "save_strategy": to("train.save_strategy", strategy),
    "save_steps": rules.steps_between("save"),
    "saves_per_epoch": when_on(rules.a_time_or_more("save", "saved")),
    "save_total_limit": to("train.save_total_limit"),
    "load_best_model_at_end": to("train.load_best_model_at_end"),
    "early_stopping_patience": rules.patience,
    "seed": to("seed"),
    "model_config": rules.router,
    "plugins": rules.plugins,
    "resume_from_checkpoint": shared.resumed,
    "hub_model_id": when_on(shared.pushed),
    "hub_strategy": shared.beside("hub_model_id", Kind.DECIDED),
    "wandb_name": to("train.run_name", str),
    "mlflow_run_name": to("train.run_name", str),
    "trackio_run_name": to("train.run_name", str),
    "hf_use_auth_token": decided("the hub's own login is used: hf auth login"),
    **dict.fromkeys(
        [
            "use_wandb",
            "wandb_project",
            "use_mlflow",
            "mlflow_tracking_uri",
            "use_tensorboard",
            "use_trackio",
            "trackio_project_name",
        ],
        when_on(rules.tracking),
    ),
    **dict.fromkeys(
        [
            "wandb_entity",
            "wandb_watch",
            "wandb_log_model",
            "wandb_run_id",
            "wandb_mode",
            "mlflow_experiment_name",
            "trackio_space_id",
        ],
        when_on(shared.said_to_shell),
    ),
}
