"""Every engine of `qft calibrate`: one row each, free of torch, and the only place that tells engines apart by name."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = tuple[str, int, str]
"""data_type, bits, activations."""

SCHEME_FIELDS = ("data_type", "bits", "group_size", "symmetric", "activations")
"""Fields of `calibrate` that say how a layer is held."""

INTEGERS: frozenset[Kind] = frozenset({("int", 4, "none"), ("int", 8, "none")})


@dataclass(frozen=True)
class EngineRow:
    """What is known of an engine before it is imported."""

    writes: str
    """The format of its result, as quantization_config names it."""
    makes: frozenset[Kind] = frozenset()
    """How it can hold layers; empty where `algorithms` tell it, or where the code of quant.plugin decides."""
    algorithms: Mapping[str, frozenset[Kind]] = field(default_factory=dict)
    """The same of each calibrate.algorithm, for an engine that has several."""
    windows: Literal["always", "static", "never"] = "static"
    """When it looks at calibration windows; static: if activations are."""
    whole_model: bool = False
    """Whether it quantizes the whole model at once, rather than block by block."""
    modules: tuple[str, ...] = ()
    """That must be importable here."""
    reads_alone: tuple[str, ...] = ()
    """Fields of `calibrate` that no other engine reads."""
    needs: Mapping[str, str] = field(default_factory=dict)
    """Fields of `calibrate` that must be set, and why."""
    leaves_unread: Mapping[str, str] = field(default_factory=dict)
    """Fields of `calibrate` that it does not read and most engines do, and why."""

    @property
    def by_plugin(self) -> bool:
        """Whether the code of quant.plugin is what quantizes."""
        return not self.makes and not self.algorithms

    def needs_windows(self, activations: str) -> bool:
        return self.windows == "always" or (self.windows == "static" and activations == "static")


def _settled(engine: str) -> dict[str, str]:
    return dict.fromkeys(("symmetric", "group_size"), f"{engine} decides it itself")


CATALOGUE: dict[str, EngineRow] = {
    "autoround": EngineRow(
        writes="compressed-tensors",
        makes=INTEGERS,
        windows="always",
        modules=("auto_round", "compressed_tensors"),
        reads_alone=("iters",),
    ),
    "rtn": EngineRow(
        writes="compressed-tensors",
        makes=INTEGERS | {(kind, 8, acts) for kind in ("int", "float") for acts in ("dynamic", "static")},
        modules=("compressed_tensors",),
    ),
    "bitsandbytes": EngineRow(
        writes="bitsandbytes",
        makes=frozenset({("nf4", 4, "none"), ("fp4", 4, "none"), ("int", 8, "dynamic")}),
        leaves_unread=_settled("bitsandbytes"),
    ),
    "torchao": EngineRow(
        writes="torchao",
        makes=frozenset({("int", 8, "none"), ("int", 8, "dynamic")}),
        modules=("torchao",),
        leaves_unread=_settled("torchao"),
    ),
    "custom": EngineRow(
        writes="the plugin's",
        windows="never",
        whole_model=True,
        leaves_unread=dict.fromkeys(SCHEME_FIELDS, "the code of quant.plugin decides it")
        | {
            "samples": "the code of quant.plugin is given no calibration windows",
            "skip_modules": "the code of quant.plugin is given quant.skip_modules instead",
            "allow_partial": "the code of quant.plugin decides what it holds",
        },
    ),
    "llmcompressor": EngineRow(
        writes="compressed-tensors",
        algorithms={
            "gptq": INTEGERS,
            "awq": frozenset({("int", 4, "none")}),
            "smoothquant": frozenset({("int", 8, "dynamic"), ("int", 8, "static")}),
        },
        windows="always",
        whole_model=True,
        modules=("compressed_tensors",),
        reads_alone=("engine_python", "algorithm"),
        needs={"engine_python": "llmcompressor runs in an environment of its own: name the Python of one that has it"},
    ),
}
"""By calibrate.engine."""


def export_problem(engine: str, writes: str) -> str | None:
    """Why an export of this format cannot be made by the engine; None if it can: it goes block by block."""
    able = [name for name, row in CATALOGUE.items() if row.writes == writes and not row.whole_model]
    if engine in able:
        return None
    own = CATALOGUE[engine].writes != writes
    why = f"writes its own format, not {writes}" if own else "quantizes whole models, by `qft calibrate` alone"
    return f"{engine} {why}: use {' or '.join(able)}"


def unread_by_export(converter: str, mode: str) -> dict[str, str]:
    """Fields of `export` that nothing reads beside these of export.converter and quant.mode, and why."""
    unread = dict[str, str]()
    if converter == "qft":
        unread["export.converter_path"] = "is read only with export.converter llama.cpp or auto"
    if mode in ("none", "qat"):
        unread["export.merge_into"] = f"has no meaning with quant.mode {mode}: there is one kind of base weights"
    return unread
