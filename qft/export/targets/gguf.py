"""One GGUF file of the merged model, for llama.cpp and what is built on it, with a Modelfile for Ollama."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from qft.checkpoint.quick_gguf import quick_gguf
from qft.export.job import Job
from qft.export.targets.base import QUESTION, Exporter, Facts, Read, rendered
from qft.export.targets.merged import Merged, merged_folder
from qft.export.targets.quantized import Bnb4Bit, Bnb8Bit
from qft.files import write_text
from qft.gguf.llamacpp import KINDS, LlamaCpp, end_tokens, quantize
from qft.gguf.modelfile import modelfile
from qft.model.by_block import generation_config

UNQUANTIZED = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
"""Kind of file that holds weights of a dtype as they are."""


class Gguf(Exporter):
    format, engine, library = "gguf", "llama.cpp", "gguf"

    def __init__(self, kind: str) -> None:
        """`kind` is one of KINDS."""
        self.kind, self.by_llamacpp = kind, KINDS[kind].by_llamacpp
        alike = Merged if KINDS[kind].bits >= 16 else Bnb8Bit if KINDS[kind].bits >= 6 else Bnb4Bit
        self.limits, self.limits_original = alike.limits, alike.limits_original
        self.usage = (
            f"llama.cpp: `llama-cli --jinja -m NAME-{kind}.gguf`. Ollama: `ollama create mine -f Modelfile`, then "
            "`ollama run mine`. LM\nStudio opens the file.\n"
        )

    def needed_bytes(self, job: Job) -> int:
        """Of the merged model, and of the file or files made of it."""
        return (3 if self.by_llamacpp else 2) * job.weights.folder_bytes

    def write(self, job: Job, folder: Path) -> None:
        from qft.gguf.file import write_gguf

        name = job.run.folder.resolve().name
        out = folder / f"{name}-{self.kind}.gguf"
        whole = merged_folder(job)
        job.view.note("Writing the file")
        with TemporaryDirectory(dir=job.scratch) as work:
            written = Path(work) / "exact.gguf" if self.by_llamacpp else out
            write_gguf(whole, written, kind=self._written(job), name=name)
            if self.by_llamacpp:
                quantize(written, out, self.kind)
        write_text(folder / "Modelfile", modelfile(out.name, job.plan.tokenizer))

    def load(self, job: Job, folder: Path) -> LlamaCpp:
        """By llama.cpp."""
        return LlamaCpp(_file(folder))

    def facts(self, model: LlamaCpp, job: Job, folder: Path, texts: Sequence[str]) -> Facts:
        """As llama.cpp sees the file: its tokens, where it stops, and the chat template that it carries."""
        import gguf

        with quick_gguf():
            names = {tensor.name for tensor in gguf.GGUFReader(_file(folder)).tensors}
        bos, asked = job.plan.tokenizer.bos_token_id, model.tokenize(QUESTION[0]["content"])
        ends, stops = end_tokens(generation_config(job.plan)), set(model.stops)
        return {
            "tied_embeddings": "output.weight" not in names,
            "embedding_rows": model.config.vocab_size,
            "vocabulary_size": model.vocabulary_size,
            "added_tokens": dict(sorted(model.added_tokens.items())),
            "token_ids": [model.tokenize(text, add_special=False) for text in texts],
            "bos_count": 0 if bos is None else asked.count(bos),
            "chat_template": rendered(job.plan.tokenizer, model.metadata.get("tokenizer.chat_template")),
            "eos_token_id": [stop for stop in sorted(ends) if stop in stops],
        }

    def reader(self, job: Job, folder: Path) -> Read:
        from qft.gguf.file import read_gguf

        return read_gguf(_file(folder), job.weights.config)

    def _written(self, job: Job) -> str:
        """Kind of the file that qft writes: llama.cpp makes its own of one that holds the weights as they are."""
        return UNQUANTIZED[job.dtype] if self.by_llamacpp else self.kind


def _file(folder: Path) -> Path:
    return next(folder.glob("*.gguf"), folder / "model.gguf")
