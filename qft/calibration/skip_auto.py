"""quant.skip_modules auto: which linear layers to leave in 16 bits, and what that buys on training rows.

The model goes through block by block, so that choosing needs less memory than the training will.
"""

from pathlib import Path

from datasets import Dataset

from qft.calibration.blockwise import BlockQuantizer
from qft.calibration.layer_errors import suggest_skip_modules
from qft.calibration.quantizer import QuantizeTask
from qft.calibration.streamed import StreamedModel
from qft.checkpoint.skeleton import without_contents
from qft.checkpoint.weights import Weights
from qft.disk import require_free_space
from qft.documents.skipped import SkippedModules
from qft.errors import RunError
from qft.files import scratch_folder
from qft.memory.guard import memory_guard
from qft.plan import Plan
from qft.progress import View
from qft.recipe.schema import CalibrateSection
from qft.run.folder import Run
from qft.run.resume import ANEW

TOKENS = 4096
"""Of the training rows on which layers are measured."""


def choose_skip_modules(plan: Plan, view: View) -> SkippedModules:
    """Measure every layer as plan.recipe.quant holds it, and choose the worst within its budget."""
    view.note("Measuring which layers to leave in 16 bits")
    folder = Path(plan.recipe.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    require_free_space(folder, plan.model.shape.parameters * 2, "measuring the layers")
    guard = memory_guard("measuring the layers", ["name layers in quant.skip_modules instead of auto"])
    with scratch_folder(folder, "skip-modules") as work, guard:
        skeleton = without_contents(plan.model.checkpoint, plan.recipe.model)
        model = StreamedModel(plan.model, Weights(plan.model.checkpoint.with_weights(), skeleton))
        task = _task(plan)
        quantizer = BlockQuantizer(model, task, work, view)
        before, errors = quantizer.quantize(), quantizer.errors()
        weights = {error.name: model.weights_of(error.name) for error in errors}
        budget, bits = _budget_bytes(plan), model.dtype.itemsize * 8
        entries = suggest_skip_modules(errors, weights, budget_bytes=budget, full_bits=bits)
        chosen = {entry.removesuffix("$") for entry in entries}
        after = quantizer.again({n: None if n in chosen else s for n, s in task.schemes.items()}, 1)
    quantized = sum(error.bytes for error in errors)
    grown = sum(weights[e.name] * model.dtype.itemsize - e.bytes for e in errors if e.name in chosen)
    return SkippedModules(
        names=entries,
        budget_bytes=budget,
        linear_bytes_before=quantized,
        linear_bytes_after=quantized + grown,
        rows=len(task.rows),
        kl_before=before.after.mean_kl(),
        kl_after=after.after.mean_kl(),
        perplexity_unquantized=before.before.perplexity(),
        perplexity_before=before.after.perplexity(),
        perplexity_after=after.after.perplexity(),
    )


def skipped_before(plan: Plan) -> SkippedModules:
    """What the run that is resumed chose. Raises RunError if it chose nothing, or within another budget."""
    manifest, budget = Run(Path(plan.recipe.output_dir)).manifest(), _budget_bytes(plan)
    skipped = manifest.skipped_modules if manifest else None
    field, text = "quant.skip_modules", "the run was not started with auto"
    if skipped and skipped.budget_bytes == budget:
        return skipped
    if skipped:
        field = f"quant.skip_budget_{'bits' if plan.recipe.quant.skip_budget_bits else 'bytes'}"
        text = f"the run was started with {skipped.budget_bytes:,} bytes, and this comes to {budget:,}"
    raise RunError(plan.model.loaded.problem(field, f"{text}; set it back, {ANEW}"))


def _task(plan: Plan) -> QuantizeTask:
    """Every layer of the blocks as the training holds it, measured on a few training rows."""
    scheme = plan.model.scheme
    assert scheme.engine is not None
    inputs, blocks = plan.model.linears
    schemes = {
        name: scheme.layer if name.startswith(f"{blocks}.") and scheme.quantizes(name) else None for name in inputs
    }
    return QuantizeTask(CalibrateSection(engine=scheme.engine), schemes, list(_rows(plan.data.train)), plan.data.place)


def _rows(train: Dataset) -> Dataset:
    """The first rows, TOKENS tokens of them."""
    tokens = rows = 0
    for length in train["length"]:
        if tokens >= TOKENS:
            break
        tokens, rows = tokens + length, rows + 1
    return train.select(range(rows))


def _budget_bytes(plan: Plan) -> int:
    quant = plan.recipe.quant
    if quant.skip_budget_bits is not None:
        return int(quant.skip_budget_bits * plan.model.shape.linear_parameters / 8)
    assert quant.skip_budget_bytes is not None
    return quant.skip_budget_bytes
