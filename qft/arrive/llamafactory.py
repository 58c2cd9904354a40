"""LLaMA-Factory's keys (llamafactory.hparams of version 0.9.6, and transformers.TrainingArguments)."""

from collections.abc import Iterator, Mapping
from typing import Any

from qft.arrive import templates
from qft.arrive.line import (
    Config,
    Kind,
    Line,
    Rule,
    choose,
    decided,
    default,
    fastest_attention,
    ignored,
    many,
    refused,
    sets,
    to,
    when_on,
)
from qft.arrive.llamafactory_data import mixing, sources
from qft.arrive.shared import SEVERAL, beside, held_out, processes
from qft.arrive.trainer import TRAINER, trainer_defaults

NAME = "LLaMA-Factory"
TEMPLATES = {
    "alpaca.jinja": templates.ALPACA,
    "chatml.jinja": templates.CHATML,
    "default.jinja": templates.DEFAULT,
}
UNKNOWN = refused("LLaMA-Factory refuses a key that it does not know: remove it")
MARKS = ("stage", "finetuning_type", "template", "cutoff_len", "lora_rank", "dataset_dir", "quantization_bit")
"""Keys that no other tool with model_name_or_path has."""
OTHERS = ("dataset_name", "use_peft", "lora_r", "lora_target_modules", "load_in_4bit", "load_in_8bit", "max_seq_length")
"""TRL's."""


def knows(values: Mapping[str, Any]) -> bool:
    ours, theirs = (sum(mark in values for mark in marks) for marks in (MARKS, OTHERS))
    return "model_name_or_path" in values and ours > theirs


def flat(values: Mapping[str, Any]) -> Mapping[str, Any]:
    return values


def listed(value: str) -> list[str]:
    """What stands between commas."""
    return [name.strip() for name in value.split(",")]


@sets("quant.mode")
def bits(key: str, value: Any, config: Config) -> Iterator[Line]:
    if value not in (4, 8) or config.get("quantization_method", "bnb") not in ("bnb", "bitsandbytes"):
        yield Line(key, Kind.UNSUPPORTED, "bitsandbytes holds 4 or 8 bits: quantization_method bnb, quantization_bit 4")
    elif value == 8:
        yield Line(key, Kind.OTHER_FIELD, sets={"quant.mode": "8bit"})
    else:
        kind, double = config.get("quantization_type", "nf4"), config.get("double_quantization", True)
        held = {"quant.mode": "4bit", "quant.quant_type": kind, "quant.double_quant": double}
        yield Line(key, Kind.OTHER_FIELD, sets=held)


@sets("adapter.target_modules")
def targets(key: str, value: Any, config: Config) -> Iterator[Line]:
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
    all_of_them = names == ["all"]
    yield Line(key, Kind.OTHER_FIELD, sets={"adapter.target_modules": "all-linear" if all_of_them else names})


@sets("data.chat_template")
def template(key: str, value: Any, config: Config) -> Iterator[Line]:
    if config.get("stage") == "pt":
        yield Line(key, Kind.NO_EFFECT, "texts are not rendered")
    elif f"{value}.jinja" in TEMPLATES:
        text = "a line break behind the end token is there learnt with it"
        yield Line(key, Kind.OTHER_FIELD, text, {"data.chat_template": f"{value}.jinja"})
    elif value == "empty":
        yield Line(key, Kind.OTHER_FIELD, sets={"data.template": "none"})
    else:
        text = "the model's own chat template renders the rows: give another as data.chat_template"
        yield Line(key, Kind.DECIDED, text)


@sets("adapter.init_lora_weights")
def pissa(key: str, value: Any, config: Config) -> Iterator[Line]:
    steps = config.get("pissa_iter", 16)
    name = "pissa" if steps == -1 else f"pissa_niter_{steps}"
    yield Line(key, Kind.OTHER_FIELD, sets={"adapter.init_lora_weights": name})


def thinking(key: str, value: Any, config: Config) -> Iterator[Line]:
    text = "what the model's own chat template does with reasoning; data.template_kwargs {enable_thinking: …} tells it"
    yield Line(key, Kind.DECIDED, text)


