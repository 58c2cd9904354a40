"""Forms that a run is handed over in, one file each."""

from typing import get_args

from qft.errors import RecipeError
from qft.export.job import ExportOptions
from qft.export.targets.adapter import Adapter
from qft.export.targets.base import Exporter
from qft.export.targets.gguf import Gguf
from qft.export.targets.merged import Merged
from qft.export.targets.quantized import Bnb4Bit, Bnb8Bit, CompressedTensors, TorchAo
from qft.model.handover import missing_packages
from qft.recipe import LoadedRecipe
from qft.recipe.schema import ExportTarget

__all__ = ["EXPORTERS", "Exporter", "asked_targets"]

EXPORTERS: dict[str, Exporter] = {
    "adapter": Adapter(),
    "merged": Merged(),
    "bnb-4bit": Bnb4Bit(),
    "bnb-8bit": Bnb8Bit(),
    "compressed-tensors": CompressedTensors(),
    "torchao": TorchAo(),
    "gguf": Gguf("q8_0"),
    **{name: Gguf(name.removeprefix("gguf-")) for name in get_args(ExportTarget) if name.startswith("gguf-")},
}
"""By the names of export.target."""


def asked_targets(loaded: LoadedRecipe, options: ExportOptions) -> list[str]:
    """Names of EXPORTERS. Raises RecipeError for none, for others, and for what lacks a package."""
    names = list(dict.fromkeys(options.to or loaded.recipe.export.target))
    known = ", ".join(EXPORTERS)
    if not names:
        raise RecipeError(f"nothing is asked for: give --to TARGET, or set export.target in the recipe ({known})")
    for name in names:
        if name not in EXPORTERS:
            raise RecipeError(f"--to {name}: is none of {known}")
    missing = [f"--to {name}: {text}" for name in names for text in missing_packages(name, gate=options.gate)]
    if missing:
        raise RecipeError(missing)
    return names
