"""Fused parts against the model's own code, on one of its blocks, with an adapter that is not zero."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from qft.errors import first_line
from qft.kernels.in_place import in_place_of

TOLERANCE, NOISES = 0.03, 3
"""Largest error of an output or a gradient, relative to what the model's own code makes of it in 16 bits, and how many
times what that changes by when its input does in the last bit."""

COARSE, COARSE_NOISE = 0.3, 2**-4
"""The same of float8 to 16 bits: what a product differs by is some 4%, and what is wrong, by all of it; and the last
bit of float8, as a share of a number."""

LEAST_WORDS = 64
"""Of the vocabulary that is asked."""

Results = dict[str, torch.Tensor]

CHOICES = (torch.topk, torch.Tensor.topk, torch.argmax, torch.Tensor.argmax)


class Choices:
    """What parts of a block choose by size is what they chose the first time: a token whose experts are near a tie
    would go to others by a difference in the last bit, and be wholly different."""

    def __init__(self) -> None:
        self._of_parts: defaultdict[int, _Chosen] = defaultdict(_Chosen)

    @contextmanager
    def of(self, block: nn.Module) -> Iterator[None]:
        """While entered. Of its parts, since one that is checkpointed calls no forward pass of its own again."""
        with ExitStack() as entered:
            for number, part in enumerate(block.children()):
                entered.enter_context(self._of_parts[number].within(part))
            yield


class _Chosen(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self._places: list[torch.Tensor] = []
        self._left: list[torch.Tensor] | None = None
        """Of this pass; None: it is the first."""

    def within(self, module: nn.Module) -> AbstractContextManager[None]:
        own = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            self._left = self._places[::-1] if self._places else None
            with self:
                return own(*args, **kwargs)

        return in_place_of(module, forward)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        if func not in CHOICES:
            return made
        alone = isinstance(made, torch.Tensor)
        if self._left is not None:
            places = self._left.pop()
        else:
            places = made if alone else made.indices
            self._places.append(places)
        if alone:
            return places
        # The first time, too: a block that is computed again keeps what it kept.
        x, dim = args[0] if args else kwargs["input"], kwargs.get("dim", args[2] if len(args) > 2 else -1)
        return type(made)((x.gather(dim, places), places))


class Check:
    """Runs a model on a few tokens, and blocks of it both ways."""

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, mixed: torch.dtype | None) -> None:
        self.model, self.blocks, self.mixed = model, blocks, mixed
        self.device = next(blocks.parameters()).device
        self.asked: dict[nn.Module, tuple[Any, Any]] = {}
        self.choices: defaultdict[nn.Module, Choices] = defaultdict(Choices)

    def run(self) -> None:
        """The whole model, in evaluation, on two rows of an odd number of tokens."""
        ids = (torch.arange(2 * 33, device=self.device) * 7 % LEAST_WORDS).view(2, 33)
        hooks = [block.register_forward_pre_hook(self._note, with_kwargs=True) for block in self.blocks]
        try:
            with _mode(self.model, training=False), torch.no_grad(), self._autocast():
                self.model(input_ids=ids, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()

    def in_training(self, module: nn.Module, x: torch.Tensor) -> Any:
        """What a module makes of `x` while it trains."""
        with _mode(module, training=True), self._own_random_numbers(x), torch.no_grad(), self._autocast():
            return module(x)

    def _own_random_numbers(self, x: torch.Tensor) -> Any:
        """Those of everybody else are left as they were; a tensor without contents draws none."""
        devices = [self.device] if self.device.type == "cuda" else []
        return nullcontext() if isinstance(x, FakeTensor) else torch.random.fork_rng(devices)

    def _note(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        self.asked[block] = (args, kwargs)

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, dtype=self.mixed or torch.bfloat16, enabled=self.mixed is not None)

    def keep_what_agrees(self, applied: Any, put: dict[str, Callable[[], None]]) -> None:
        """Take back every kind of part without which the others agree with the model's own code."""
        kinds = list(applied.undo)
        if not kinds:
            return
        with self._prepared():
            fused = self._results()
            for kind in kinds:
                applied.take_back(kind)
            wanted, noisy = self._results(), self._results(noise=2**-8)
            wrong = dict.fromkeys(kinds, "")
            if _difference(fused, wanted, noisy):
                for kind in kinds:
                    put[kind]()
                    wrong[kind] = _difference(self._results(), wanted, noisy)
                    applied.take_back(kind)
        for kind in kinds:
            if wrong[kind]:
                applied.plain[f"{kind}: {wrong[kind]}"] = applied.fused.pop(kind)
            else:
                put[kind]()

    def differs_by(self, change: Callable[[], None]) -> str:
        """How results differ, in words, once `change` was made that multiplies in float8; empty: as it may."""
        with self._prepared():
            wanted, noisy = self._results(), self._results(noise=COARSE_NOISE)
            change()
            return _difference(self._results(), wanted, noisy, COARSE)

    @contextmanager
    def _prepared(self) -> Iterator[None]:
        """B is not zero, random numbers are of their own, and gradients are nobody's."""
        kept = {}
        generator = torch.Generator().manual_seed(0)
        for name, parameter in self.model.named_parameters():
            if "lora_B" in name and parameter.requires_grad:
                kept[parameter] = parameter.detach().clone()
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        try:
            with _mode(self.model, training=True), self._own_random_numbers(next(self.blocks.parameters())):
                yield
        finally:
            for parameter, value in kept.items():
                parameter.data.copy_(value)

    def _results(self, noise: float = 0.0) -> Results | str:
        """Outputs of the first block and the last, and all their gradients, or why there are none; with so much noise
        on what the blocks are given, as a share of it."""
        try:
            return self._computed(noise)
        except Exception as error:  # a model can be anything, and so can what a compiler makes of a kernel
            return f"one block alone cannot be computed: {first_line(error)}"

    def _computed(self, noise: float) -> Results:
        found: dict[str, torch.Tensor] = {}
        for number in dict.fromkeys((0, len(self.blocks) - 1)):
            block = self.blocks[number]
            torch.manual_seed(0)
            args, kwargs = self.asked[block]
            hidden = args[0].detach() * (1 + noise * torch.randn(args[0].shape).to(args[0]))
            hidden = hidden.requires_grad_()
            trained = {name: p for name, p in block.named_parameters() if p.requires_grad}
            names = ("its input", *trained)
            with self.choices[block].of(block):
                with torch.enable_grad(), self._autocast():
                    out = block(hidden, *args[1:], **kwargs)
                    out = out[0] if isinstance(out, tuple | list) else out
                    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
                    total = (out * weights).float().sum()
                grads = torch.autograd.grad(total, [hidden, *trained.values()], allow_unused=True)
            own = {"its output": out.detach()}
            own |= {f"the gradient of {name}": g for name, g in zip(names, grads, strict=True) if g is not None}
            found |= {f"{name} in block {number}": tensor for name, tensor in own.items()}
        return found


@contextmanager
def _mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """While entered, all of it is in training, or in evaluation."""
    others = [part for part in module.modules() if part.training != training]
    module.train(training)
    try:
        yield
    finally:
        for part in others:
            part.training = not training


def _difference(found: Results | str, wanted: Results | str, noisy: Results | str, tolerance: float = TOLERANCE) -> str:
    """How results differ, in words; empty: they agree."""
    for results in (wanted, noisy, found):
        if isinstance(results, str):
            return results
    assert isinstance(found, dict)
    assert isinstance(wanted, dict)
    assert isinstance(noisy, dict)
    if found.keys() != wanted.keys():
        return "they differ from the model's own code in what has a gradient"
    for name, value in wanted.items():
        error, noise = _error(found[name], value), _error(noisy[name], value)
        if not error <= max(tolerance, NOISES * noise):
            return f"they differ from the model's own code by {error:.1%} in {name}"
    return ""


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm().clamp_min(1e-30))