@sets("data.loss_on", "data.packing")
def stage(key: str, value: Any, config: Config) -> Iterator[Line]:
    if value != "pt":
        yield from choose("adapter.kind", {"sft": None}, "qft learns from demonstrations: stage sft")(
            key, value, config
        )
        return
    fields: dict[str, Any] = {"data.loss_on": "all"}
    text = "plain texts, of which all is learnt"
    if config.get("packing", True):
        text += ": there cut into blocks of cutoff_len, here whole; a longer one stops the run, and is to be cut before"
    yield Line(key, Kind.OTHER_FIELD, text, fields if "packing" in config.values else {**fields, "data.packing": True})


@sets("adapter.kind")
def method(key: str, value: Any, config: Config) -> Iterator[Line]:
    kinds = {"lora": "lora", "full": "none"}
    yield from choose("adapter.kind", kinds, "adapter.kind lora, or none to train all weights")(key, value, config)


@sets("model.attn_implementation")
def attention(key: str, value: Any, config: Config) -> Iterator[Line]:
    name = {"disabled": "eager", "sdpa": "sdpa"}.get(value)
    if name:
        yield Line(key, Kind.OTHER_FIELD, sets={"model.attn_implementation": name})
    else:
        yield fastest_attention(key)


@sets("train.gradient_checkpointing")
def checkpointing(key: str, value: Any, config: Config) -> Iterator[Line]:
    yield Line(key, Kind.OTHER_FIELD, sets={"train.gradient_checkpointing": not value})


@sets("train.gradient_checkpointing")
def asked_of_trainer(key: str, value: Any, config: Config) -> Iterator[Line]:
    """The Trainer's own switch, which turns on what is on already."""
    if value:
        yield Line(key, Kind.SAME, sets={"train.gradient_checkpointing": True})
    else:
        yield Line(key, Kind.NO_EFFECT, "is on there all the same: disable_gradient_checkpointing: true says no")


def media(key: str, value: Any, config: Config) -> Iterator[Line]:
    """Where images lie; here in the folder of the rows' file, or wherever its rows say."""
    same = str(value).rstrip("/") == str(config.get("dataset_dir", "data")).rstrip("/")
    text = "images are found from the folder of the rows' file on"
    yield Line(key, Kind.SAME if same else Kind.UNSUPPORTED, text if same else f"{text}: write the rows so")


@sets("adapter.target_towers")
def frozen(key: str, value: Any, config: Config) -> Iterator[Line]:
    text = "" if value else "name their layers in adapter.target_modules, with adapter.target_towers: true"
    yield Line(key, Kind.SAME if value else Kind.UNSUPPORTED, text or "towers stay as they are")


def defaults(config: Config, fields: Mapping[str, Any]) -> Iterator[Line]:
    yield default("adapter.r", 8, "lora_rank")
    yield default("adapter.lora_alpha", 2 * fields.get("adapter.r", 8), "lora_alpha")
    yield default("data.max_length", 2048, "cutoff_len")
    cut = config.get("stage") == "pt" and config.get("packing", True)
    yield default("data.on_too_long", "stop" if cut else "truncate", "cutoff_len")
    yield default("train.gradient_checkpointing", True, "disable_gradient_checkpointing")
    yield default("train.bf16", False, "bf16")
    yield default("train.learning_rate", 5e-5, "learning_rate")
    yield from trainer_defaults(fields)


