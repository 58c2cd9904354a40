"""plan.json of a run and `qft check --json`: what is decided before anything is loaded."""

from typing import Annotated, Literal

from pydantic import Field

from qft.documents.manifest import DevicePart, PluginFile
from qft.documents.part import Bytes, Share, Stored, Tokens
from qft.documents.placement import PlannedGpus
from qft.documents.rows import Finding, RowLengths, ShownRow

Matched = Annotated[
    dict[str, dict[str, int]],
    Field(
        description="Modules that each name, pattern or index in a field of the recipe matches: {field: {entry: n}}."
    ),
]


class PlannedModel(Stored):
    """The model, counted without its weights."""

    path: str
    """As the recipe says."""
    commit: str | None
    dtype: str
    """Of the weights that are not quantized."""
    architecture: str
    layers: int
    """Blocks."""
    hidden_size: int
    parameters: int
    linear_parameters: int
    """Weights of the linear layers that quantization applies to (all but the output head)."""
    trainable_parameters: int
    max_positions: Tokens | None
    """Longest sequence that the model was built for."""
    position_table: Tokens | None = None
    """Longest sequence that its tables of positions have room for. None: it computes its positions, or the document is
    from before it was told here."""
    embeddings: Tokens | None = None
    """Tokens that its input embeddings know; None in documents from before it was told here."""
    added_tokens: dict[str, int] = {}
    """Tokens that the recipe adds, and their numbers."""
    heads: list[str]
    beside: list[str] = []
    """Modules beside the language part (towers for images, what projects their output), which stay as they are: not
    quantized, without adapters, and handed over to the bit. Empty in documents from before they were told here."""


class Quantization(Stored):
    """How the linear layers are held. Beside these fields it has the arguments of the quantization config, under the
    names that bitsandbytes, the checkpoint or the plugin gives them."""

    scheme: str
    """none, 8bit, 4bit, qat, or the method of a plugin or of a checkpoint that comes quantized."""
    plugin: PluginFile | None = None
    described: str = ""
    """In words, with the data type and what is left as it is; empty in documents from before it was told here."""
    quantized_share: Share | None = None
    """Of the weights (parameters of two dimensions or more) outside embeddings and head, by count, what is held in few
    bits. None: only a plugin or the checkpoint's own code knows, or the document is from before it was told here."""


class AdapterArguments(Stored):
    """Arguments of peft.LoraConfig, under its names."""

    r: int
    target_modules: str | list[str]


class PlannedExperts(Stored):
    """The experts of a mixture, and what of them is trained."""

    experts: int
    """Of a layer."""
    weights: int
    """Of all experts."""
    share: Share
    """Of the weights outside embeddings and head, by count."""
    adapted: int
    """Parameters [experts, a, b] that get adapters (peft's target_parameters), each for all experts of a layer."""
    trainable_parameters: int
    """Of these adapters."""
    decided: str
    """adapter.target_experts, true or false, and why."""
    router: str
    """What becomes of what picks the experts: frozen, adapted or trained in full."""
    unadapted: list[str] = []
    """Linear layers that all-linear leaves without adapters, since peft takes their names for those of experts."""


class TrainerArguments(Stored):
    """Arguments of transformers.TrainingArguments, under its names."""

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    learning_rate: float
    lr_scheduler_type: str
    optim: str
    bf16: bool
    fp16: bool

    @property
    def checkpointing(self) -> bool:
        """Whether gradients are checkpointed, by either of the names that transformers has had for it."""
        others = self.model_extra or {}
        return bool(others.get("activation_checkpointing", others.get("gradient_checkpointing")))


