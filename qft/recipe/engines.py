"""Which engine loads which weight format, on what, from which version on: one table, each row with its source."""

from collections.abc import Mapping
from dataclasses import dataclass, field

ENGINES = {"transformers": "transformers", "vllm": "vllm", "sglang": "sglang", "llama.cpp": "cyllama", "ollama": None}
"""What can load a model, and its Python package; None: it has none."""
PACKAGES = ("bitsandbytes", "compressed-tensors", "torchao", "peft", "gguf", "vllm-gguf-plugin")
"""What an engine can need besides."""


@dataclass(frozen=True)
class Rule:
    """What one source says of one engine."""

    engine: str
    formats: tuple[str, ...]
    source: str
    cuda: str | None = None
    """Lowest compute capability. None: the source is silent on GPUs."""
    cpu: bool | None = None
    """None: the source is silent on CPUs."""
    since: str | None = None
    """Oldest version that the source tells of. None: any."""
    before: str | None = None
    """First version of which it no longer holds."""
    packages: Mapping[str, str] = field(default_factory=dict)
    """What must be installed besides, and its lowest version."""
    below: str | None = None
    """First compute capability of which it no longer holds."""
    loads: bool = True
    """False: the source says that it does not load."""
    says: str = ""
    """How the engine itself refuses it on a CPU."""

    @property
    def anywhere(self) -> bool:
        """Whether the device makes no difference."""
        return not self.loads or (self.cuda == ANY and self.cpu is True)


ANY = "0.0"
ADAPTERS = tuple(f"adapter on {base} base" for base in ("a 16-bit", "a bnb-4bit", "a bnb-8bit"))
ADAPTER, ADAPTER_4BIT, ADAPTER_8BIT = ADAPTERS
SPECIAL = tuple(f"{name}, with DoRA or modules_to_save" for name in ADAPTERS)
MERGED, GGUF, BNB_4BIT, BNB_8BIT = ("merged",), ("gguf",), ("bnb-4bit",), ("bnb-8bit",)
BNB, TORCHAO = BNB_4BIT + BNB_8BIT, ("torchao",)
WNA16 = ("compressed-tensors W4A16", "compressed-tensors W8A16")
ZERO_POINTS = tuple(f"{name} with zero points" for name in WNA16)
INT8_DYNAMIC = ("compressed-tensors W8A8 dynamic",)
INT8 = (*INT8_DYNAMIC, "compressed-tensors W8A8 static")
FP8 = ("compressed-tensors FP8 dynamic", "compressed-tensors FP8 static")
COMPRESSED = WNA16 + ZERO_POINTS + INT8 + FP8

PEFT = {"peft": "0.21"}
NEEDS_BNB = {"bitsandbytes": "0.46.1"}
NEEDS_BNB_NEW = {"bitsandbytes": "0.49.2"}
NEEDS_BNB_CPU = {"bitsandbytes": "0.49.0"}

