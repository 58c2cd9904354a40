"""What an export target says of itself and does with a job."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper
from transformers import AutoTokenizer

from qft.export.job import Job
from qft.gguf.llamacpp import end_tokens
from qft.model.load import load_base
from qft.plan import plan_folder
from qft.recipe.schema import ExportGate

Read = Callable[[str], torch.Tensor | None]
"""A weight of an artifact by its name in the model; None: it has none."""
Facts = dict[str, Any]
"""What of a model and its tokenizer must be in an artifact as it was in the model as trained, by the gate's checks."""
QUESTION = [{"role": "user", "content": "How many legs has a spider?"}]


@dataclass(frozen=True)
class Limits:
    """What the gate asks of an artifact against the model as trained."""

    kl: float
    """Largest mean KL divergence of the next-token distributions, in nats."""
    top1_agreement: float
    """Smallest share of tokens at which both models find the same token most likely."""
    perplexity_increase: float
    """Largest relative increase of the perplexity."""

    def under(self, recipe: ExportGate) -> Limits:
        """The same with what the recipe gives in the place of the defaults."""
        given = {name: value for name, value in recipe if value is not None}
        return Limits(**vars(self) | given)


class Exporter(Protocol):
    """One export target of `FORMS`, which tells what it takes; what stands here with a value holds for most of them."""

    format: str = ""
    """The name by which recipe/engines.py knows what is written; empty: `weight_format` says it of each job."""
    engine: str = "transformers"
    """What loads the artifact for the gate."""
    library: str = "transformers"
    """library_name of the Hub."""
    usage: str
    """How to load it, in Markdown."""
    limits: Limits
    """Where the base's weights are those that the adapter was trained against."""
    limits_original: Limits
    """Where the adapter was added to the original weights, which it has not seen."""

    def weight_format(self, job: Job) -> str:
        """`format`, or what it is for this job. Raises RecipeError for what would not be written."""
        return self.format

    def needed_bytes(self, job: Job) -> int:
        """Room on the disk that writing takes, temporary files included."""

    def write(self, job: Job, folder: Path) -> dict[str, Any] | None:
        """Write the artifact into an empty folder, for a job that `require_possible` has let pass. Says how a second
        quantization went, if there was one."""

    def versions(self, job: Job) -> dict[str, str | None]:
        """Of what writes it beside the installed packages."""
        return {}

    def load(self, job: Job, folder: Path) -> Any:
        """The artifact, loaded from its folder by its engine on the run's device and ready to evaluate. Raises
        ModelError if it cannot be loaded."""
        return load_base(plan_folder(folder, job.plan.recipe.model, job.dtype)).eval()

    def facts(self, model: Any, job: Job, folder: Path, texts: Sequence[str]) -> Facts:
        """What the loaded artifact is; the tokens of `texts` must be the same as in training."""
        trust = job.plan.recipe.model.trust_remote_code
        return facts_of(model, AutoTokenizer.from_pretrained(folder, trust_remote_code=trust), texts)

    def reader(self, job: Job, folder: Path) -> Read | None:
        """The artifact's weights, for the gate to name the worst. None: they are not those of the merge."""
        return None


def facts_of(model: Any, tokenizer: Any, texts: Sequence[str]) -> Facts:
    """`texts` are those whose tokens must be the same."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    inside, outside = base.get_input_embeddings(), base.get_output_embeddings()
    trained_head = isinstance(outside, BaseTunerLayer)
    if isinstance(inside, TrainableTokensWrapper):  # whose weight is made anew each time it is asked for
        inside, outside = inside.original_module, getattr(outside, "original_module", outside)
    bos = tokenizer.bos_token_id
    return {
        "tied_embeddings": not trained_head and getattr(outside, "weight", 0) is getattr(inside, "weight", None),
        "embedding_rows": inside.weight.shape[0],
        "vocabulary_size": len(tokenizer),
        "added_tokens": dict(sorted(tokenizer.get_added_vocab().items())),
        "token_ids": [tokenizer(text, add_special_tokens=False).input_ids for text in texts],
        "bos_count": tokenizer(QUESTION[0]["content"]).input_ids.count(bos) if bos is not None else 0,
        "chat_template": rendered(tokenizer, tokenizer.chat_template),
        "eos_token_id": sorted(end_tokens(base.generation_config)),
    }


def rendered(tokenizer: Any, template: str | Mapping[str, str] | None) -> str:
    """A prompt as the chat template renders it, with the tokenizer's names for special tokens; by each of several. The
    template itself, where it wants another conversation."""
    if template is None:
        return "none"
    if not isinstance(template, str):
        return "\n".join(f"{name}: {rendered(tokenizer, template[name])}" for name in sorted(template))
    try:
        text: str = tokenizer.apply_chat_template(
            QUESTION, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except Exception:  # a template is a program: it can fail with more than jinja's own errors
        return template
    return text
