"""What the command line says of an engine that is asked."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineOptions:
    url: str | None = None
    """Ask the OpenAI-compatible server at this address, and load nothing."""
    model: str | None = None
    """By which name; None: it has one."""
    timeout: float | None = None
    """Seconds that it may say nothing. None: SILENT_SECONDS."""
    concurrency: tuple[int, ...] | None = None
    """Requests at once at which an engine's speed is measured; empty: it is not. None: LEVELS."""
