"""What a training is asked: the sections that it reads, as frozen pydantic models that know nothing of torch.

Field names follow the library that honours them: `train` those of `transformers.TrainingArguments`, `quant` those of
`BitsAndBytesConfig` without their prefixes, `adapter` those of `peft.LoraConfig`. A field that is not listed is an
error. `auto` is decided by the plan, never here.
"""

from typing import Annotated, Literal

from pydantic import Field

from qft.recipe.memory import Size
from qft.recipe.section import Fraction, Many, Overrides, Section

Dtype = Literal["float32", "bfloat16", "float16"]
QatTarget = Literal[
    "int4-g32", "int4-g64", "int4-g128", "int8", "w8a8", "w8a8-static", "int8-dynamic-act-int4-weight", "8da4w",
    "mxfp4", "nvfp4", "nf4", "q4_0", "q4_k", "q8_0",
]  # fmt: skip


class ModelSection(Section):
    """Which model, and how its unquantized weights are held."""

    path: str = Field(min_length=1)
    """A hub id, a local folder, a .gguf file, or package:NAME/FILE (a file that an installed Python package ships)."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; the commit it stands for is recorded. None: the main branch."""
    dtype: Literal[Dtype, "auto"] = "auto"
    """Dtype of every weight that is not quantized: norms, head, embeddings, and the linears under quant.mode none.
    auto: bfloat16 where the device has it, else float16 on a GPU; float32 when all weights are trained."""
    dequantize: bool = False
    """Dequantize the weights of a checkpoint that comes quantized while they are read (compressed-tensors, GPTQ, AWQ,
    float8, MXFP4, bitsandbytes), and hold them as `quant` says. false: they stay as they come."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs. auto: the GPU if there is one, else the CPU."""
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = "auto"
    """Attention kernel, by its transformers name. auto: the one that transformers picks for the model."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off: a model that needs it is refused."""
    ignore_unexpected: Many[str] = ()
    """Regular expressions for names of tensors that the checkpoint holds, its model does not have and transformers does
    not know as such: they are left out. Any other unexpected tensor is an error."""
    add_tokens: Many[str] = ()
    """Texts that become one token each. Their rows of embeddings and output head start as the mean of what they were
    split into, and are trained; with adapter.modules_to_save: [embed_tokens, lm_head], all rows are."""
    add_special_tokens: Many[str] = ()
    """Likewise, of tokens that stand for no text, such as the marks of a chat template."""


OF_FILES = ("path", "revision", "ignore_unexpected", "add_tokens", "add_special_tokens")
"""Fields of `model` that say which files it is made of; a model that qft has made of them asks for none again."""


class QuantSection(Section):
    """In how few bits the linear layers are held."""

    preset: Literal["inference", "finetune"] | None = None
    """Starting values that explicit fields override. inference: 4bit fp4, float32 compute, no double quantization.
    finetune: 4bit nf4, bfloat16 compute, double quantization."""
    mode: Literal["none", "8bit", "4bit", "custom", "qat"] = "none"
    """none: as model.dtype says; 8bit: LLM.int8(); 4bit: the 4-bit data type of quant_type; custom: by the code of
    plugin; qat (quantization-aware training): as model.dtype says, and multiplied as `target` rounds them."""
    target: QatTarget | None = None
    """The format to train for: int4-g32, int4-g64, int4-g128 (integers with a scale for so many weights), int8 (with a
    scale a row), w8a8 and int8-dynamic-act-int4-weight (int8, or int4-g32, multiplied with activations in 8 bits that
    are scaled per token), w8a8-static (int8, with activations scaled by the largest that was seen), mxfp4 (4-bit floats
    with a power of two for 32), nvfp4 (with a float8 for 16 and a float32 for the layers of a module), all as
    compressed-tensors; 8da4w (int4-g32 with 8-bit activations, as torchao has it); nf4 (bitsandbytes, double
    quantization); q4_0, q4_k, q8_0 (GGUF). Only with mode qat, which needs it."""
    fake_quant_after_steps: int = Field(0, ge=0)
    """Optimizer steps before rounding begins. Only with mode qat."""
    freeze_observers_after_steps: int = Field(10, ge=1)
    """Optimizer steps that look for the largest activations, whose range is then frozen. Only with w8a8-static."""
    learn_scales: bool = False
    """Train the scales too (LSQ, arXiv:1902.08153). Only with mode qat and integers (not q4_0, ...)."""
    distill: bool | Annotated[float, Field(gt=0, le=1)] = False
    """Learn from the predictions of the same model without adapter and rounding (KL divergence on the learnt tokens,
    arXiv:2601.20088), instead of the tokens themselves. A number: both, of which the divergence is this share. Only
    with mode qat."""
    plugin: str | None = Field(None, min_length=1)
    """A Python file that registers a quantizer with transformers. It is run: name only code that you trust. Only with
    mode custom, which needs it."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type: nf4 (normal float, for weights that are trained on) or fp4. Only with mode 4bit."""
    double_quant: bool = True
    """Quantize the scaling factors too: about 0.4 bits a weight less. Only with mode 4bit."""
    compute_dtype: Literal[Dtype, "auto"] = "auto"
    """Dtype in which dequantized weights are multiplied. auto: model.dtype. Only with mode 4bit."""
    quant_storage: Literal["uint8", "float16", "bfloat16", "float32"] = "uint8"
    """Dtype of the tensors that hold the packed 4-bit weights of linear layers (experts': uint8); FSDP wants the
    compute dtype. Only with mode 4bit."""
    threshold: float = Field(6.0, ge=0)
    """Activations above this magnitude are multiplied in 16 bits (LLM.int8()'s outliers). Only with mode 8bit."""
    skip_modules: Literal["auto"] | Many[str] = ()
    """Names of linear layers to leave unquantized, beside the output head that is always left. auto: those whose output
    quantizing harms most, measured on training rows before the training, within one of the budgets below."""
    allow_partial: bool = False
    """Take a 4bit or 8bit base of which less than 90% of the weights outside embeddings and head are held so: the
    others are neither layers of torch.nn.Linear nor experts. What skip_modules leaves out needs no leave."""
    skip_budget_bits: float | None = Field(None, gt=0)
    """Bits that a linear weight may take more on average, for skip_modules auto."""
    skip_budget_bytes: int | None = Field(None, ge=1)
    """Bytes that the linear layers may take more in all, for skip_modules auto."""

    @property
    def named_skips(self) -> tuple[str, ...]:
        """skip_modules, none as long as auto is to choose them."""
        return () if self.skip_modules == "auto" else self.skip_modules


