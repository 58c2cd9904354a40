"""The frozen weights of a stack of blocks, of which two are on the device: the one that is computed and the next.

Block k has its place in slot k mod 2, always the same, and its parameters are views of it for good: what autograd keeps
of them on the way forward is right on the way back, as soon as the block's bytes are there again. They are asked for
before the block runs, and before the first of its gradients is computed. That suffices, for autograd computes what was
made later first: no gradient of a block comes behind the first of the block below it. Each layer with such weights
asserts that they are there, in both directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from qft.memory.offload_store import Layout, Store
from qft.quant.stacked import Stacked

SLOTS = 2


@dataclass
class Piece:
    """A tensor of a block that can wait elsewhere."""

    name: str
    tensor: torch.Tensor
    module: nn.Module
    """The layer that it belongs to."""
    places: tuple[tuple[Any, str], ...]
    """Objects that hold it, and the attribute."""

    def put(self, tensor: torch.Tensor) -> None:
        for owner, attribute in self.places:
            setattr(owner, attribute, tensor)


def pieces_of(block: nn.Module, stays: Callable[[str], bool]) -> Iterator[Piece]:
    """Yield the weights of a block and the scales of those that bitsandbytes holds; vectors (norms, biases) stay, as do
    parameters of which `stays` says so, by their names in the block."""
    for prefix, module in block.named_modules():
        for key, parameter in module.named_parameters(prefix, recurse=False):
            if parameter.ndim > 1 and not stays(key):
                yield from _weight(key, parameter, module)


def _weight(name: str, parameter: Any, module: Any) -> Iterator[Piece]:
    if isinstance(parameter, Stacked):
        store = parameter.view_of.store
        for part, tensor in store.tensors.items():
            yield Piece(f"{name}.{part}", tensor, module, ((store, part),))
        return
    places: tuple[tuple[Any, str], ...] = ((parameter, "data"),)
    if getattr(parameter, "CB", None) is not None:
        module.init_8bit_state()  # as its first forward pass would
    if getattr(getattr(module, "state", None), "CB", None) is not None:
        places += ((module.state, "CB"),)
        yield Piece(f"{name}.SCB", module.state.SCB, module, ((module.state, "SCB"),))
    yield Piece(name, parameter.data, module, places)
    state, depth = getattr(parameter, "quant_state", None), 0
    while state is not None:
        yield Piece(f"{name}.absmax.{depth}", state.absmax, module, ((state, "absmax"),))
        state, depth = state.state2, depth + 1


@dataclass
class _Slot:
    content: torch.Tensor
    """On the device, uint8."""
    staging: torch.Tensor
    """On the host, of the same size; `content` itself on a CPU."""
    ready: Any = None
    """Event behind the last copy; None on a CPU."""
    pending: Future[None] | None = None
    """A copy that another thread is at."""
    holds: int = -1
    """Block whose bytes are there, or on their way."""


class Offload:
    """Takes the weights of blocks, one after the other, then brings each to the device when it is needed."""

    def __init__(self, store: Store, device: torch.device) -> None:
        self.store, self.device = store, device
        self.current = -1
        """Block whose bytes are there for what the device is given next."""
        self._blocks: list[nn.Module] = []
        self._pieces: list[list[Piece]] = []
        self._layouts: list[Layout] = []
        self._slots: list[_Slot] = []
        self._pool = ThreadPoolExecutor(1, "offload") if store.waits else None
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @property
    def bytes_elsewhere(self) -> int:
        """Bytes of the weights, without as many as the slots take on the device."""
        return sum(layout.size for layout in self._layouts) - sum(slot.content.nbytes for slot in self._slots)

    def take(self, block: nn.Module, stays: Callable[[str], bool]) -> None:
        """Move the weights of the next block to the store; `stays` as in `pieces_of`."""
        pieces = list(pieces_of(block, stays))
        layout = Layout.of([(piece.name, piece.tensor) for piece in pieces]) if pieces else Layout((), (), (), (), 0)
        self.store.put(len(self._blocks), layout, {piece.name: piece.tensor for piece in pieces})
        for piece in pieces:
            piece.tensor = torch.empty(0, dtype=piece.tensor.dtype, device=self.device)
            piece.put(piece.tensor)
        self._blocks.append(block)
        self._pieces.append(pieces)
        self._layouts.append(layout)

    def start(self) -> None:
        """Give the blocks that were taken their places on the device. From here on they are brought when they run."""
        size, count = max(layout.size for layout in self._layouts), min(SLOTS, len(self._blocks))
        self._slots = [self._slot(size) for _ in range(count)]
        for number, (block, pieces) in enumerate(zip(self._blocks, self._pieces, strict=True)):
            views = self._layouts[number].views(self._slots[number % count].content)
            for piece in pieces:
                piece.put(views[piece.name])
            self._watch(number, block, {id(piece.module): piece.module for piece in pieces}.values())

    def need(self, number: int) -> None:
        """Whatever the device is given from here on finds the block's bytes; those of others need not stay."""
        slot = self._slots[number % len(self._slots)]
        if slot.holds != number:
            self._fetch(number)
        if slot.pending:
            slot.pending.result()
            slot.pending = None
        if slot.ready:
            torch.cuda.current_stream(self.device).wait_event(slot.ready)
        self.current = number

    def bring(self, layer: nn.Module) -> None:
        """Have the weights of one layer there, if it is of a block."""
        number = next((n for n, pieces in enumerate(self._pieces) if any(p.module is layer for p in pieces)), None)
        if number is not None:
            self.need(number)

    def close(self) -> None:
        """End the thread that reads."""
        if self._pool:
            self._pool.shutdown()

    def _slot(self, size: int) -> _Slot:
        content = torch.empty(size, dtype=torch.uint8, device=self.device)
        if self._side is None:
            return _Slot(content, content)
        waits = self.store.waits
        staging = torch.empty(size if waits else 0, dtype=torch.uint8, pin_memory=waits)
        return _Slot(content, staging, torch.cuda.Event())  # type: ignore[no-untyped-call]

    def _watch(self, number: int, block: nn.Module, layers: Any) -> None:
        def before(*_: Any) -> None:
            if self.current != number:  # else it is computed again
                self.need(number)
                last = number + 1 == len(self._blocks)
                # Behind the last one comes the way back, or without gradients the first one again.
                self._foresee(number + 1 if not last else number if torch.is_grad_enabled() else 0)

        def back(_: torch.Tensor) -> None:
            self.need(number)
            self._foresee(number - 1)

        def behind(_: nn.Module, __: Any, output: Any) -> None:
            _at_gradients(output, back)

        def require(*_: Any) -> None:
            assert self.current == self._slots[number % len(self._slots)].holds == number, "its weights are not there"

        def required(_: nn.Module, __: Any, output: Any) -> None:
            require()
            _at_gradients(output, require)

        block.register_forward_pre_hook(before)
        for layer in layers:
            layer.register_forward_hook(required)
        block.register_forward_hook(behind)

    def _foresee(self, number: int) -> None:
        """Begin to bring a block, unless it would take the place of the one that is needed."""
        slot = self._slots[number % len(self._slots)]
        if 0 <= number < len(self._blocks) and slot.holds not in (number, self.current):
            self._fetch(number)

    def _fetch(self, number: int) -> None:
        slot = self._slots[number % len(self._slots)]
        if slot.pending:
            slot.pending.result()
        slot.holds = number
        free = None
        if self._side:
            free = torch.cuda.Event()  # type: ignore[no-untyped-call]
            free.record(torch.cuda.current_stream(self.device))
        slot.pending = self._pool.submit(self._bring, number, slot, free) if self._pool else None
        if not self._pool:
            self._bring(number, slot, free)

    def _bring(self, number: int, slot: _Slot, free: Any) -> None:
        """Copy a block into its slot, on a GPU behind the event `free`: what used the slot before."""
        if self._side and self._pool:
            slot.ready.synchronize()  # the last copy out of this staging
        host = self.store.load(number, self._layouts[number], slot.staging)
        if self._side is None:
            if not self._pool:
                slot.content[: len(host)].copy_(host)
            return
        with torch.cuda.stream(self._side):
            self._side.wait_event(free)
            slot.content[: len(host)].copy_(host, non_blocking=True)
            slot.ready.record(self._side)


def _at_gradients(output: Any, call: Callable[[torch.Tensor], None]) -> None:
    """Have `call` called before the gradient of any tensor in `output` is passed on."""
    for value in tree_leaves(output):
        if isinstance(value, torch.Tensor) and value.requires_grad:
            value.register_hook(call)  # type: ignore[no-untyped-call]
