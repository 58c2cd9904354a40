"""What a training will take of memory, and, where the recipe leaves it open, how it is made to fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qft.data.batch import Collator
from qft.data.encoded import column
from qft.data.prepare import Prepared
from qft.data.template import IGNORED
from qft.documents.plan import Kept, PlannedMemory, PlannedWay
from qft.errors import first_line
from qft.kernels import LINEAR, MLP, NORM
from qft.memory.chunked_loss import FEW_LOGITS, LOGITS
from qft.memory.fit import Choice, Way, row_counts, ways
from qft.memory.guard import smaller_training
from qft.memory.packed import needs_masks
from qft.memory.predict import Predictor, Source, predictor
from qft.memory.work import Batch, Step, Work
from qft.plan.images import Looks
from qft.plan.model import ModelPlan
from qft.plan.placement import ALONE, Placement
from qft.plan.sharding import by_placement
from qft.quant.hold import AsPacked
from qft.recipe import LoadedRecipe, Recipe
from qft.recipe.section import Problem
from qft.recipe.training import TrainSection

FUSED, SMALL = "adamw_torch_fused", "adamw_8bit"
"""What `auto` of train.optim comes to: the fastest, and the one of the smallest state."""
WAITS = 0.05
"""Of a step, what SMALL takes longer: it waits for the device at each parameter."""


@dataclass(frozen=True)
class Forecast:
    """Of one training, as its recipe stands; nothing is computed before it is asked for."""

    model: ModelPlan
    lora: dict[str, Any] | None
    data: Prepared
    mixed: torch.dtype | None
    """Of autocast."""
    kernels: tuple[str, ...] = ()
    """Kinds of parts that kernels of qft's own compute."""
    placement: Placement = ALONE

    @property
    def budget(self) -> int:
        """Bytes of the device that may be taken."""
        return self.model.recipe.memory.budget_bytes(self.model.device.total_bytes)

    @cached_property
    def unknown(self) -> str | None:
        """Why nothing can be predicted; None: it can."""
        scheme = self.model.scheme
        if scheme.name not in ("none", "8bit", "4bit", "qat") and not isinstance(scheme, AsPacked):
            return f"only the code of {scheme.name} knows what its layers take"
        try:
            self.predict(self.step())
        except Exception as error:  # a model's code may do what tensors without contents cannot: no run ends by that
            return f"its code needs more than the shapes of tensors: {first_line(error)}"
        return None

    @cached_property
    def predict(self) -> Predictor:
        model, recipe = self.model, self.model.recipe
        rows, at_once = self.data.eval, recipe.train.per_device_eval_batch_size
        held_out = self.looks.evaluated(batch_of(column(rows, "length"), at_once)) if rows else None
        train = recipe.train
        work = Work(
            model.scheme,
            self.lora,
            optim=FUSED if train.optim == "auto" else train.optim,
            label_smoothing_factor=train.label_smoothing_factor,
            neftune=train.neftune_noise_alpha is not None,
            mixed=self.mixed,
            on_gpu=model.device.kind == "cuda",
            logit_bytes=logit_bytes(model) or (LOGITS if self.data.weighted else None),
            offloads=recipe.memory.offload != "none",
            held_out=held_out,
            answered=self._answered(),
            stashes=stashes(model),
            kernels=self.kernels,
            masks=recipe.data.is_packed and self._masked,
            distill=float(recipe.quant.distill),
        )
        chosen = (model.dtype, recipe.model.attn_implementation, train.router_aux_loss_coef)
        config = model.checkpoint.config.to_json_string() + str(chosen)
        files = model.checkpoint.weight_files() if model.checkpoint.has_weights else []
        size = sum(path.stat().st_size for path in files)
        source = Source(config, model.skeleton_in_dtype, model.shape.layers, size, dequantized_bytes(model))
        return by_placement(predictor(source, work, model.device), model, self.placement)

    @cached_property
    def looks(self) -> Looks:
        return Looks(self.data, self.model.pictures)

    def _answered(self) -> Batch | None:
        """The longest batch of held-out rows with their answers, where answers are scored."""
        settings, rows = self.model.recipe.eval, self.data.eval
        if not settings.metrics or rows is None:
            return None
        starts = rows["answer_start"][: settings.samples]
        tokens = max(starts) + settings.max_new_tokens
        return self.looks.answered(Batch(min(settings.batch_size, len(starts)), tokens, padded=True))

    def batch(self, rows: int) -> Batch:
        """The longest of so many training rows."""
        lengths, data = self.data.lengths, self.model.recipe.data
        if self.data.stream is not None:  # the longest may come late
            lengths = np.full_like(lengths, self.model.longest_row(data))
        if not data.is_packed:
            made = batch_of(lengths, rows)
            learnt = sum(self._learnt[: made.rows]) if self.model.recipe.quant.distill else made.learnt
            return self.looks.trained(replace(made, learnt=learnt))
        if data.padding_free:
            together = int(np.sort(lengths)[-rows:].sum())
            return Batch(1, together, padded=self._masked)
        return replace(batch_of(lengths, rows), padded=self._masked)

    @property
    def _masked(self) -> bool:
        """Whether masks tell apart what shares a row."""
        model = self.model
        dtype = self.mixed or getattr(torch, model.dtype)
        own = model.skeleton.config.get_text_config()._attn_implementation
        attention = model.attention.get("attn_implementation", own)
        return needs_masks(attention, dtype, on_gpu=model.device.kind == "cuda")

    @cached_property
    def _learnt(self) -> list[int]:
        """Learnt tokens of the training rows, the most first."""
        labels = self.data.train.with_format("numpy")["labels"]
        return sorted((int((row[1:] != IGNORED).sum()) for row in labels), reverse=True)

    def step(self) -> Step:
        """As the recipe stands; of one row and with nothing computed again where that is still to be decided."""
        train = self.model.recipe.train
        rows = 1 if train.per_device_train_batch_size == "auto" else train.micro_batch
        kept: Kept = "inputs" if train.gradient_checkpointing is True else "all"
        return Step(self.batch(rows), kept, train.gradient_accumulation_steps > self.placement.size)

    def having(self, **train: Any) -> Forecast:
        """With other values of `train`."""
        return replace(self, model=self.model.by(self.model.loaded.having(train=train)))

    def best(self, more: int = 0) -> Way:
        """The fastest way that fits, if `more` bytes than the budget might be taken."""
        if is_open(self.model.recipe):
            return self.ways(more)[0]
        train, taken = self.model.recipe.train, self.predict(self.step()).taken
        again = self.model.shape.layers if train.gradient_checkpointing else 0
        fits, accumulated = taken <= self.budget + more, train.gradient_accumulation_steps // self.placement.size
        return Way(train.micro_batch, accumulated, again, taken, fits, 1.0)

    def _may_keep(self) -> list[Kept]:
        """What blocks may, the least first."""
        again = self.model.recipe.train.gradient_checkpointing
        if isinstance(again, bool) or not self.model.recomputes:
            return ["inputs" if again is True else "all"]
        # Outputs of norms, gate and up are made again by kernels alone.
        if not {NORM, LINEAR} <= {*self.kernels}:
            return ["inputs", "all"]
        return ["inputs", "attention", "products", "all"] if MLP in self.kernels else ["inputs", "products", "all"]

    def ways(self, more: int = 0) -> list[Way]:
        """What may be chosen, the best first, if `more` bytes than the budget might be taken."""
        train, layers = self.model.recipe.train, self.model.shape.layers
        spent = None if isinstance(train.gradient_checkpointing, bool | str) else train.gradient_checkpointing
        rows = train.per_device_train_batch_size
        own = train.step_rows // self.placement.size
        sizes = row_counts(own, len(self.data.batched)) if rows == "auto" else [rows]
        choice = Choice(sizes, own, self._may_keep(), layers, self.budget + more, self.batch, spent)
        return ways(choice, self.predict)

    def document(self, chosen: list[Way], optimizer: str | None) -> PlannedMemory:
        """As `qft check --json` and the run folder have it."""
        known = {"device_bytes": self.model.device.total_bytes, "budget_bytes": self.budget, "optimizer": optimizer}
        if self.unknown:
            return PlannedMemory(**known, unknown=self.unknown)
        kept = chosen[0].kept(self.model.shape.layers) if chosen else [self.step().kept]
        found = self.predict(replace(self.step(), kept=kept[0]))
        # With blocks that keep less than others, it lies between what was traced.
        taken = found.taken if kept[0] == kept[-1] else chosen[0].peak
        return PlannedMemory(
            predicted_peak_bytes=found.peak.total + taken - found.taken,
            predicted_host_bytes=found.host,
            components={name: size for name, size in found.peak.parts.items() if size},
            peaks={part: peak.total for part, peak in found.parts.items() if part},
            **known,
            fits=taken <= self.budget,
            recomputed_blocks=chosen[0].recomputed if chosen else None,
            ways=[PlannedWay(**asdict(way)) for way in chosen],
        )