class AdapterSection(Section):
    """What is trained on top of the base weights."""

    kind: Literal["lora", "none"] = "lora"
    """lora: low-rank adapters; none: all weights, of an unquantized model."""
    r: int = Field(16, ge=1)
    """Rank of the update matrices."""
    lora_alpha: float = Field(16.0, gt=0)
    """The update is scaled by lora_alpha / r (lora_alpha / sqrt(r) with use_rslora)."""
    lora_dropout: Fraction = 0.0
    """Dropout probability in front of the update."""
    target_modules: str | Many[str] = "all-linear"
    """all-linear (every linear layer but the head), a list of layer names, or one regular expression."""
    target_experts: bool | Literal["auto"] = "auto"
    """Whether the experts of a mixture get adapters, on the parameters that hold those of a layer. auto: with
    all-linear, where experts are half of the weights or more and the adapters no more than a tenth of theirs."""
    exclude_modules: str | Many[str] | None = None
    """Layer names, or one regular expression, to leave out of target_modules."""
    target_towers: bool = False
    """Let target_modules match beside the language part too: towers for images, and what projects their output. Rows of
    text never reach those; rows with images do."""
    layers_to_transform: Many[int] | None = None
    """Indices of the blocks that get adapters. None: all. Needs target_modules as a list."""
    use_rslora: bool = False
    """Rank-stabilised scaling (arXiv:2312.03732)."""
    use_dora: bool = False
    """Weight-decomposed update (arXiv:2402.09353)."""
    init_lora_weights: Annotated[str, Field(pattern=r"^(default|gaussian|olora|loftq|pissa(_niter_[0-9]+)?)$")] = (
        "default"
    )
    """default (B is zero), gaussian, loftq (starts from the quantization error; mode 4bit only),
    or pissa, pissa_niter_N, olora (these change the base weights; mode none only)."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained."""
    modules_to_save: Many[str] = ()
    """Modules trained in full and saved with the adapter, such as embed_tokens and lm_head."""


