"""What quantizes a model, block by block or all at once, as `qft calibrate` and exports see it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from qft.calibration.finite import Place
from qft.documents.evaluation import LayerError
from qft.measure.likelihood import Verification
from qft.quant.layer import LayerScheme, Settled
from qft.recipe.schema import CalibrateSection

Schemes = Mapping[str, LayerScheme | None]
"""Of every linear layer, by its name; None: left in 16 bits."""


@dataclass(frozen=True)
class QuantizeTask:
    """The blocks of one model, quantized by one engine."""

    settings: CalibrateSection
    """Of which its engine, iters, remedy, what distills, and max_bytes are read here."""
    schemes: Schemes
    rows: Sequence[Mapping[str, Any]]
    """Held-out rows that tell what it does to the model: input_ids, labels, and their source and row."""
    place: Place
    """Where one of them stands."""
    windows: Sequence[Sequence[int]] = ()
    """Token ids that the engine looks at."""
    seed: int = 0
    settled: Settled | None = None
    """What a training has settled of the layers; None: nothing."""
    load: Callable[[], Any] | None = None
    """The whole unquantized model, ready to run; only for the remedy that trains it."""


@dataclass(frozen=True)
class Trial:
    """One way to hold the layers, and what it does to the held-out rows."""

    number: int
    """From 0."""
    schemes: Schemes
    verification: Verification
    weight_bytes: int
    """Of all weights as written."""
    distilled: bool = False
    """Whether its quantized weights have learnt from the unquantized model."""


@dataclass(frozen=True)
class EngineProcess:
    """What an engine that has a process of its own says of it; nothing with the others."""

    versions: Mapping[str, str] = field(default_factory=dict)
    """Of the packages that it used."""
    peak_bytes: int = 0
    """Largest memory: of its GPU, or of the host beyond what its imports took."""
    peak_host_bytes: int = 0
    """Largest resident set."""


class Quantizer(Protocol):
    """One calibration of one model."""

    block_seconds: list[float]
    """Time of each block that was quantized here; empty where the whole model is quantized at once."""
    process: EngineProcess

    @property
    def quantized_layers(self) -> list[str]:
        """Names of the linear layers that the first trial holds in few bits; known once it is made."""

    @property
    def skipped_layers(self) -> list[str]:
        """Of all other linear layers."""

    @property
    def unreached(self) -> list[str]:
        """What experts of a mixture no calibration window reached, in words; empty where nobody looks."""

    def trials(self) -> Iterator[Trial]:
        """The layers as they are to be held, then, with a remedy, some of them in more bits: as long as it is asked on.
        Raises ModelError if the engine fails."""

    def assemble(self, folder: Path, trial: Trial) -> None:
        """Write weights and configuration of a trial as engines load them."""

    def errors(self) -> list[LayerError]:
        """Of every quantized layer of the first trial, on the held-out rows."""
