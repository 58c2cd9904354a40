"""How a layer is held in few bits (hold/), and ways to get there (engines/). Whoever imports anything of it has
bitsandbytes round fast, and dequantize right, on a CPU."""

from qft.quant import blocks_on_cpu, round_4bit  # noqa: F401