HF = "transformers 5.24.0: transformers"
HF_COMPRESSED = f"{HF}/quantizers/quantizer_compressed_tensors.py"
HF_TORCHAO = f"{HF}/quantizers/quantizer_torchao.py"
HF_GGUF = "https://huggingface.co/docs/transformers/main/en/quantization/gguf"
PEFT_LORA = "https://huggingface.co/docs/peft/package_reference/lora"
BNB_GPU = "https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.49.0/docs/source/installation.mdx"
BNB_CPU = "https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.49.0/README.md"
VLLM = "https://github.com/vllm-project/vllm"
VLLM_DOCS = "https://docs.vllm.ai/en"
VLLM_TABLE = f"{VLLM_DOCS}/v0.6.4.post1/quantization/supported_hardware.html"
VLLM_GPU = f"{VLLM}/blob/v0.21.0/docs/getting_started/installation/gpu.cuda.inc.md"
VLLM_CPU = f"{VLLM}/blob/main/docs/getting_started/installation/cpu.md"
VLLM_EXAMPLES = f"{VLLM}/blob/3504b6721ba6b65e8fd3dd86aea4be70d8b0978b/examples"
VLLM_QLORA = f"{VLLM_EXAMPLES}/offline_inference/lora_with_quantization_inference.py"
VLLM_QUANT = "vllm/model_executor/layers/quantization"
VLLM_BNB = f"{VLLM}/blob/01f5395fdf04e971bac08504ccf5a2c7c0c7cda6/{VLLM_QUANT}/bitsandbytes.py"
VLLM_BNB_NEW = f"{VLLM_DOCS}/latest/features/quantization/bnb/"
VLLM_FP8 = f"{VLLM}/tree/aa63715b2ba9d047abbd5707a7627df15d030db8/{VLLM_QUANT}/compressed_tensors/schemes"
VLLM_RAN = "vllm 0.32.0: run, tests/serving/test_vllm.py"
VLLM_NO_KERNEL = "Failed to find a kernel that can implement the WNA16 linear layer"
VLLM_BNB_RAN = f"{VLLM_BNB_NEW} {VLLM_GPU} {VLLM_RAN}"
VLLM_NO_BNB = "Unknown quantization method: bitsandbytes"
VLLM_GGUF_NEW = f"{VLLM}/pull/39612 {VLLM_DOCS}/v0.24.0/features/quantization/gguf/"
SGL = "sglang 0.5.23: sglang/srt"
SGL_GPU = f"{SGL}/model_executor/model_runner_components/load_model_utils.py"
SGL_QUANT = f"{SGL}/layers/quantization"
SGL_SCHEMES = f"{SGL_QUANT}/compressed_tensors/schemes"
SGL_OLD = "sglang 0.5.1: sglang/srt"
SGL_FP8 = "layers/quantization/compressed_tensors/schemes/compressed_tensors_w8a8_fp8.py"
LLAMA = "https://github.com/ggml-org/llama.cpp/blob/master/docs"