class SourceFacts(Stored):
    """What one source of rows held."""

    path: str
    part: str
    """train or eval"""
    format: str
    rows: int
    """Rows that are used, before weighting and splitting."""
    examples: int | None = None
    """What these rows became: more than `rows` where the chat template renders earlier turns otherwise once more
    follow, so that each is learnt in a context of its own. None in documents from before it was counted."""
    repeated_tokens: Tokens = 0
    """Of `tokens`, those in examples beside each row's last, which holds all of it: the price of the others."""
    unread: dict[str, int] = {}
    """Rows that have each field which nobody reads, by its name."""
    skipped: int
    truncated: int
    tokens: Tokens
    supervised_tokens: Tokens
    longest: Tokens
    digest: str | None
    """SHA-256 of its file, and of its images' where it has some; None if it has none of its own."""
    images: int = 0
    unit: str
    """What a row's number counts: line or row."""
    weight: float


class DataPart(Stored):
    train_rows: int
    """Examples, after weighting and splitting."""
    packed_rows: int | None = None
    """Rows of several examples that they share; None: each has its own."""
    streamed_lines: int | None = None
    """Of the files that are read while they are learnt: all else here is of their first rows. None: all are read
    before."""
    eval_rows: int
    chat_template: str | None = None
    """What renders the rows: `model`, a file, or `none` (question and answer one behind the other, then the end token).
    None in documents from before it was told."""
    max_length: Tokens | None = None
    """Of a row; None in documents from before it was decided here."""
    lengths: RowLengths | None = None
    """None in documents from before they were told here."""
    findings: list[Finding] = []
    added_tokens: dict[str, int] = {}
    """How often each token that the recipe adds stands in the training rows."""
    sources: list[SourceFacts]


class Audit(Stored):
    """What the calibration windows are made of."""

    rows: int
    windows: int
    window_tokens: Tokens
    tokens: Tokens
    """In all windows."""
    row_length_p5: Tokens
    row_length_p50: Tokens
    row_length_p95: Tokens
    distinct_tokens: Tokens
    vocabulary_share: Share
    """distinct_tokens / tokens that the tokenizer knows."""
    duplicate_rows: int
    """Drawn rows whose tokens are those of another one drawn before."""
    truncated_rows: int
    """Drawn rows of more than calibrate.max_length tokens, of which the first so many count."""
    by_source: dict[str, int]
    """Rows drawn, by the path of their source."""
    sha256: str
    """Of the windows' ids in their order, as little-endian int32."""


class LayerPart(Stored):
    """How one linear layer is to be held."""

    data_type: str
    """int, float, nf4 or fp4."""
    bits: int
    group_size: int
    """Weights of a row that share a scale; -1: all of it."""
    symmetric: bool
    activations: str
    """none, dynamic or static."""


class CalibrationPart(Stored):
    audit: Audit | None
    """None if the engine looks at no windows."""
    warnings: list[str]
    verify_rows: int
    """Rows on which the result is judged."""
    sources: list[SourceFacts] = []


class CalibrationPlanDocument(Stored):
    """How a trained model is quantized for inference."""

    schema_version: Literal[1] = 1
    kind: Literal["calibration-plan"] = "calibration-plan"
    device: DevicePart
    model: PlannedModel
    """The unquantized model."""
    engine: str
    algorithm: str | None = None
    """Of engine llmcompressor; None with the others."""
    schemes: dict[str, LayerPart | None]
    """Of every linear layer, by its name; None: left in 16 bits. Empty with engine custom, whose plugin decides."""
    quantization: Quantization | None = None
    """Of engine custom; None with the others."""
    quantized_share: Share | None = None
    """Of the weights (parameters of two dimensions or more) outside embeddings and head, by count, what is quantized.
    None with engine custom, whose plugin decides, and in documents from before it was told here."""
    matched: Matched = {}
    data: CalibrationPart


Kept = Literal["inputs", "attention", "products", "all"]
"""What a block keeps for its backward pass: its input alone, what attention is made of and the MLP's input, everything
but outputs of norms, everything."""


class PlannedWay(Stored):
    """One way to make the same optimizer step."""

    rows: int
    """Of a micro-batch."""
    accumulated: int
    """Micro-batches of a step."""
    recomputed: int
    """Blocks that keep `least` for the backward pass, the first ones; the others keep `most`."""
    peak: Bytes
    """What the device must have."""
    fits: bool
    speed: Share
    """Estimated, of that of large micro-batches with nothing computed again."""
    least: Kept = "inputs"
    most: Kept = "all"


