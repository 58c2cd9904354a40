"""What the command line says of an engine that is asked."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class EngineOptions:
    url: str | None = None
    """Ask the OpenAI-compatible server at this address, and load nothing."""
    model: str | None = None
    """By which name; None: it has one."""
    timeout: float | None = None
    """Seconds that it may say nothing. None: SILENT_SECONDS."""
    python: Path | None = None
    """Of the environment whose vLLM serves TARGET@vllm; None: the recipe's."""
    context: int | None = None
    """Tokens of the longest request of TARGET@vllm. None: what the model was built for."""
    concurrency: tuple[int, ...] | None = None
    """Requests at once at which an engine's speed is measured; empty: it is not. None: LEVELS."""
