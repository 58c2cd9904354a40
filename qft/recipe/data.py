"""What is asked of the rows: where they come from, and what is learnt of them."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from qft.recipe.section import Fraction, Many, Renamed, Section, Switches
from qft.recipe.spread import spread

Format = Literal["auto", "messages", "prompt_completion", "alpaca", "sharegpt", "text"]


class Source(Section):
    """One place where rows come from."""

    path: str = Field(min_length=1)
    """A local .jsonl, .json, .csv, .parquet, .arrow, .txt or .md file, packed (.gz, .zst) or not; a pattern of such
    (`rows/*.jsonl`) or a folder of one kind, each of whose files is a source of its own; a folder that `datasets`
    saved; or a hub dataset id."""
    format: Format = "auto"
    """Format of this source's rows. auto: data.format."""
    weight: float = Field(1.0, gt=0)
    """How many times the rows count in one epoch: 0.5 takes a random half, 2 takes each row twice."""
    name: str | None = None
    """Configuration of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset, or of one that `datasets` saved."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    columns: Renamed = Field((), json_schema_extra={"default": {}})
    """Fields of rows that the format calls otherwise: {question: prompt, answer: completion}."""
    sample_by: Literal["line", "paragraph", "document"] = "line"
    """What one row of a text file is."""


def _as_sources(value: Any) -> Any:
    """A path, one source or a list of either, as a list of sources."""
    if value is None:
        return []
    items = value if isinstance(value, list | tuple) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in items]


def _each_file(sources: tuple[Source, ...]) -> tuple[Source, ...]:
    """With every file of a pattern or of a folder as a source of its own."""
    return tuple(each.model_copy(update={"path": path}) for each in sources for path in spread(each.path))


Sources = Annotated[
    tuple[Source, ...],
    Field(strict=False),
    AfterValidator(_each_file),
    BeforeValidator(_as_sources, json_schema_input_type=str | Source | list[str | Source] | None),
]


Level = Literal["error", "warn", "off"]


class AuditSection(Section):
    """What becomes of each finding about the rows: an error before anything is loaded, a warning, or nothing."""

    bos: Level = "error"
    """Rows that do not begin with one BOS token where the tokenizer puts one before a text, or that begin with two."""
    end_of_turn: Level = "warn"
    """Rows whose last learnt token is not one that ends a turn or a text."""
    truncated: Level = "warn"
    """Rows cut at max_length."""
    few_learnt: Level = "warn"
    """Sources of which less than 1% of the tokens are learnt."""
    special_tokens: Level = "warn"
    """Rows in which somebody else than the assistant writes a special token, which the model would take for its own."""
    roles: Level = "warn"
    """Rows in which a role speaks twice in a row."""
    empty_turns: Level = "warn"
    """Rows with a turn, of anybody but the assistant, that says nothing."""
    control_characters: Level = "warn"
    """Rows with control characters, or with the mark of bytes that were not UTF-8."""
    secrets: Level = "warn"
    """Rows with what looks like a key, a token or a private key of somebody."""
    duplicates: Level = "warn"
    """Rows that say what an earlier row of the same part says."""
    near_duplicates: Level = "warn"
    """Rows that say almost what an earlier row says: four of five word triples, estimated by MinHash."""
    overlap: Level = "warn"
    """Held-out rows that are, or almost are, training rows."""
    padding: Level = "warn"
    """More than half of what is computed would be padding."""


class DataSection(Section):
    """What is learnt from."""

    train: Sources = ()
    """Training rows: a path, one source ({path, format, weight, …}), or a list of either."""
    eval: Sources = ()
    """Held-out rows, in the same form."""
    eval_fraction: Fraction = 0.0
    """Share of the training rows to hold out instead of eval, drawn with the recipe's seed."""
    mix_by: Literal["times", "rows", "tokens"] = "times"
    """What the weight of a source says. times: how often its rows count in one epoch. rows, tokens: its share of an
    epoch, which is as long as without, is as its rows or tokens, multiplied by it."""
    mix_temperature: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """A source's share is as its size to the power of 1 / this: 1: as they are; 2: small ones more; 1000: all alike."""
    format: Format = "auto"
    """How rows are laid out. auto: seen from the first row's fields, and shown."""
    max_length: Literal["auto"] | Annotated[int, Field(ge=2)] = "auto"
    """Longest row, in tokens. auto: 2048, or what the model was built for where that is less."""
    on_too_long: Literal["stop", "skip", "truncate"] = "stop"
    """What happens to a row of more than max_length tokens; skipped and truncated rows are counted."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """What happens to a row that cannot be read; skipped rows are counted."""
    packing: bool = False
    """Fill training rows up to max_length with several examples each, none of which sees another: with positions that
    begin anew and attention within its borders. A step is then made of that many full rows."""
    padding_free: bool = False
    """Lay the rows of a micro-batch one behind the other, without padding, instead of one below the other."""
    streaming: bool = False
    """Read, encode and pack the training rows while they are learnt, from where they lie: for files larger than memory,
    or than what the disk has room for twice. Their first 1,024 are looked at before; train.max_steps says where to
    end."""
    loss_on: Literal["assistant", "last_assistant", "all"] = "assistant"
    """Which tokens are learnt: the assistant's turns with their end-of-turn token, the last of them, or every token."""
    train_on_eos: Literal["turn", "all", "last", "none"] = "turn"
    """Which tokens that end turns are learnt: turn: those of turns that are learnt; all: of the others, too; last: of
    the last turn alone; none: none."""
    prompt_loss_weight: Fraction = 0.0
    """What a token that is read and not learnt counts in the loss of a training, beside the 1 of one that is learnt;
    held-out rows are measured without. Turns of weight 0 count nothing."""
    ignore_fields: Many[str] = ()
    """Fields of rows to leave out as if they were not there, by dotted names (`messages.reasoning_content`)."""
    template: Literal["auto", "none"] = "auto"
    """auto: rows are rendered by the chat template. none: question and answer stand one behind the other, with the end
    token; so it is for a model without a template, too."""
    chat_template: str | None = None
    """A Jinja file to use instead of the model's own chat template, or for a model that has none."""
    template_kwargs: Switches = Field((), json_schema_extra={"default": {}})
    """Arguments of the chat template, such as enable_thinking. They become its defaults, wherever the model goes."""
    audit: AuditSection = AuditSection()
    """What becomes of each finding about the rows."""
    num_proc: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Processes that tokenize. auto: one for each core, and for 2,000 rows."""

    @property
    def is_packed(self) -> bool:
        """Whether several examples lie in one row of a batch."""
        return self.packing or self.padding_free