def dequantized_bytes(model: ModelPlan) -> int:
    """What the host holds of a GGUF file while it is read: all its weights, and the largest in float32 on its way."""
    if not model.checkpoint.gguf_file:
        return 0
    width: int = getattr(torch, model.dtype).itemsize
    sizes: list[int] = [parameter.numel() for parameter in model.skeleton.parameters()]
    return sum(sizes) * width + 4 * max(sizes)


def logit_bytes(model: ModelPlan) -> int | None:
    """What logits may take at once where the loss is computed from few of them, if the model's own code allows it; None
    where it is computed from all."""
    recipe = model.recipe
    offloads, asked = recipe.memory.offload != "none", recipe.train.chunked_loss
    # Distilling compares all logits.
    scarce = (model.device.kind == "cuda" or offloads) and not recipe.quant.distill
    if asked is False or (asked == "auto" and not scarce):
        return None
    return FEW_LOGITS if offloads else LOGITS


def with_optimizer(forecast: Forecast) -> tuple[LoadedRecipe, str | None]:
    """The recipe with train.optim decided, and why; None: it says which. FUSED wherever it fits, unless the bytes that
    SMALL needs less make for a faster step."""
    model, train = forecast.model, forecast.model.recipe.train
    if train.optim != "auto":
        return model.loaded, None
    count = model.shape.trainable_parameters
    wide, less = (f"{each * count / 2**30:,.2f} GiB" for each in (8, 2))
    chosen, why = FUSED, f"its state takes {wide}, and that of {SMALL} {less}"
    fused = forecast.having(optim=FUSED)
    if model.device.kind == "cuda" and not forecast.placement.sharded and fused.unknown is None:
        # With 6 bytes a parameter less, as if so many more might be taken.
        one, other = fused.best(), fused.best(6 * count)
        if not one.fits or one.speed < other.speed * (1 - WAITS):
            chosen, why = (
                SMALL,
                f"its state takes {less}, and the {wide} of {FUSED} "
                + ("would slow the step down" if one.fits else "do not fit"),
            )
    return model.loaded.having(train={"optim": chosen}), f"{chosen}: {why}"


