"""Silence for what the libraries print of their own accord: qft says each thing once, itself."""

from __future__ import annotations

import logging
import os
import warnings

__all__ = ["quiet_libraries"]

LOGGERS = (
    "bitsandbytes",
    "accelerate",
    "peft",
    "torch.utils.tensorboard",
    "matplotlib",
    "lm_eval",
    # It tries every kernel library that it ships, those for other Pythons and for absent GPUs too.
    "torchao",
    # torchao registers enums in a way that torch has outgrown.
    "torch.utils._pytree",
)

HARMLESS = (
    # transformers calls its own renamed property.
    (r".is_gradient_checkpointing. is deprecated", FutureWarning),
    # LLM.int8() computes outliers in float16, whatever the activations are.
    (r"MatMul8bitLt: inputs will be cast", UserWarning),
    # peft looks for the base's vocabulary size, which qft never changes.
    (r"Could not find a config file in", UserWarning),
)


def quiet_libraries() -> None:
    """Call before the libraries are imported: some speak while they are."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")  # of third parties; downloads keep theirs
    # compressed-tensors insists on two bars of a moment each; those of downloads appear a little later.
    os.environ.setdefault("TQDM_DELAY", "5")
    os.environ.setdefault("AR_LOG_LEVEL", "ERROR")  # auto-round, which sets its logger up by it when it is imported
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    for message, category in HARMLESS:
        warnings.filterwarnings("ignore", message=message, category=category)

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
