"""The report: one JSON document, of which every table and picture is a view."""

from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from qft.disk import room
from qft.documents.distributed import Distributed
from qft.documents.memory import Leak, MomentMemory, PhaseMemory
from qft.documents.part import Bits, Bytes, Nats, Part, Seconds, Share, Tokens, TokensPerSecond
from qft.documents.skipped import SkippedModules
from qft.errors import MissingError, RunError
from qft.files import require_regular


class ModelPart(Part):
    path: str
    """As the recipe says."""
    architecture: str
    device: str
    """Name of the GPU or CPU."""
    scheme: str
    """How the linear layers are held: none, 8bit, 4bit, qat, or the method of a checkpoint that came quantized."""
    quant_type: str | None
    """nf4 or fp4, for 4bit; quant.target, for qat."""
    dtype: str
    """Dtype of the weights that are not quantized."""
    parameters: int
    trainable_parameters: int
    trainable_share: Share
    """trainable_parameters / parameters."""
    quantized_share: Share | None = None
    """Of the weights (parameters of two dimensions or more) outside embeddings and head, by count, what the loaded base
    holds in few bits. None: the checkpoint's own code knows, or the report is from before it was told here."""
    bits_per_weight: Bits
    """Bits of memory for each of the base's parameters, scales included."""


class Throughput(Part):
    """Over the steps after the first, evaluations and checkpoints aside. Padding does not count."""

    tokens_per_second: TokensPerSecond
    samples_per_second: float
    step_seconds_p50: Seconds
    step_seconds_p95: Seconds
    padding_share: Share
    """Share of the computed tokens that were padding."""
    history: list[tuple[int, TokensPerSecond]]
    """[step, tokens per second]."""


class Components(Part):
    """Bytes of each part, as held by this run."""

    base_weights: Bytes
    """Frozen weights and buffers, with the scales of quantized ones."""
    trainable_weights: Bytes
    """Adapter, or all weights."""
    gradients: Bytes
    optimizer_state: Bytes
    activations: Bytes | None
    """On a GPU: what the training's peak holds beside the above: activations, logits and workspace. None on a CPU: see
    undivided."""
    undivided: Bytes | None = None
    """On a CPU: what the process held at the training's peak beside the above: libraries, data, activations and what
    its allocator keeps, which cannot be told apart. None on a GPU."""


class Memory(Part):
    """Bytes. Of the GPU: allocated by tensors; of the host: resident set of the process."""

    peak_gpu_bytes: Bytes
    """0 without a GPU. Of all phases, as are the next two."""
    peak_gpu_reserved_bytes: Bytes
    """What the allocator held at its peak."""
    peak_host_bytes: Bytes
    """As the system itself keeps it since the process began: what `time -v` calls the maximum resident set size."""
    peak_child_bytes: Bytes = 0
    """Of the largest process that this one started and that has ended, as of those that encode rows or prepare batches;
    it is in no other figure. 0 where there was none, or where the system does not say."""
    predicted_peak_bytes: Bytes | None = None
    """Of the device, before anything was loaded: what the training's own peak was thought to be, on a GPU that of
    peak_gpu_bytes. None: nothing could be predicted, or the report is from before it was."""
    predicted_host_bytes: Bytes | None = None
    """What peak_host_bytes was thought to be."""
    fits: bool | None = None
    """Whether that was within memory.budget."""
    predicted_components: dict[str, Bytes] = {}
    """Of the predicted peak of the device."""
    device_bytes: Bytes
    after_load_bytes: Bytes
    """On the device that trains, as are the two below; of the last part of a resumed run."""
    after_first_step_bytes: Bytes
    at_end_bytes: Bytes
    moments: dict[str, MomentMemory] = {}
    """By before_load, after_load, after_adapters, after_first_step and at_end; of the last part of a resumed run."""
    phases: dict[str, PhaseMemory] = {}
    """By prepare (the process's start, data and plan), load, adapters (they and the Trainer), evaluate_before, train,
    save and evaluate_after; the largest of any part of a resumed run."""
    gpu_allocator: str | None = None
    """The variable that sets up the GPU's allocator: PYTORCH_ALLOC_CONF=expandable_segments:True, which qft sets where
    nobody else did. None without a GPU."""
    growing: bool
    """Whether something leaks: see leak."""
    growth_bytes_per_100_steps: Bytes | None = None
    """Of what the device that trains holds after a step, over the last two thirds of the steps of the last part of a
    resumed run, jumps aside; None from too few steps. On a CPU it holds what the allocator keeps, too."""
    host_growth_bytes_per_100_steps: Bytes | None = None
    """The same of the resident set of this process."""
    leak_threshold_bytes: Bytes | None = None
    """In 100 steps, as memory.leak_threshold says. None: no leak was looked for."""
    leak: Leak | None = None
    """None: none was found."""
    history: list[tuple[int, Bytes, Bytes]]
    """[step, bytes after it, largest so far], on the device that trains."""
    components: Components
    offloaded_bytes: Bytes = 0
    """Of frozen weights, what memory.offload kept off the device."""