def stashes(model: ModelPlan) -> bool:
    """Whether the inputs of checkpointed blocks wait on the host."""
    return model.device.kind == "cuda" and model.recipe.memory.checkpoints != "device"


def checkpoint_problems(model: ModelPlan) -> Iterator[Problem]:
    """What of train.gradient_checkpointing and memory.checkpoints cannot be."""
    asked = model.recipe.train.gradient_checkpointing
    if asked not in (False, "auto") and not model.recomputes:
        name = model.shape.architecture
        yield "train.gradient_checkpointing", f"{name} cannot compute its blocks again; set it to false"
    if model.recipe.memory.checkpoints == "host" and model.device.kind == "cpu":
        yield "memory.checkpoints", "the model runs on the CPU, in whose memory they are anyway; set it to auto"


def is_open(recipe: Recipe) -> bool:
    """Whether how the training is made to fit is left to the plan."""
    asked = recipe.train.gradient_checkpointing
    return recipe.train.per_device_train_batch_size == "auto" or not isinstance(asked, bool)


def undecidable(forecast: Forecast) -> Iterator[Problem]:
    """Why an `auto` cannot be decided."""
    for field in ("per_device_train_batch_size", "gradient_checkpointing"):
        asked = getattr(forecast.model.recipe.train, field)
        if forecast.unknown and (
            asked == "auto" or (field == "gradient_checkpointing" and not isinstance(asked, bool))
        ):
            yield f"train.{field}", f"{asked} goes by predicted memory, and {forecast.unknown}; give another value"


def too_large(found: list[Way], forecast: Forecast) -> Iterator[Problem]:
    """Yield what is wrong if no way fits."""
    if not found[0].fits:
        least, budget = found[0].peak / 2**30, forecast.budget / 2**30
        text = f"the training takes {least:,.2f} GiB at least, and {budget:,.2f} GiB may be taken"
        helps = "; ".join(smaller_training(forecast.model.recipe, forecast.model.scheme))
        yield "memory.budget", f"{text}. What helps, the most first: {helps}"


def settled(loaded: LoadedRecipe, train: TrainSection) -> LoadedRecipe:
    """The recipe with each `auto` of memory as `train` has it, which is of another that makes steps of as many rows."""
    own, chosen = loaded.recipe.train, dict[str, Any]()
    if own.per_device_train_batch_size == "auto" and own.step_rows == train.step_rows:
        names = ("per_device_train_batch_size", "gradient_accumulation_steps")
        chosen = {name: getattr(train, name) for name in names}
    if own.optim == "auto":
        chosen["optim"] = train.optim
    if not isinstance(own.gradient_checkpointing, bool):
        chosen["gradient_checkpointing"] = train.gradient_checkpointing
    return loaded.having(train=chosen) if chosen else loaded


def decided(loaded: LoadedRecipe, way: Way, processes: int = 1) -> LoadedRecipe:
    """The recipe once its `auto` fields are what the way, which is of one of the processes, has."""
    chosen = {
        "per_device_train_batch_size": way.rows,
        "gradient_accumulation_steps": way.accumulated * processes,
        # A resumed run knows no more than this: all blocks computed again take no more than what was decided.
        "gradient_checkpointing": way.recomputed > 0 or way.most != "all",
    }
    return loaded.having(train=chosen)


def batch_of(lengths: Sequence[int] | NDArray[np.int64], size: int) -> Batch:
    """The longest batch that may be drawn from rows of these lengths: the longest among any others, as the collator
    pads it."""
    multiple, longest, shortest = Collator.multiple, int(max(lengths)), int(min(lengths))
    tokens = -(-longest // multiple) * multiple
    return Batch(min(size, len(lengths)), tokens, padded=(shortest if size > 1 else longest) < tokens)
