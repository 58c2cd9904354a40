"""How the libraries are set up, by variables that they read while they are imported: silent, since qft says each thing
once, itself; and on a machine without a GPU with threads that sleep while they wait."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

GPUS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""Where the drivers of NVIDIA, of AMD and of Windows below Linux are: seen without torch, which is not loaded yet."""

VARIABLES = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "critical",  # what it cannot read is raised, too
    "HF_HUB_VERBOSITY": "error",
    "TQDM_DISABLE": "1",  # of third parties; downloads keep theirs
    # compressed-tensors insists on two bars of a moment each; those of downloads appear a little later.
    "TQDM_DELAY": "5",
    "AR_LOG_LEVEL": "ERROR",  # auto-round, which sets its logger up by it when it is imported
}

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Names of the one variable that sets up torch's GPU allocator, which reads it before its first use."""
EXPANDABLE = "expandable_segments:True"
"""Batches differ in length: segments that grow serve them all, where others would each fit one and lie idle."""

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
    # peft sets it itself, for models whose layers are Conv1D.
    (r"fan_in_fan_out is set to False but", UserWarning),
    # peft looks for the base's vocabulary size, which qft never changes.
    (r"Could not find a config file in", UserWarning),
    # peft turns it over itself for the transposed weights of GPT-2's layers.
    (r"fan_in_fan_out is set to False but the target module is .Conv1D.", UserWarning),
    # peft makes these patterns itself, for experts that transformers 5 has fused, and then looks for their modules.
    (r"The following (rank|alpha)_pattern keys did not match", RuntimeWarning),
    # transformers asks for a workspace that makes cuBLAS deterministic, which is smaller than what torch asks for.
    (r"Requested unified CUBLASLT workspace size", UserWarning),
)


def prepare_libraries() -> None:
    """Call before the libraries are imported: they read their environment, and speak, while they are."""
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    if not any(Path(path).exists() for path in GPUS):
        # Threads that spin while one of them waits for a core are slower by far than threads that sleep.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if sys.platform == "linux" and Path(GPUS[0]).exists() and not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = EXPANDABLE  # which only CUDA on Linux has
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    for message, category in HARMLESS:
        warnings.filterwarnings("ignore", message=message, category=category)

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def allocator_settings() -> str:
    """What the variable of the GPU's allocator says."""
    given = next((f"{name}={os.environ[name]}" for name in ALLOCATOR if name in os.environ), None)
    return given or "torch's defaults"


DETERMINISM = (
    *("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC"),
    *("ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC"),
)
"""Variables that transformers sets for train.full_determinism."""


@contextmanager
def own_determinism() -> Iterator[None]:
    """Within, train.full_determinism may change the process, which others train in afterwards."""
    import torch

    before = {name: os.environ.get(name) for name in DETERMINISM}
    algorithms, cudnn = torch.get_deterministic_debug_mode(), torch.backends.cudnn
    flags = cudnn.deterministic, cudnn.benchmark
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(algorithms)  # which warns, too, if it did
        cudnn.deterministic, cudnn.benchmark = flags
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({name: value} if value is not None else {})