class Settings(Part):
    """What the training was set to, as far as the advice speaks of it."""

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    dataloader_num_workers: int
    dataloader_pin_memory: bool
    tf32_unused: bool
    """Whether products are in float32, on a GPU that has TensorFloat-32 and was not to use it."""
    largest_micro_batch_tokens: Tokens
    """With padding."""
    chunked_loss: bool = False
    """Whether the loss was computed from few logits at a time."""
    fused_loss: bool = False
    """Whether its gradient was taken in the same pass over them, on learnt tokens alone."""
    attention_mask: bool = True
    """Whether the model was given a mask in training; false where padding on the right was seen to need none."""
    logits_bytes: Bytes
    """In float32, in which the loss takes them: of the largest micro-batch tokens x vocabulary x 4, or as many as are
    taken at a time. The loss and the backward pass hold as much once or twice more for a moment."""


class Kernels(Part):
    """What kernels of qft's own computed in training."""

    fused: dict[str, int]
    """Modules that they computed, by what these are."""
    plain: dict[str, int]
    """Modules that the model's own code computed, by the reason."""


class Checkpointing(Part):
    """What gradient checkpointing did, measured on one block and its first batch."""

    saved_bytes: Bytes
    """What all blocks would keep for the backward pass without it."""
    cost_share: Share
    """Time of computing the blocks again, over the rest of the step."""


class Loss(Part):
    """Mean over the supervised tokens of a step."""

    first: Nats
    last: Nats
    """Mean of the last tenth of the steps."""
    lowest: Nats
    spikes: int
    """Steps whose loss rose by more than four times the usual change from step to step."""
    history: list[tuple[int, Nats, float, float]]
    """[step, loss, learning rate, gradient norm before clipping]."""


class BalanceLoss(Part):
    """The loss that keeps a mixture's experts evenly used, per forward pass; it grows with unevenness. Of the last part
    of a resumed run."""

    coefficient: float
    """What it counts in the loss that is trained on."""
    first: float
    last: float
    mean: float
    micro_batches: int


class Evaluation(Part):
    step: int
    loss: Nats
    """Mean over the supervised tokens."""
    perplexity: float
    """exp(loss)."""
    tokens: Tokens
    """Supervised tokens."""
    rows: int
    scores: dict[str, Share] = {}
    """Shares, by the names in eval.metrics."""


class Evaluations(Part):
    before: Evaluation | None = None
    after: Evaluation | None = None
    history: list[Evaluation] = []
    """During the training."""


class Phases(Part):
    """Share of the training time, in sum 1."""

    data: Share
    forward: Share
    backward: Share
    optimizer: Share


