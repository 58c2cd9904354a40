"""Named starting values. Explicit fields win over them; `{section: {preset: fields}}`."""

from typing import Any

# The two uses of 4-bit weights differ: inference wants the plainest dequantization, finetuning the data type that
# fits normally distributed weights, the smallest scales, and a compute dtype whose range gradients fit in.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "quant": {
        "inference": {"mode": "4bit", "quant_type": "fp4", "compute_dtype": "float32", "double_quant": False},
        "finetune": {"mode": "4bit", "quant_type": "nf4", "compute_dtype": "bfloat16", "double_quant": True},
    },
    # 4 bits need the calibration to stay close; 8 bits lose so little by rounding that it would be wasted on them.
    "calibrate": {
        "w4a16": {"engine": "autoround", "data_type": "int", "bits": 4, "activations": "none"},
        "w8a16": {"engine": "rtn", "data_type": "int", "bits": 8, "activations": "none"},
        "w8a8-dynamic": {"engine": "rtn", "data_type": "int", "bits": 8, "activations": "dynamic"},
        "w8a8-static": {"engine": "rtn", "data_type": "int", "bits": 8, "activations": "static"},
        "fp8": {"engine": "rtn", "data_type": "float", "bits": 8, "activations": "dynamic"},
    },
}
