"""Keys of scripts that are built on TRL's and read more than it does: the alignment handbook's, open-r1's, and those of
recipes that go around with a script of their own."""

from collections.abc import Iterator
from typing import Any

from qft.arrive.line import (
    Config,
    Kind,
    Line,
    Rule,
    choose,
    decided,
    fastest_attention,
    many,
    refused,
    sets,
    when_on,
)
from qft.arrive.shared import held_out, own_template, processes, said_to_shell, within

OTHER_TRAINERS = (
    "beta max_prompt_length max_completion_length loss_weights ref_model_name_or_path sync_ref_model "
    "precompute_ref_log_probs rpo_alpha f_divergence_type label_smoothing desirable_weight undesirable_weight "
    "reward_funcs reward_weights reward_model_name_or_path num_generations num_iterations epsilon epsilon_high "
    "scale_rewards temperature top_p top_k min_p repetition_penalty generation_batch_size steps_per_generation "
    "log_completions mask_truncated_completions use_vllm vllm_mode vllm_device vllm_gpu_memory_utilization "
    "vllm_max_model_len vllm_server_host vllm_server_port vllm_server_timeout vllm_tensor_parallel_size "
    "vllm_model_impl vllm_enable_sleep_mode center_rewards_coefficient"
)
"""What DPO, KTO, GRPO, reward models and their kin are told."""
A_SHARE = "a random share of the rows, there the first of them"
EVERY_COLUMN = "every column is read, and those that nothing knows are told: data.ignore_fields leaves them out"


def evaluates(config: Config) -> bool:
    """Whether anything is evaluated."""
    return any(config.get(key, "no") not in ("no", False) for key in ("eval_strategy", "evaluation_strategy"))


@sets("data.train", "data.eval")
def mixer(key: str, value: Any, config: Config) -> Iterator[Line]:
    """Names of data sets and the share of each, and in dataset_splits which splits: those of a test are held out."""
    splits, names = (
        config.get("dataset_splits", ["train", "test"]),
        config.get("dataset_configs") or [None] * len(value),
    )
    if not any("train" in split for split in splits):
        yield Line(key, Kind.UNSUPPORTED, f"none of dataset_splits has train in its name: {splits}")
    for field, told, asked in (("data.train", "train", True), ("data.eval", "test", evaluates(config))):
        found = []
        for (path, share), name in zip(value.items(), names, strict=True):
            more = {"weight": share} if told == "train" and share != 1 else {}
            more |= {"name": name} if name else {}
            of = [split for split in splits if told in split]
            for split in of:
                found += within({"path": config.local(path), "split": split, **more})
        if found and asked:
            text = A_SHARE if told == "train" and any(share != 1 for share in value.values()) else ""
            yield Line(key, Kind.OTHER_FIELD, text, {field: found})


@sets("data.train", "data.eval_fraction")
def mixture(key: str, value: Any, config: Config) -> Iterator[Line]:
    """dataset_mixture of the alignment handbook."""
    found = []
    for i, each in enumerate(value["datasets"]):
        made = {"path": config.local(each["id"]), "name": each.get("config"), "split": each.get("split")}
        weight = each.get("weight")
        found += within({name: mine for name, mine in made.items() if mine} | ({"weight": weight} if weight else {}))
        yield Line(f"{key}.datasets.{i}", Kind.OTHER_FIELD, A_SHARE if weight not in (None, 1) else "")
        if each.get("columns"):
            yield Line(f"{key}.datasets.{i}.columns", Kind.DECIDED, EVERY_COLUMN)
    yield Line(key, Kind.OTHER_FIELD, sets={"data.train": found})
    if value.get("test_split_size"):
        yield from held_out(f"{key}.test_split_size", value["test_split_size"], config)


@sets("data.train")
def rows(key: str, value: Any, config: Config) -> Iterator[Line]:
    """A data set of the hub with its split, or a file."""
    split = config.get("dataset_splits")
    is_file = value.endswith((".json", ".jsonl"))
    more = {"split": split} if isinstance(split, str) and not is_file else {}
    yield Line(key, Kind.OTHER_FIELD, sets={"data.train": within({"path": config.local(value), **more})})


def tokenizer(key: str, value: Any, config: Config) -> Iterator[Line]:
    if value == config.get("model_name_or_path"):
        yield Line(key, Kind.SAME, "the model's own")
    else:
        text = "the model's own tokenizer and chat template are used: give a template as data.chat_template"
        yield Line(key, Kind.UNSUPPORTED, f"{text}, or save the model with such a tokenizer")


SCRIPTS: dict[str, Rule] = {
    **many(
        {
            "with the data set: split and name of its source": "dataset_splits dataset_configs",
            "found from the model's own files": "use_fast_tokenizer",
            "the chat template decides of a missing system turn": "auto_insert_empty_system_msg",
            "kernels of qft's own (train.kernels, train.chunked_loss)": "use_liger use_liger_kernels use_unsloth",
        },
        decided,
    ),
    **many(
        {
            "export and publish afterwards: qft export": (
                "hub_model_revision overwrite_hub_revision push_to_hub_revision"
            ),
            "write a system turn into the rows": "system_prompt",
            "give the fields other names with columns of a source in data.train": "dataset_prompt_column",
            "qft eval scores answers": "benchmarks callbacks",
            "model.revision is that of code, too": "model_code_revision base_model_revision",
            "name layers with adapter.target_modules": "spectrum_config_path",
        },
        refused,
    ),
    **dict.fromkeys(["wandb_project", "wandb_entity", "wandb_run_group"], said_to_shell),
    "dataset_id_or_path": rows,
    "dataset_mixer": mixer,
    "dataset_mixture": mixture,
    "tokenizer_name_or_path": tokenizer,
    "preprocessing_num_workers": processes("data.num_proc"),
    "chat_template": own_template,
    "use_flash_attention_2": when_on(lambda key, value, config: [fastest_attention(key)]),
    "truncation_side": choose(
        "data.on_too_long", {"right": "truncate"}, "data.on_too_long truncate keeps the beginning"
    ),
}
"""By key."""