class TrainSection(Section):
    """How it is learnt, by the names of transformers.TrainingArguments."""

    per_device_train_batch_size: Literal["auto"] | Annotated[int, Field(ge=1)] = 1
    """Rows in one forward pass. auto: of the gradient_accumulation_steps rows that one step is then made of, as many at
    once as is fastest within memory.budget."""
    per_device_eval_batch_size: int = Field(4, ge=1)
    """Rows in one forward pass of an evaluation."""
    gradient_accumulation_steps: int = Field(8, ge=1)
    """Forward passes in one optimizer step; the loss is averaged over all their tokens."""
    num_train_epochs: float = Field(1.0, gt=0)
    """Passes over the data; max_steps, if it is set, takes precedence."""
    max_steps: int = Field(-1, ge=-1)
    """Optimizer steps in all. -1: as num_train_epochs says."""
    learning_rate: float = Field(2e-4, gt=0)
    """Peak learning rate."""
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
    ] = "linear"
    """Shape of the learning rate after the warm-up."""
    warmup_steps: float = Field(0.03, ge=0)
    """Warm-up: optimizer steps if 1 or more, else a share of all steps."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    adam_beta1: Fraction = 0.9
    """Decay of the first moment."""
    adam_beta2: Fraction = 0.999
    """Decay of the second moment."""
    adam_epsilon: float = Field(1e-8, gt=0)
    """Added to the denominator of the update."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are scaled down to this norm. 0: never."""
    optim: Literal[
        "auto",
        "adamw_torch",
        "adamw_torch_fused",
        "adamw_8bit",
        "paged_adamw_8bit",
        "paged_adamw_32bit",
        "lion_8bit",
        "lion_32bit",
        "adafactor",
        "sgd",
    ] = "auto"
    """Optimizer. The 8bit and paged ones are bitsandbytes'. auto: adamw_torch_fused, or adamw_8bit on a GPU where its
    state leaves room for a faster step, or for a step at all."""
    bf16: bool | Literal["auto"] = "auto"
    """Mixed precision in bfloat16. auto: on where the device has it, unless fp16 is on or the weights are float32 by
    request, or float16 on a CPU."""
    fp16: bool = False
    """Mixed precision in float16 with loss scaling; GPU only."""
    tf32: bool | Literal["auto"] = "auto"
    """TensorFloat-32 in float32 matrix products. auto: on where the GPU has it (compute capability 8.0)."""
    gradient_checkpointing: bool | Literal["auto"] | Annotated[Size, Field(ge=2**20)] = False
    """Keep only each block's input and compute the rest again in the backward pass (non-reentrant). auto: of as many
    blocks, and as much of them, as must be for the training to fit into memory.budget. A size (12GiB, or bytes): so
    much may be taken beyond what keeping inputs alone takes."""
    chunked_loss: bool | Literal["auto"] = "auto"
    """Compute output head and loss from the logits of some thousand tokens at a time, and again for the backward pass:
    of all tokens at once, they can outweigh the model. auto: on a GPU, and with memory.offload."""
    kernels: Literal["auto", "fused", "plain"] = "auto"
    """Compute MLPs, linear layers with LoRA and norms by kernels of qft's own, each part where it agrees with the
    model's own code. auto: on a GPU, where the recipe allows it, and on a CPU adapters with their layers and attention
    of short rows in fewer passes; fused: on a GPU, and refused where the recipe does not allow it."""
    matmul: Literal["16bit", "fp8"] = "16bit"
    """In what kernels (train.kernels) multiply by frozen weights. 16bit: as bf16 and fp16 say. fp8: in float8 (e4m3, a
    scale for each token) on the way back, and of gated MLPs gate and up on the way forward, too, all rounded anew in
    each step; on NVIDIA GPUs from Hopper on. Adapters and output head stay in 16 bits."""
    router_aux_loss_coef: float | None = Field(None, ge=0)
    """What the loss that keeps a mixture's experts evenly used counts beside the other. 0: it is not computed. None: as
    the checkpoint's configuration says (output_router_logits)."""
    torch_compile: bool = False
    """Compile the model; an unquantized one only."""
    neftune_noise_alpha: float | None = Field(None, gt=0)
    """Noise added to the embeddings (arXiv:2310.05914). None: none."""
    label_smoothing_factor: Fraction = 0.0
    """Share of the target probability spread over all tokens."""
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = "random"
    """Order of the rows in an epoch."""
    dataloader_num_workers: int = Field(0, ge=0)
    """Processes that prepare batches. 0: the training process."""
    dataloader_pin_memory: bool | Literal["auto"] = "auto"
    """Page-locked host memory for copies to a GPU. auto: on with a GPU."""
    logging_steps: int = Field(1, ge=1)
    """Optimizer steps between two log entries."""
    eval_strategy: Literal["no", "steps", "epoch"] = "no"
    """When to evaluate, beside once before and once after the training."""
    eval_steps: int | None = Field(None, ge=1)
    """Optimizer steps between two evaluations, with eval_strategy steps."""
    save_strategy: Literal["no", "steps", "epoch"] = "epoch"
    """When to write a checkpoint."""
    save_steps: int = Field(500, ge=1)
    """Optimizer steps between two checkpoints, with save_strategy steps."""
    save_total_limit: int | None = Field(2, ge=1)
    """Checkpoints to keep. None: all."""
    save_on_signal: bool = True
    """Whether SIGINT (Ctrl-C), SIGTERM, SIGHUP and a batch system's SIGUSR1 let the step under way be finished and a
    checkpoint be written."""
    load_best_model_at_end: bool = False
    """Hand over the checkpoint with the lowest eval loss instead of the last one."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """Stop after this many evaluations without a lower eval loss. Needs load_best_model_at_end."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What happens before an update whose loss or gradient norm is NaN or infinite: the run stops and names the rows,
    or the update is skipped and counted."""
    full_determinism: bool = False
    """Deterministic kernels everywhere: slower, and repeatable to the bit."""
    report_to: Many[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = ("tensorboard",)
    """Where the curves are sent as well."""
    run_name: str | None = None
    """Name of the run there. None: the name of output_dir."""
    stages: Many[Overrides] = ()
    """Trainings that follow one another, each on from what the last came to: fields of quant and train that it sets
    ({quant.mode: 8bit, max_steps: 100}), and reset_optimizer, reset_lr_scheduler. None: one."""

    @property
    def micro_batch(self) -> int:
        """per_device_train_batch_size, once auto is decided."""
        assert self.per_device_train_batch_size != "auto"
        return self.per_device_train_batch_size

    @property
    def step_rows(self) -> int:
        """Rows of one optimizer step on one device."""
        rows = self.per_device_train_batch_size
        return self.gradient_accumulation_steps * (1 if rows == "auto" else rows)
