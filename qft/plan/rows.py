"""The rows of a training as tokens: what the model must know of them, what is worth a look, and whether they may share
rows of batches."""

from collections.abc import Iterator

from transformers import PreTrainedModel

from qft.data.audit import audit, by_level, lengths_of, padding_finding
from qft.data.prepare import Prepared, prepare
from qft.documents.rows import Finding, RowLengths
from qft.memory.fused_loss import tail_of
from qft.memory.packed import cannot_pack
from qft.plan.limits import answer_problems, require_known_tokens, require_special_tokens
from qft.plan.model import ModelPlan, refuse
from qft.recipe import Recipe
from qft.recipe.section import Problem

UNWEIGHTED = "leave data.prompt_loss_weight out, and rows' weights between 0 and 1"


def encoded_rows(model: ModelPlan) -> Prepared:
    """The rows as tokens, which the model must know. Raises RecipeError, DataError."""
    recipe, shape = model.recipe, model.shape
    if recipe.data.streaming and model.pictures:
        refuse(
            model.loaded, [("data.streaming", "the model reads images, which nobody looks at then: set it to false")]
        )
    data = prepare(model.rows_for(recipe.data), model.tokenizer, recipe.seed, model.pictures)
    parts = [part for part in (data.train, data.eval) if part is not None]
    require_known_tokens(parts, data.place, model.tokenizer, shape.embeddings)
    require_special_tokens(model.tokenizer, shape.embeddings, generates=bool(recipe.eval.metrics))
    if recipe.eval.metrics and data.eval:
        refuse(model.loaded, answer_problems(data.eval, recipe.eval, shape.position_table))
    if recipe.eval.metrics and data.eval and max(data.eval["answer_start"]) < 0:
        text = "the held-out rows are plain text, which has no answers to score; remove it"
        refuse(model.loaded, [("eval.metrics", text)])
    return data


def row_lengths(recipe: Recipe, data: Prepared) -> RowLengths:
    """Of the training rows in the batches that the recipe makes of them."""
    train = recipe.train
    grouped = train.train_sampling_strategy == "group_by_length"
    return lengths_of(data.lengths, train.micro_batch, grouped=grouped, side_by_side=recipe.data.padding_free)


def row_findings(recipe: Recipe, data: Prepared) -> list[Finding]:
    """What of the rows, and of their batches, is worth a look."""
    levels = recipe.data.audit
    padded = padding_finding(row_lengths(recipe, data), len(data.batched))
    return by_level([*audit(data, levels), *padded], levels)


def weight_problems(recipe: Recipe, data: Prepared, skeleton: PreTrainedModel) -> Iterator[Problem]:
    """What of a recipe whose tokens count differently cannot be done."""
    if not data.weighted:
        return
    train = recipe.train
    others = {
        "train.torch_compile": train.torch_compile,
        "train.label_smoothing_factor": train.label_smoothing_factor,
        "quant.distill": recipe.quant.distill,
        "train.chunked_loss": train.chunked_loss is False,
    }
    for field in (name for name, is_set in others.items() if is_set):
        yield field, f"tokens are weighted in the fused loss alone: remove it, or {UNWEIGHTED}"
    if tail_of(skeleton) is None:
        name = type(skeleton).__name__
        text = f"{name} computes its loss by code of its own, in which tokens cannot be weighted: {UNWEIGHTED}"
        yield "data.prompt_loss_weight", text


def packing_problems(recipe: Recipe, skeleton: PreTrainedModel) -> Iterator[Problem]:
    """What of a packed recipe cannot be done."""
    data, train = recipe.data, recipe.train
    if data.packing and train.train_sampling_strategy == "sequential":
        text = "sequential, and data.packing puts rows together by their lengths: set one of the two otherwise"
        yield "train.train_sampling_strategy", text
    if data.is_packed and train.torch_compile:
        yield "train.torch_compile", "packed rows have other borders in each batch; set one of the two to false"
    reason = cannot_pack(skeleton) if recipe.data.is_packed else None
    for field in ("packing", "padding_free"):
        if reason and getattr(recipe.data, field):
            yield f"data.{field}", f"{reason}: set it to false"