DECIDED = {
    SEVERAL: (
        "ray_num_workers ray_init_kwargs master_addr master_port use_mca use_megatron_bridge megatron_bridge_args "
        "use_hyper_parallel hyper_parallel_args hyper_parallel_cp_size ray_run_name ray_storage_path "
        "ray_storage_filesystem resources_per_worker placement_strategy"
    ),
    "found from the model's own files": ("use_fast_tokenizer model_max_length"),
    "prepared rows are kept within the run folder": (
        "overwrite_cache tokenized_path preprocessing_batch_size data_shared_file_system"
    ),
    "non-reentrant, always": "use_reentrant_gc",
    "kernels of qft's own (train.kernels, train.chunked_loss)": (
        "enable_liger_kernel use_unsloth use_unsloth_gc use_v1_kernels"
    ),
    "the report's page has the curves": "plot_loss include_effective_tokens_per_second print_param_status",
    "the calls of tools are rendered by the model's own chat template": "tool_format",
    "norms compute in float32 where the model's own code does": "upcast_layernorm upcast_lmhead_output",
    "images are sized by the model's own processor (its preprocessor_config.json)": (
        "image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches"
    ),
    "how a model is loaded": (
        "low_cpu_mem_usage device_map quantization_device_map cache_dir compute_dtype offload_folder "
        "split_special_tokens"
    ),
    "answers are greedy: eval.metrics": (
        "do_sample temperature top_p top_k num_beams repetition_penalty length_penalty skip_special_tokens "
        "eval_num_beams max_new_tokens max_length"
    ),
    "the hub's own login is used: hf auth login": "hf_hub_token ms_hub_token om_hub_token",
}
NO_EFFECT = {
    "no rows with videos or sounds are read": (
        "video_max_pixels video_min_pixels video_fps video_maxlen use_audio_in_video audio_sampling_rate"
    ),
    "no inference is asked for": (
        "infer_backend infer_dtype use_kv_cache vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank "
        "vllm_config sglang_maxlen sglang_mem_fraction sglang_tp_size sglang_config sglang_lora_backend"
    ),
    "of older versions, and no longer read": "visual_inputs reserved_label_len",
    "another method's": (
        "freeze_trainable_layers freeze_trainable_modules freeze_extra_modules oft_rank oft_block_size oft_target "
        "module_dropout"
    ),
    "stage sft does not read it": (
        "pref_beta pref_ftx pref_bco_weight pref_loss dpo_label_smoothing kto_chosen_weight kto_rejected_weight "
        "simpo_gamma ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards ref_model "
        "ref_model_adapters ref_model_quantization_bit reward_model reward_model_adapters "
        "reward_model_quantization_bit reward_model_type ld_alpha"
    ),
    "nothing is exported by a training": (
        "export_size export_device export_quantization_bit export_quantization_dataset "
        "export_quantization_nsamples export_quantization_maxlen export_legacy_format"
    ),
}
REMEDIES = {
    "train.optim names the optimizers that there are": (
        "use_galore galore_target galore_rank galore_update_interval galore_scale galore_proj_type "
        "galore_layerwise use_apollo apollo_target apollo_rank apollo_update_interval apollo_scale apollo_proj "
        "apollo_proj_type apollo_scale_type apollo_layerwise apollo_scale_front use_badam badam_mode "
        "badam_start_block badam_switch_mode badam_switch_interval badam_update_ratio badam_mask_mode "
        "badam_verbose use_adam_mini use_muon loraplus_lr_ratio loraplus_lr_embedding"
    ),
    "the loss is the mean over the tokens that are learnt": (
        "use_dft_loss use_asft_loss asft_alpha use_eaft_loss eaft_alpha ignore_pad_token_for_loss"
    ),
    "save the model with such a tokenizer or config.json": (
        "resize_vocab new_special_tokens_config init_special_tokens rope_scaling "
        "shift_attn mixture_of_depths train_from_scratch"
    ),
    "go on from the merged model: qft export --to merged": "adapter_name_or_path adapter_folder create_new_adapter",
    "write a system turn into the rows": "default_system",
    "prepare the rows so": "eval_on_each_dataset",
    "train.matmul: fp8 multiplies gradients by frozen weights in float8": (
        "fp8 fp8_backend fp8_enable_fsdp_float8_all_gather"
    ),
    "adapter.target_modules names layers": "use_llama_pro freeze_language_model",
    "bitsandbytes and LLM.int8() hold the base: quant.mode": (
        "use_kt kt_config kt_cpu_activation kt_weight_path "
        "kt_non_expert_weight_path kt_expert_checkpoint_path kt_use_lora_experts kt_lora_expert_num "
        "kt_lora_expert_intermediate_size"
    ),
    "early_stopping_patience counts evaluations; set train.early_stopping_patience": "early_stopping_steps",
    "train.report_to: tensorboard, wandb, mlflow or trackio": (
        "use_swanlab swanlab_project swanlab_workspace swanlab_run_name swanlab_mode swanlab_api_key "
        "swanlab_logdir swanlab_lark_webhook_url swanlab_lark_secret"
    ),
    "torch.profiler can be run around qft": (
        "enable_torch_profiler profiler_output_dir profiler_wait_steps profiler_warmup_steps "
        "profiler_active_steps profiler_repeat profiler_record_shapes profiler_profile_memory profiler_with_stack "
        "profile_modules"
    ),
    "export afterwards: qft export": "export_dir export_hub_model_id",
    "set eval.metrics": "compute_accuracy predict_with_generate",
}
TABLE: dict[str, Rule] = {
    **TRAINER,
    **many(DECIDED, decided),
    **many(NO_EFFECT, ignored),
    **many(REMEDIES, refused),
    "model_name_or_path": to("model.path"),
    "model_revision": to("model.revision"),
    "trust_remote_code": to("model.trust_remote_code"),
    "stage": stage,
    "do_train": choose("adapter.kind", {True: None}, "qft eval and qft chat take what is trained"),
    "do_eval": decided("held-out rows are evaluated before and after, and by train.eval_strategy"),
    "do_predict": refused("qft eval RECIPE"),
    "finetuning_type": method,
    "lora_rank": to("adapter.r"),
    "lora_alpha": to("adapter.lora_alpha"),
    "lora_dropout": to("adapter.lora_dropout"),
    "lora_target": targets,
    "additional_target": to("adapter.modules_to_save", listed),
    "add_tokens": to("model.add_tokens", listed),
    "add_special_tokens": to("model.add_special_tokens", listed),
    "use_rslora": to("adapter.use_rslora"),
    "use_dora": to("adapter.use_dora"),
    "pissa_init": when_on(pissa),
    "pissa_iter": beside("pissa_init"),
    "pissa_convert": when_on(refused("qft export --to merged adds the adapter to its own base weights")),
    "quantization_bit": bits,
    "quantization_method": beside("quantization_bit"),
    "quantization_type": beside("quantization_bit"),
    "double_quantization": beside("quantization_bit"),
    "pure_bf16": when_on(choose("model.dtype", {True: "bfloat16"}, "model.dtype")),
    "flash_attn": attention,
    "moe_aux_loss_coef": to("train.router_aux_loss_coef"),
    "disable_gradient_checkpointing": checkpointing,
    "gradient_checkpointing": asked_of_trainer,
    "dataset": sources("data.train"),
    "eval_dataset": sources("data.eval"),
    "media_dir": media,
    "freeze_vision_tower": frozen,
    "freeze_multi_modal_projector": frozen,
    "dataset_dir": decided("where dataset_info.json lies, by which the data sets are found"),
    "split": choose("adapter.kind", {"train": None}, "give it as the split of a source in data.train"),
    "mix_strategy": mixing,
    "interleave_probs": beside("mix_strategy"),
    "streaming": to("data.streaming"),
    "buffer_size": beside("streaming"),
    "disable_shuffling": when_on(choose("train.train_sampling_strategy", {True: "sequential"}, "")),
    "max_samples": beside("dataset"),
    "template": template,
    "cutoff_len": to("data.max_length"),
    "train_on_prompt": when_on(choose("data.loss_on", {True: "all"}, "data.loss_on")),
    "mask_history": when_on(choose("data.loss_on", {True: "last_assistant"}, "data.loss_on")),
    "preprocessing_num_workers": processes("data.num_proc"),
    "val_size": when_on(held_out),
    "packing": to("data.packing", text="packed rows see each other there, unless neat_packing is set"),
    "neat_packing": to("data.packing"),
    "block_diag_attn": decided("rows that are packed never see each other"),
    "enable_thinking": thinking,
    "preserve_thinking": thinking,
}
