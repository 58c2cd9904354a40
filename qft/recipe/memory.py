"""What a training may take, and what becomes of the weights that do not fit."""

from typing import Literal

from pydantic import Field

from qft.recipe.training import Section


class MemorySection(Section):
    """What a training takes of the device's memory."""

    offload: Literal["none", "cpu", "disk"] = "none"
    """Where the frozen weights of the decoder wait: each block is brought to the device while the one before it
    is computed. none: they are on the device; cpu: in page-locked memory of the host; disk: in files."""
    offload_folder: str | None = Field(None, min_length=1)
    """Folder in which offload disk puts its files, which go when the training ends. None: output_dir."""
