"""One GGUF file of the merged model, for llama.cpp and what is built on it, with a Modelfile for Ollama."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from qft.export.base import Exporter, Job, Limits, Packages, Read
from qft.export.gate.facts import QUESTION, Facts, rendered
from qft.export.targets import merged
from qft.export.targets.modelfile import modelfile
from qft.export.targets.quantized import EIGHT_BITS, EIGHT_BITS_ORIGINAL, FOUR_BITS, FOUR_BITS_ORIGINAL
from qft.files import write_text
from qft.gguf.llamacpp import FILE_TYPES, LlamaCpp, quantize
from qft.model.load import generation_config

__all__ = ["GGUF"]

UNQUANTIZED = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
"""Kind of file that holds weights of a dtype as they are."""
LLAMACPP: Packages = (("cyllama", "llamacpp"),)

USAGE = """\
llama.cpp: `llama-cli --jinja -m NAME-KIND.gguf`. Ollama: `ollama create mine -f Modelfile`, then `ollama run mine`. LM
Studio opens the file.
"""


def _writer(kind: str) -> Callable[[Job, Path], None]:
    def write(job: Job, folder: Path) -> None:
        """Raises ModelError for what GGUF cannot hold."""
        from qft.gguf import write_gguf

        name = job.run.folder.resolve().name
        out = folder / f"{name}-{kind}.gguf"
        whole = merged.merged_folder(job)
        job.view.note("Writing the file")
        if kind in FILE_TYPES:
            with TemporaryDirectory(dir=job.scratch) as work:
                exact = Path(work) / "exact.gguf"
                write_gguf(whole, exact, kind=UNQUANTIZED[job.dtype], name=name)
                quantize(exact, out, kind)
        else:
            write_gguf(whole, out, kind=kind, name=name)
        write_text(folder / "Modelfile", modelfile(out.name, job.plan.tokenizer))

    return write


def _needed_bytes(kind: str) -> Callable[[Job], int]:
    def needed_bytes(job: Job) -> int:
        """Of the merged model, and of the file or files made of it. Raises ModelError for what GGUF cannot hold."""
        from qft.gguf import require_writable

        require_writable(job.weights.config, job.plan.tokenizer, UNQUANTIZED[job.dtype] if kind in FILE_TYPES else kind)
        return (3 if kind in FILE_TYPES else 2) * job.weights.folder_bytes

    return needed_bytes


def load(job: Job, folder: Path) -> LlamaCpp:
    """By llama.cpp."""
    return LlamaCpp(_file(folder))


def facts(model: LlamaCpp, job: Job, folder: Path, texts: Sequence[str]) -> Facts:
    """As llama.cpp sees the file: its tokens, where it stops, and the chat template that it carries."""
    wanted, stops = generation_config(job.plan).eos_token_id, set(model.stops)
    return {
        "tied_embeddings": not _has_head(_file(folder)),
        "embedding_rows": model.config.vocab_size,
        "vocabulary_size": model.vocabulary_size,
        "added_tokens": dict(sorted(model.added_tokens.items())),
        "token_ids": [model.tokenize(text, add_special=False) for text in texts],
        "bos_count": model.tokenize(QUESTION[0]["content"]).count(model.bos_token_id),
        "chat_template": rendered(job.plan.tokenizer, model.metadata.get("tokenizer.chat_template")),
        "eos_token_id": [stop for stop in sorted(wanted if isinstance(wanted, list) else [wanted]) if stop in stops],
    }


def reader(job: Job, folder: Path) -> Read:
    from qft.gguf import read_gguf

    return read_gguf(_file(folder), job.weights.config)


def _file(folder: Path) -> Path:
    return next(folder.glob("*.gguf"), folder / "model.gguf")


def _has_head(path: Path) -> bool:
    """Whether the output layer has weights of its own."""
    import gguf

    return any(tensor.name == "output.weight" for tensor in gguf.GGUFReader(path).tensors)


def _exporter(kind: str, limits: Limits, original: Limits) -> Exporter:
    return Exporter(
        write=_writer(kind),
        needed_bytes=_needed_bytes(kind),
        load=load,
        engine="llama.cpp",
        merges=True,
        regrids=False,
        limits=limits,
        limits_original=original,
        library="gguf",
        usage=USAGE.replace("KIND", kind),
        facts=facts,
        needs=(("gguf", "gguf"), *(LLAMACPP if kind in FILE_TYPES else ())),
        gate_needs=LLAMACPP,
        reader=reader,
    )


KINDS = {
    "f16": (merged.MERGED.limits, merged.MERGED.limits_original),
    "bf16": (merged.MERGED.limits, merged.MERGED.limits_original),
    "q8_0": (EIGHT_BITS, EIGHT_BITS_ORIGINAL),
    "q6_k": (EIGHT_BITS, EIGHT_BITS_ORIGINAL),
    "q5_k_m": (FOUR_BITS, FOUR_BITS_ORIGINAL),
    "q4_k_m": (FOUR_BITS, FOUR_BITS_ORIGINAL),
    "q4_0": (FOUR_BITS, FOUR_BITS_ORIGINAL),
}
GGUF = {"gguf": _exporter("q8_0", EIGHT_BITS, EIGHT_BITS_ORIGINAL)}
GGUF |= {f"gguf-{kind}": _exporter(kind, *limits) for kind, limits in KINDS.items()}