RULES = (
    Rule("transformers", MERGED, f"{HF}/modeling_utils.py", ANY, True, "5.17"),
    Rule("transformers", (ADAPTER, SPECIAL[0]), PEFT_LORA, ANY, True, "5.17", None, PEFT),
    Rule("transformers", (ADAPTER_4BIT, SPECIAL[1]), BNB_GPU, "6.0", None, "5.17", None, PEFT | NEEDS_BNB),
    Rule("transformers", (ADAPTER_8BIT, SPECIAL[2]), BNB_GPU, "7.5", None, "5.17", None, PEFT | NEEDS_BNB),
    Rule("transformers", (ADAPTER_4BIT, SPECIAL[1]), BNB_CPU, None, True, "5.17", None, PEFT | NEEDS_BNB_CPU),
    Rule("transformers", (ADAPTER_8BIT, SPECIAL[2]), BNB_CPU, None, True, "5.17", None, PEFT | NEEDS_BNB_CPU),
    Rule("transformers", BNB_4BIT, BNB_GPU, "6.0", None, "5.17", None, NEEDS_BNB),
    Rule("transformers", BNB_8BIT, BNB_GPU, "7.5", None, "5.17", None, NEEDS_BNB),
    Rule("transformers", BNB, BNB_CPU, None, True, "5.17", None, NEEDS_BNB_CPU),
    Rule("transformers", COMPRESSED, HF_COMPRESSED, ANY, True, "5.17", None, {"compressed-tensors": "0.15.0"}),
    Rule("transformers", TORCHAO, HF_TORCHAO, ANY, True, "5.17", None, {"torchao": "0.18"}),
    Rule("transformers", GGUF, HF_GGUF, ANY, True, "5.17", None, {"gguf": "0.10.0"}),
    Rule("vllm", MERGED, VLLM_TABLE, "7.0", None, "0.6.4", "0.21.0"),
    Rule("vllm", MERGED, VLLM_GPU, "7.5", None, "0.21.0"),
    Rule("vllm", MERGED, f"{VLLM_CPU} {VLLM_RAN}", None, True, "0.11.0"),
    Rule("vllm", (ADAPTER,), f"{VLLM_DOCS}/v0.8.5/features/lora.html {VLLM_GPU}", "7.5", None, "0.8.5"),
    Rule("vllm", (ADAPTER,), VLLM_RAN, None, True, "0.32.0"),
    Rule("vllm", (ADAPTER_4BIT,), f"{VLLM_QLORA} {VLLM_GPU}", "7.5", False, "0.11.0", None, NEEDS_BNB),
    Rule("vllm", SPECIAL, f"{VLLM}/blob/main/vllm/lora/peft_helper.py", loads=False),
    Rule("vllm", BNB, VLLM_BNB, "7.0", False, "0.11.0", "0.21.0", NEEDS_BNB),
    Rule(
        "vllm",
        BNB,
        f"{VLLM_BNB_NEW} {VLLM_GPU} {VLLM_RAN}",
        "7.5",
        False,
        "0.21.0",
        None,
        NEEDS_BNB_NEW,
        says=VLLM_NO_BNB,
    ),
    Rule("vllm", WNA16, f"{VLLM_DOCS}/v0.8.0/_sources/features/quantization/int4.md", "8.0", None, "0.8.0"),
    Rule("vllm", WNA16, f"{VLLM}/pull/31000", "7.5", None, "0.23.0"),
    Rule("vllm", WNA16[:1] + ZERO_POINTS[:1], VLLM_RAN, None, True, "0.32.0"),
    Rule("vllm", WNA16[1:] + ZERO_POINTS[1:], VLLM_RAN, None, False, "0.32.0", says=VLLM_NO_KERNEL),
    Rule("vllm", INT8, f"{VLLM_TABLE} {VLLM}/pull/25935", "7.5", None, "0.6.4", below="10.0"),
    Rule("vllm", INT8, f"{VLLM_CPU} {VLLM_RAN}", None, True, "0.11.0"),
    Rule("vllm", FP8, VLLM_FP8, "8.0", False, "0.6.4"),
    Rule("vllm", FP8, f"{VLLM_DOCS}/v0.32.0/features/quantization/llm_compressor/fp8/", "7.5", False, "0.32.0"),
    Rule("vllm", GGUF, f"{VLLM_DOCS}/v0.11.2/features/quantization/", "7.0", False, "0.6.4", "0.24.0"),
    Rule("vllm", GGUF, VLLM_GGUF_NEW, "7.5", False, "0.24.0", None, {"vllm-gguf-plugin": "0.0.2"}),
    Rule("sglang", MERGED, f"{SGL_OLD}/model_executor/model_runner.py", "7.5", None, "0.5.1"),
    Rule("sglang", BNB, f"{SGL_QUANT}/bitsandbytes.py", "7.5", None, "0.5.23", None, NEEDS_BNB),
    Rule("sglang", WNA16 + ZERO_POINTS, f"{SGL_SCHEMES}/compressed_tensors_wNa16.py", "8.0", None, "0.5.23"),
    Rule("sglang", INT8_DYNAMIC, f"{SGL_SCHEMES}/compressed_tensors_w8a8_int8.py", "8.0", None, "0.5.23"),
    Rule("sglang", FP8, f"{SGL_OLD}/{SGL_FP8}", "8.9", None, "0.5.1"),
    Rule("sglang", FP8, f"{SGL_SCHEMES}/compressed_tensors_w8a16_fp8.py", "8.0", None, "0.5.23"),
    Rule("sglang", GGUF, f"{SGL_QUANT}/gguf.py", "7.5", False, "0.5.23"),
    Rule("llama.cpp", GGUF, f"{LLAMA}/build.md", ANY, True),
    Rule("llama.cpp", (*MERGED, *ADAPTERS, *SPECIAL, *BNB, *COMPRESSED), f"{LLAMA}/models.md", loads=False),
    Rule("ollama", GGUF, "https://github.com/ollama/ollama/blob/main/docs/import.mdx", ANY, True),
)
BFLOAT16 = {"vllm": f"{VLLM}/blob/main/vllm/platforms/cuda.py", "sglang": SGL_GPU}
"""Engines that refuse bfloat16 weights on a GPU below 8.0 or turn them into another type, and the source."""