class OutOfMemory(Part):
    """Memory ran out, and what was changed so that the training went on."""

    step: int
    """The optimizer step that was made again; of an evaluation, the last one before it."""
    phase: Literal["forward", "backward", "optimizer", "evaluation"]
    """What failed. The evaluation includes the answers."""
    asked_bytes: Bytes | None
    """For which the allocator was asked. None: it did not say."""
    field: str
    """Of the recipe, which has another value from here on."""
    was: int | bool | str
    now: int | bool | str
    gradient_accumulation_steps: int
    """Forward passes in a whole optimizer step from here on."""

    def told(self) -> str:
        """In one sentence."""
        asked = "" if self.asked_bytes is None else f", which asked for {room(self.asked_bytes)}"
        where = f"{self.phase} pass" if self.phase in ("forward", "backward") else self.phase
        changed = f"{self.field} {self.was} → {self.now}".replace("False → True", "on")
        passes = f", gradient_accumulation_steps {self.gradient_accumulation_steps}" if "train_batch" in changed else ""
        return f"step {self.step}: out of memory in the {where}{asked}: {changed}{passes}"


class StageSettings(Part):
    """What one of train.stages was set to."""

    learning_rate: float
    """At its peak."""
    lr_scheduler_type: str
    optim: str
    reset_optimizer: bool
    reset_lr_scheduler: bool


class StageReport(Part):
    """What was measured of one of train.stages."""

    first_step: int
    last_step: int
    """Optimizer steps, counted over all stages."""
    model: ModelPart | None
    """None, as are the figures below, where the checkpoint that the run was resumed from had none."""
    settings: StageSettings
    loss: Loss | None
    """None, too, if every update was skipped."""
    before: Evaluation | None
    """Of what the stage before came to, on this one's base."""
    after: Evaluation | None
    throughput: Throughput | None
    peak_bytes: Bytes | None
    """Of the device that trains, in its steps; of the host: resident set of the process."""
    predicted_peak_bytes: Bytes | None
    """Of the device, before anything was loaded."""


class Report(Part):
    """What a training measured. Bytes, seconds and tokens throughout; shares are between 0 and 1."""

    schema_version: Literal[1] = 1
    kind: Literal["train"] = "train"
    run: str
    """The run folder."""
    result: str
    """Where the adapter, or the model, was written."""
    model: ModelPart
    throughput: Throughput
    distributed: Distributed | None = None
    """None: one process trained alone. The figures beside it are of all processes together where they count rows,
    tokens or steps; of the first one where they are of memory or phases."""
    phases: Phases
    memory: Memory
    skipped_modules: SkippedModules | None = None
    """None unless quant.skip_modules is auto."""
    settings: Settings | None = None
    """None in reports from before it was told here."""
    stages: list[StageReport] = []
    """Empty without train.stages; else `model` and `settings` are the last one's."""
    kernels: Kernels | None = None
    """None where the plan had none, and in reports from before there were any."""
    checkpointing: Checkpointing | None = None
    """None where it is off."""
    balance: BalanceLoss | None = None
    """None: the model computes none, or the report is from before it was told here."""
    loss: Loss
    eval: Evaluations
    lengths: list[tuple[Tokens, int]]
    """Histogram of the training rows: [longest of the bin in tokens, rows]."""
    resumed_from: list[int] = []
    """Steps of the checkpoints from which the run was resumed, in their order. What follows counts all its parts, each
    up to the checkpoint from which the next one went on."""
    steps: int
    """Optimizer steps."""
    unmeasured_steps: int = 0
    """Steps before those, made by a qft that kept no figures beside its checkpoints."""
    out_of_memory: list[OutOfMemory] = []
    """Each time that memory ran out and memory.on_oom: fit went on, in their order."""
    skipped_steps: int
    """Updates that were not made because a number was not finite."""
    samples: int
    tokens: Tokens
    """Tokens trained on, padding aside."""
    supervised_tokens: Tokens
    wall_seconds: Seconds
    """From the command to the report: loading, training, evaluations and checkpoints, summed over the parts."""
    advice: list[str]


def read_report(folder: Path) -> Report:
    """The report of a run folder. Raises MissingError if there is none, RunError if it cannot be read."""
    path = folder / "report.json"
    try:
        text = require_regular(path).read_bytes()
    except OSError:
        raise MissingError(f"{path}: no report; a run writes it when it completes") from None
    try:
        return Report.model_validate_json(text)
    except ValidationError as error:
        raise RunError(f"{path}: not a report that this qft can read: {error.errors()[0]['msg']}") from None
