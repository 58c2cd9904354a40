"""`qft eval RUN --advise`: what to try next with a trained run, each by what was measured of it, and nothing else.

The run is held in other ways beside its own, each a target of the evaluation like any other, so that what holding it
otherwise would gain is a figure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from qft.calibration.layer_errors import suggest_skip_modules
from qft.commands.advice import Facts, advise, deployed_as
from qft.documents.evaluation import Advice, LayerError
from qft.documents.training import read_report
from qft.errors import RecipeError
from qft.measure.likelihood import Likelihood
from qft.model.adapter import CHANGES_BASE
from qft.model.target import Target, parse_target
from qft.quant.rounding import TARGETS
from qft.recipe import Recipe

MORE_BITS = 0.5
"""Bits that a linear weight may take more on average, for layers that are tried in 16 bits."""


@dataclass(frozen=True)
class Advised:
    """The run that is asked about, and what it is compared with."""

    run: Target
    reference: str
    """The variant that is compared with: unquantized, and in a dtype that nothing overflows."""
    compared: bool
    """Whether there is an unquantized model to compare with, and layers that are told apart."""
    others: Mapping[str, Target]
    """The run held otherwise: see `_other_ways`."""
    kept: list[str] = field(default_factory=list)
    """The quant.skip_modules with which it was tried, once it was."""

    @classmethod
    def of(cls, names: Sequence[str], reference: str | None) -> Advised:
        """Raises RecipeError for anything but one run of `qft train`, and for another reference than its own base."""
        if reference is not None:
            raise RecipeError("--advise: compares the run with its own base; leave --reference away")
        found = [parse_target(name, adapter=None, data=None) for name in names]
        run = found[0]
        is_training = run.run and run.run.kind_of_work() == "training" and not run.variant
        if len(found) != 1 or not is_training:
            raise RecipeError(f"--advise: {', '.join(names)}: advice is on one run of `qft train`; name its folder")
        plan = run.plan()
        compared = run.loaded.recipe.quant.mode != "custom" and not plan.checkpoint.quantization
        base = f"{run.name}@{'float32' if plan.dtype == 'float16' else 'base'}"
        return cls(run, base, compared, _other_ways(run) if compared else {})

    @property
    def bare_name(self) -> str:
        """Of the run without its adapter, whose layers are those of the base."""
        return self.others["bare"].name if "bare" in self.others else self.run.name

    @property
    def kept_name(self) -> str:
        """Of the run without its adapter, its worst layers in 16 bits."""
        return f"{self.run.name} with its worst layers in 16 bits"

    def with_layers_kept(self, errors: Sequence[LayerError], base: Any) -> Target | None:
        """The run so, to be measured; None where none may be, or is worth it. `errors` are those of `bare_name`, `base`
        is the unquantized model."""
        quant = self.run.loaded.recipe.quant
        form = TARGETS[quant.target] if quant.mode == "qat" and quant.target else None
        if not errors or quant.mode == "none" or (form and (form.ends or form.layer is None)):
            return None
        weights = {error.name: base.get_submodule(error.name).weight.numel() for error in errors}
        if form and form.layer:  # in training its weights are all there
            held = {name: count * form.layer.bits // 8 for name, count in weights.items()}
            errors = [error.model_copy(update={"bytes": held[error.name]}) for error in errors]
        names = suggest_skip_modules(errors, weights, budget_bytes=int(sum(weights.values()) * MORE_BITS / 8))
        if not names:
            return None
        self.kept[:] = [*quant.named_skips, *names]
        return replace(_held(self.run, "", adapter=None, skip_modules=self.kept), name=self.kept_name)

    def advice(
        self,
        recipe: Recipe,
        found: Mapping[str, tuple[Likelihood, int]],
        base: Any,
        batches: Sequence[Mapping[str, torch.Tensor]],
    ) -> list[Advice]:
        """From the likelihood, and the bytes of the weights, of all that was measured, by their names; `base` is the
        unquantized model, if there is one, and some `batches` are on its device."""
        assert self.run.run is not None
        names = {way: target.name for way, target in self.others.items()} | {"kept": self.kept_name}
        ways = {way: found[name] for way, name in names.items() if name in found}
        return advise(
            Facts(
                recipe=recipe,
                report=read_report(self.run.run.folder),
                dtype=self.run.plan().dtype,
                own=found[self.run.name][0],
                base=found[self.reference][0] if self.compared else None,
                others={way: likelihood for way, (likelihood, _) in ways.items()},
                kept=self.kept,
                more_bytes={way: size - found[self.bare_name][1] for way, (_, size) in ways.items()},
                weak_half=self._weak_half(recipe),
                largest=largest_output(base, batches) if self.compared else None,
            )
        )

    def _weak_half(self, recipe: Recipe) -> float | None:
        # Those that start within the base are written as a difference, of twice the rank.
        starts_within = recipe.adapter.init_lora_weights.startswith(CHANGES_BASE)
        return weak_half(self.run.adapter) if self.run.adapter and not starts_within else None


def _other_ways(run: Target) -> dict[str, Target]:
    """Without its adapter (bare), and so in nf4, or with scales that are not quantized (single); and, adapter and all,
    rounded to what it would be deployed in (rounded)."""
    quant, found = run.loaded.recipe.quant, {}
    if run.adapter and quant.mode != "none":
        found["bare"] = _held(run, "without its adapter", adapter=None)
    if quant.mode == "4bit" and quant.quant_type == "fp4":
        found["nf4"] = _held(run, "in nf4", adapter=None, quant_type="nf4")
    if quant.mode == "4bit" and quant.double_quant:
        found["single"] = _held(run, "with scales in 32 bits", adapter=None, double_quant=False)
    if quant.mode != "qat":
        form = deployed_as(run.loaded.recipe)
        rounded = _held(run, f"rounded to {form}", run.adapter, preset=None, mode="qat", target=form)
        with suppress(RecipeError):  # a model that has no such form
            rounded.plan()
            found["rounded"] = rounded
    return found


def _held(run: Target, how: str, adapter: Any, **quant: Any) -> Target:
    loaded = run.loaded.having(quant=quant) if quant else run.loaded
    return replace(run, name=f"{run.name} {how}", loaded=loaded, adapter=adapter)


def weak_half(adapter: Path) -> float | None:
    """Of the squared norm of all B A of a LoRA adapter, the share in the weaker half of each one's directions."""
    tensors, energy, weak = load_file(adapter / "adapter_model.safetensors"), 0.0, 0.0
    for name, a in tensors.items():
        if not name.endswith("lora_A.weight"):
            continue
        b = tensors[name.replace("lora_A", "lora_B")]
        # The singular values of B A are those of the product of both triangles.
        left, right = (torch.linalg.qr(part.double()).R for part in (b, a.mT))
        squares = torch.linalg.svdvals(left @ right.mT).square()
        energy, weak = energy + float(squares.sum()), weak + float(squares[len(squares) // 2 :].sum())
    return weak / energy if energy else None


def largest_output(model: Any, batches: Sequence[Mapping[str, torch.Tensor]]) -> tuple[str, float] | None:
    """The module whose output has the largest magnitude on the batches, and that; the logits aside."""
    found: dict[str, float] = {}

    def hook(name: str) -> Callable[..., None]:
        def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) and output else output
            if isinstance(output, torch.Tensor) and output.is_floating_point():
                # What is masked is infinite in any dtype.
                largest = output.abs().nan_to_num(0.0, posinf=0.0).max()
                found[name] = max(found.get(name, 0.0), float(largest))

        return look

    logits = model.get_output_embeddings()
    modules = [(name, module) for name, module in model.named_modules() if name and module is not logits]
    handles = [module.register_forward_hook(hook(name)) for name, module in modules]
    try:
        with torch.no_grad():
            for batch in batches:
                model(**batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return max(found.items(), key=lambda item: item[1], default=None)
