"""Silence for what the libraries print of their own accord: qft says each thing once, itself."""

from __future__ import annotations

import logging
import os
import warnings

__all__ = ["quiet_libraries"]

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
    for name in ("bitsandbytes", "accelerate", "peft", "torch.utils.tensorboard", "matplotlib", "lm_eval"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message, category in HARMLESS:
        warnings.filterwarnings("ignore", message=message, category=category)

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
