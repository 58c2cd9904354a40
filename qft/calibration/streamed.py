"""A causal language model of which one block at a time is in memory: the rest waits on disk.

The blocks of the model stay without contents; in its forward pass each hands its input on, so that what stands before,
between and behind them (embedding, positions, masks, final norm, head) is the model's own code, and the blocks are run
by hand with the arguments that they would have been given.
"""

import copy
from collections.abc import Sequence

import torch
from torch import nn

from qft.checkpoint.layout import Layout, written_names
from qft.checkpoint.passing import Call, Passing
from qft.checkpoint.skeleton import find_blocks, without_contents
from qft.model.fill import Read, fill
from qft.plan import ModelPlan


class StreamedModel:
    """All but the blocks on the planned device, in the planned dtype. Sequences are taken one row at a time."""

    def __init__(self, plan: ModelPlan, read: Read, layout: Layout | None = None) -> None:
        """`layout` is how the weights are to be written; None: they are not. Raises ModelError for a model whose blocks
        cannot be run so."""
        self.layout = layout
        self.device, self.dtype, self.read = plan.device.kind, getattr(torch, plan.dtype), read
        self.model = without_contents(plan.checkpoint, plan.recipe.model, dtype=self.dtype, **plan.attention).eval()
        self.prefix, self.stack = find_blocks(self.model, plan.shape.layers)
        fill(self.model, self.model, "", read, (self.device, self.dtype), skip=f"{self.prefix}.")
        self.model.tie_weights()
        self.passing = Passing(self.model, self.stack, self.device)

    def __len__(self) -> int:
        return len(self.stack)

    def name(self, number: int) -> str:
        return f"{self.prefix}.{number}"

    def block(self, number: int) -> nn.Module:
        """A block with its weights, on the device."""
        block = copy.deepcopy(self.stack[number])
        del block.forward  # the one that passes its input on
        fill(self.model, block, f"{self.name(number)}.", self.read, (self.device, self.dtype))
        return block

    def enter(self, ids: Sequence[int]) -> torch.Tensor:
        """Hidden states [1, tokens, hidden] that the first block is given, on the host."""
        self.passing.leave = None
        self.passing.forward(torch.tensor([list(ids)], device=self.device))
        assert self.passing.entered is not None
        return self.passing.entered.cpu().contiguous()

    def call(self, number: int, hidden: torch.Tensor) -> Call:
        """Arguments of a block for hidden states [1, tokens, hidden] of a length that has entered before."""
        args, kwargs = self.passing.calls[hidden.shape[1]][number]
        return (hidden, *args), kwargs

    def run(self, block: nn.Module, number: int, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states behind the block, on the host."""
        args, kwargs = self.call(number, hidden.to(self.device))
        with torch.no_grad():
            out = block(*args, **kwargs)
        behind: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return behind.cpu().contiguous()

    def leave(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [tokens, vocabulary] of hidden states [1, tokens, hidden] behind the last block, on the device."""
        self.passing.leave = hidden.to(self.device)
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.device)
        logits: torch.Tensor = self.passing.forward(ids).logits
        return logits[0]

    def weights_of(self, layer: str) -> int:
        """How many weights a linear layer has."""
        weight: torch.Tensor = self.model.get_submodule(layer).weight
        return weight.numel()

    def around(self) -> dict[str, torch.Tensor]:
        """Weights outside the blocks, by name, each once."""
        outside = (name for name in written_names(self.model) if not name.startswith(f"{self.prefix}."))
        held = self.model.state_dict()
        return {name: held[name] for name in outside}
