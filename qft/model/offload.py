"""A base model of which two blocks at a time are on the device, and its embeddings on the host: load_base's, otherwise.

It is never whole on the device, nor, unless the checkpoint comes quantized, on the host: the model is built without
contents, and each block is read, held as the scheme says by the device that will compute with it, and put away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_submodules  # type: ignore[import-untyped]
from torch import nn
from transformers import PreTrainedModel

from qft.checkpoint.skeleton import find_blocks
from qft.disk import disk_failures, require_free_space
from qft.files import remove_leftovers, scratch_folder
from qft.memory.offload import Offload
from qft.memory.offload_store import FileStore, HostStore
from qft.model.by_block import load_by_block
from qft.model.load import load_base, load_whole
from qft.plan import ModelPlan


@contextmanager
def offloading(plan: ModelPlan, folder: Path) -> Iterator[Offload | None]:
    """What memory.offload asks for, its files in memory.offload_folder or else in `folder`; None: nothing."""
    memory = plan.recipe.memory
    device = torch.device("cuda", torch.cuda.current_device()) if plan.device.kind == "cuda" else torch.device("cpu")
    if memory.offload == "none":
        yield None
    elif memory.offload == "cpu":
        yield Offload(HostStore(pinned=device.type == "cuda"), device)
    else:
        parent = Path(memory.offload_folder or folder)
        with disk_failures(parent):
            parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(parent)  # a killed training's
        require_free_space(parent, _weight_bytes(plan), "memory.offload disk")
        with scratch_folder(parent, "offload") as files:
            offload = Offload(FileStore(files), device)
            try:
                yield offload
            finally:
                offload.close()


def _weight_bytes(plan: ModelPlan) -> int:
    """About what the weights of all linear layers take, as they are held."""
    return plan.scheme.weight_bytes(1, plan.shape.linear_parameters) or 0


def load_offloaded(plan: ModelPlan, offload: Offload) -> PreTrainedModel:
    """`load_base`, the blocks in `offload`."""
    whole = plan.checkpoint.quantization and not plan.checkpoint.packed
    return load_base(plan, partial(_quantized if whole else _unquantized, offload=offload))


def _quantized(plan: ModelPlan, offload: Offload) -> PreTrainedModel:
    """Of a checkpoint that comes quantized: whole on the host first."""
    model = load_whole(plan, "cpu")
    model.__dict__.pop("hf_device_map", None)  # of where it is no longer
    remove_hook_from_submodules(model)  # which would take its inputs there
    name, blocks = find_blocks(model, plan.shape.layers)
    for number, block in enumerate(blocks):
        offload.take(block, _stays(plan, f"{name}.{number}"))
    nn.Module.to(model, offload.device)  # what is left; transformers' own does not move LLM.int8() layers
    offload.start()
    return model


def _unquantized(plan: ModelPlan, offload: Offload) -> PreTrainedModel:
    """Of unquantized weights: block by block from the files."""

    def take(block: nn.Module, name: str) -> None:
        offload.take(block, _stays(plan, name))

    model = load_by_block(plan, str(offload.device), take)
    offload.start()
    return model


def _stays(plan: ModelPlan, block: str) -> Callable[[str], bool]:
    """Of a parameter, by its name in the block, whether it is in a module that adapter.modules_to_save has trained, as
    peft reads those names."""
    saved = plan.recipe.adapter.modules_to_save

    def stays(name: str) -> bool:
        parts = f"{block}.{name}".split(".")
        modules = [".".join(parts[:end]) for end in range(1, len(parts))]
        return any(module.endswith(entry) for module in modules for entry in saved)

    return stays


def look_up_on_host(model: Any, device: torch.device) -> int:
    """Move the table of input embeddings to the host, from where the rows of each batch are copied to `device`. Returns
    its bytes; 0 if it stays, being trained, adapted, or the output head too."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    own = dict(table.named_parameters()) if isinstance(table, nn.Embedding) else {}
    tied = getattr(getattr(head, "base_layer", head), "weight", None) is getattr(table, "weight", None)
    if [*own] != ["weight"] or table.weight.requires_grad or tied:
        return 0
    rows = table.weight.detach().cpu()
    del table._parameters["weight"]  # what a model is moved with
    table.weight, table.padding_idx = rows, None  # which says of which row there is no gradient

    def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        ids: torch.Tensor = given[0]
        table.weight = rows[ids.flatten().to(rows.device)].to(device)
        return (torch.arange(ids.numel(), device=device).view(ids.shape), *given[1:]), {}

    def behind(*_: Any) -> None:
        table.weight = rows

    table.register_forward_pre_hook(before, with_kwargs=True)
    table.register_forward_hook(behind)
    return int(rows.nbytes)
