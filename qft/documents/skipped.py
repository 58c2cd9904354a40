"""What quant.skip_modules auto chose."""

from qft.documents.part import Bytes, Nats, Part


class SkippedModules(Part):
    """Layers that quant.skip_modules auto left unquantized, and what that is expected to buy. Bytes throughout."""

    names: list[str]
    budget_bytes: Bytes
    linear_bytes_before: Bytes
    """Of all quantized linear layers, as measured."""
    linear_bytes_after: Bytes
    """The same with `names` in 16 bits, predicted."""
    rows: int
    """Training rows on which it was measured."""
    kl_before: Nats
    """Mean KL divergence from the unquantized model's next-token distributions, in nats, all layers quantized."""
    kl_after: Nats
    """The same with `names` unquantized."""
    perplexity_unquantized: float
    perplexity_before: float
    perplexity_after: float
