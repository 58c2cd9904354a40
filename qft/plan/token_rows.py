"""Rows of the tokens that a recipe adds: whether the model can have them, and how peft trains them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft.utils.other import TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qft.checkpoint.added import FIELDS, AddedTokens, add_tokens, tables
from qft.checkpoint.conversion import FLOATS, Conversion
from qft.checkpoint.find import Checkpoint
from qft.checkpoint.skeleton import without_contents
from qft.errors import first_line
from qft.plan.limits import BATCH
from qft.quant.hold import Qat, Scheme
from qft.recipe.section import Problem
from qft.recipe.training import AdapterSection, ModelSection


def with_added(
    section: ModelSection, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> tuple[Checkpoint, PreTrainedModel, list[Problem]]:
    """Checkpoint and model, which is without contents, with the tokens that the recipe adds, and `tokenizer` is given;
    and what is wrong with those."""
    added, problems = add_tokens(section, checkpoint.config, tokenizer, model.get_input_embeddings().weight.shape[0])
    if added is None or problems:
        return checkpoint, model, problems
    checkpoint = checkpoint.adding(added)
    grown = without_contents(checkpoint, section, dtype=torch.float32)
    field = FIELDS[not section.add_tokens]
    return checkpoint, grown, [(field, text) for text in _table_problems(checkpoint, model, grown)]


def _table_problems(checkpoint: Checkpoint, model: PreTrainedModel, grown: PreTrainedModel) -> Iterator[str]:
    """What keeps a model without contents from having the tokens that are added to its checkpoint: `grown` is made of
    the configuration that says so. Reads headers."""
    assert checkpoint.added
    names, before = tables(grown), model.state_dict()
    wrong = [name for name in names if grown.get_parameter(name).shape[0] != checkpoint.added.rows]
    grew = {name: p for name, p in grown.state_dict(keep_vars=True).items() if p.shape != before[name].shape}
    wrong += [name for name, p in grew.items() if not any(p is grown.get_parameter(own) for own in names)]
    if wrong:
        yield f"its {wrong[0]} cannot be given rows for more tokens; use tokens that the model has"
    elif checkpoint.quantization and checkpoint.has_weights and (held := _held_otherwise(checkpoint, model)):
        yield f"the checkpoint comes quantized, its {held} too, which gets no more rows; use the unquantized model"


def _held_otherwise(checkpoint: Checkpoint, model: PreTrainedModel) -> str | None:
    """Of the tables, the first that a checkpoint which comes quantized holds in few bits."""
    made = Conversion(model, {name: stored.empty() for name, stored in checkpoint.tensors().items()}).made
    wanted = {name: model.get_parameter(name) for name in tables(model)}
    plain = {n: p for n, p in wanted.items() if n in made and made[n].dtype in FLOATS and made[n].shape == p.shape}
    return next((n for n, p in wanted.items() if not any(p is each for each in plain.values())), None)


def row_arguments(adapter: AdapterSection, added: AddedTokens | None, model: PreTrainedModel) -> dict[str, Any]:
    """Of peft.LoraConfig: the rows to train, of each table that modules_to_save does not train whole; of tied ones, of
    the embeddings."""
    if added is None:
        return {}
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    owners = [(name, m) for name, m in model.named_modules() if m is table or m is head]
    rest = [(name, m) for name, m in owners if not name.endswith(adapter.modules_to_save)]
    if len(rest) == 2 and head.weight is table.weight:
        rest = [(name, m) for name, m in rest if m is table]
    return {"trainable_token_indices": {name: sorted(added.pieces) for name, _ in rest}} if rest else {}


def occurrences(added: AddedTokens | None, rows: Dataset) -> dict[str, int]:
    """How often each token that is added stands in encoded rows."""
    if added is None:
        return {}
    found = Counter[int]()
    for batch in rows.select_columns(["input_ids"]).with_format("arrow").iter(BATCH):
        ids = batch["input_ids"].combine_chunks().flatten().to_numpy()
        found.update(ids[np.isin(ids, [*added.pieces])].tolist())
    return {token: found[number] for token, number in added.ids.items()}


def row_problems(adapted: nn.Module) -> Iterator[Problem]:
    """Tables of which peft would not train single rows right."""
    for name, module in adapted.named_modules():
        if isinstance(module, TrainableTokensWrapper) and getattr(module.original_module, "bias", None) is not None:
            own = name.removeprefix("base_model.model.")
            text = f"{own} has a bias, which peft would leave out where it trains single rows"
            yield FIELDS[0], f"{text}; train it whole: name {own.rpartition('.')[2]} in adapter.modules_to_save"


def rounded_rows(scheme: Scheme, lora: dict[str, Any] | None, section: ModelSection, model: Any) -> Iterator[Problem]:
    """Tables that quant.target rounds, of which peft would train single rows beside what is rounded."""
    rows = (lora or {}).get("trainable_token_indices", {})
    for name in sorted(rows.keys() & scheme.roundings(model).keys()) if isinstance(scheme, Qat) else ():
        text = f"a {scheme.quant_type} file holds {name} in few bits, of which single rows cannot be trained"
        remedy = (
            f"train it whole: name {name.rpartition('.')[2]} in adapter.modules_to_save, or use another quant.target"
        )
        yield FIELDS[not section.add_tokens], f"{text}; {remedy}"


def not_adapted(error: Exception) -> str:
    """What peft says of adapters that cannot be; of LoRA on a table whose rows are trained, what to do."""
    if "trainable_token_indices cannot" in str(error):
        return "LoRA on a table that gets new tokens; leave it out, or name it in adapter.modules_to_save"
    return first_line(error)