class PlannedMemory(Stored):
    """What the training will take, predicted from the model's configuration, the recipe and the longest batch."""

    predicted_peak_bytes: Bytes | None = None
    """Of the device, as torch.cuda.max_memory_allocated counts on a GPU. None: see unknown."""
    predicted_host_bytes: Bytes | None = None
    """Largest resident set of the process."""
    components: dict[str, Bytes] = {}
    """Of the peak, by what they are."""
    peaks: dict[str, Bytes] = {}
    """Of the device, by the part of the work."""
    device_bytes: Bytes
    budget_bytes: Bytes
    fits: bool | None = None
    """Whether the peak, with what CUDA takes beside its allocator, is within the budget."""
    unknown: str | None = None
    """Why nothing is predicted."""
    recomputed_blocks: int | None = None
    """Of the blocks, the first ones that are computed again in the backward pass, or that keep less than the others
    (the first of `ways` says what); None: as gradient_checkpointing says."""
    optimizer: str | None = None
    """What `auto` of train.optim came to, and why; None: the recipe says which."""
    ways: list[PlannedWay] = []
    """What `auto` of train.per_device_train_batch_size and gradient_checkpointing was chosen from, the best first."""


class PlannedStage(Stored):
    """One of train.stages."""

    first_step: int
    last_step: int
    """Optimizer steps, counted over all stages."""
    quantization: Quantization
    training: TrainerArguments
    reset_optimizer: bool
    reset_lr_scheduler: bool
    memory: PlannedMemory | None = None


class PlanDocument(Stored):
    """How a training goes."""

    schema_version: Literal[1] = 1
    kind: Literal["plan"] = "plan"
    device: DevicePart
    model: PlannedModel
    quantization: Quantization
    skip_modules: Literal["auto"] | list[str] = []
    """As the recipe says; auto: measured and chosen by `qft train`."""
    matched: Matched = {}
    adapter: AdapterArguments | None
    """None: all weights are trained."""
    experts: PlannedExperts | None = None
    """None without experts, without adapters, and in documents from before it was told here."""
    offload: Literal["none", "cpu", "disk"] = "none"
    """Where the blocks of the base wait, of which two are on the device; none: all are."""
    checkpoints: Literal["device", "host"] | None = None
    """Where the inputs of checkpointed blocks wait for the backward pass; None: no blocks are checkpointed."""
    kernels: dict[str, str | None] = {}
    """Of each kind of part that kernels of qft's own can compute, why the model's own code does; None: they do, where
    they agree with that on the loaded model."""
    training: TrainerArguments
    data: DataPart
    steps: int
    """Optimizer steps in all."""
    stages: list[PlannedStage] = []
    """Empty without train.stages; else the last one is what the document speaks of otherwise."""
    memory: PlannedMemory | None = None
    """Of the stage that takes most. None in documents from before it was predicted."""
    gpu_allocator: str | None = None
    """The variable that sets up the GPU's allocator: PYTORCH_ALLOC_CONF=expandable_segments:True, which qft sets where
    nobody else did. None without a GPU, and in documents from before it was told here."""
    calibration: CalibrationPlanDocument | None = None
    """Told by `qft check` alone, where the recipe has a section for it."""
    shown: list[ShownRow] = []
    """Of each source, as many rows as `qft check --show` asks for."""
    gpus: PlannedGpus | None = None
    """Told by `qft check` alone, of several GPUs; `memory` and `training` are then those of each of them, as is chosen.
    None: there is one."""
    exports: dict[str, str | None] = {}
    """Told by `qft check` alone: of each form of export.target, why the training could not be handed over so; None:
    nothing is known to stand in the way."""


class CalibrationCheck(Stored):
    """What `qft check --json` prints of a recipe that trains nothing."""

    schema_version: Literal[1] = 1
    kind: Literal["calibration-check"] = "calibration-check"
    calibration: CalibrationPlanDocument
    shown: list[ShownRow] = []
    """Of each source, as many rows as `qft check --show` asks for."""
