"""A GGUF file run by llama.cpp itself, in the place of a transformers model: it reads token ids and tells logits."""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from qft.errors import MissingError, ModelError

CHUNK = 512
"""Tokens that llama.cpp reads at once."""
CELLS = 256
"""Tokens that a context has room for beyond those that were asked for."""
ADDED = 1 | 8 | 16
"""Bits of llama.cpp's enum llama_token_attr: UNKNOWN, CONTROL and USER_DEFINED."""


class Kind(NamedTuple):
    """Of GGUF file."""

    number: int
    """In the enum llama_ftype of llama.h, by which the file names itself."""
    bits: int
    """Of most weights, without their scales."""
    by_llamacpp: bool = False
    """Whether llama.cpp makes it of a 16-bit or 32-bit file; the others are written by `file`."""


KINDS = {
    "f32": Kind(0, 32),
    "f16": Kind(1, 16),
    "bf16": Kind(32, 16),
    "q8_0": Kind(7, 8),
    "q6_k": Kind(18, 6, by_llamacpp=True),
    "q5_k_m": Kind(17, 5, by_llamacpp=True),
    "q4_k_m": Kind(15, 4, by_llamacpp=True),
    "q4_k": Kind(14, 4),
    "q4_0": Kind(2, 4),
}


def end_tokens(settings: GenerationConfig) -> list[int]:
    """Ids at which a model ends an answer: one, several or none."""
    ends = settings.eos_token_id
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def require_llamacpp() -> None:
    """Raises MissingError unless llama.cpp is installed; imports nothing."""
    if importlib.util.find_spec("cyllama") is None:
        raise MissingError("llama.cpp: needs the package cyllama; pip install 'qft[llamacpp]'")


def quantize(source: Path, out: Path, kind: str) -> None:
    """Quantize a 16-bit or 32-bit GGUF file by llama.cpp. `kind` is one of KINDS. Raises ModelError."""
    require_llamacpp()
    from cyllama.llama import llama_cpp as binding

    binding.disable_logging()
    settings = binding.LlamaModelQuantizeParams()
    settings.ftype, settings.nthread = KINDS[kind].number, torch.get_num_threads()
    with _as_model_error(f"{source}: llama.cpp cannot quantize it"):
        binding.model_quantize(str(source), str(out), settings)


class LlamaCpp(PreTrainedModel, GenerationMixin):
    """One GGUF file. It is evaluated and generates as any transformers model does, on the host, and never trains.
    Source: llama.h of ggml-org/llama.cpp, through the package cyllama."""

    config_class = PretrainedConfig

    def __init__(self, path: Path) -> None:
        """Raises MissingError without the package or the file, ModelError if llama.cpp does not load it."""
        require_llamacpp()
        if not path.is_file():
            raise MissingError(f"{path}: does not exist")
        with _as_model_error(f"{path}: llama.cpp does not load it"):
            loaded = _load(path)
        vocabulary = loaded.get_vocab()
        super().__init__(PretrainedConfig(vocab_size=vocabulary.n_vocab))
        self.path = path
        # llama.cpp maps the file; so does this, and thus the weights are counted as those of any model.
        mapped = torch.from_file(str(path), shared=True, size=path.stat().st_size, dtype=torch.uint8)
        self.file = nn.Parameter(mapped, requires_grad=False)
        self._model, self._vocabulary = loaded, vocabulary
        self._context: Any = None
        self._rows: list[list[int]] = []
        """Tokens of each sequence whose keys and values the context holds."""
        self.generation_config = GenerationConfig(eos_token_id=self.stops or None)

    @property
    def stops(self) -> list[int]:
        """Ids of the tokens at which llama.cpp ends an answer."""
        return [token for token in range(self.config.vocab_size) if self._vocabulary.is_eog(token)]

    @property
    def bos_token_id(self) -> int:
        """-1 if the file names none."""
        return int(self._vocabulary.token_bos())

    @property
    def metadata(self) -> dict[str, str]:
        """The file's keys and values, except arrays."""
        return dict(self._model.metadata())

    @property
    def added_tokens(self) -> dict[str, int]:
        """Unknown, control and user-defined tokens that llama.cpp finds in a text, with their ids."""
        known = {self._vocabulary.get_text(i): i for i in self._ids(ADDED)}
        return {text: i for text, i in known.items() if self.tokenize(text, add_special=False) == [i]}

    def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        """Ids of `text`, special tokens in it recognized; `add_special`: with BOS if the file asks for it."""
        return list(self._vocabulary.tokenize(text, add_special, True)) if text else []

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, logits_to_keep: int = 0, **_: Any
    ) -> CausalLMOutput:
        """Logits float32 [rows, tokens, vocabulary] of token ids [rows, tokens], zero where `attention_mask` is 0.
        logits_to_keep: only of so many last tokens; 0 of all. What a row shares with the one that was read before in
        its place is not read again."""
        width = input_ids.shape[1]
        kept = min(logits_to_keep or width, width)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = [ids[seen.bool()].tolist() for ids, seen in zip(input_ids, mask, strict=True)]
        columns = [seen.nonzero().flatten() - (width - kept) for seen in mask]
        firsts = [int((column < 0).sum()) for column in columns]
        self._make_room(rows, firsts)
        logits = torch.zeros(len(input_ids), kept, self.config.vocab_size)
        for row, (ids, column, first) in enumerate(zip(rows, columns, firsts, strict=True)):
            logits[row, column[first:]] = self._read(row, ids, first)
        return CausalLMOutput(logits=logits)

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        """The whole sequence each time: what of it is new, `forward` finds out."""
        return {"input_ids": input_ids} | {n: kwargs[n] for n in ("attention_mask", "logits_to_keep") if n in kwargs}

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # llama.cpp holds the keys and values

    def _ids(self, attribute: int) -> list[int]:
        return [i for i in range(self.config.vocab_size) if self._vocabulary.get_attr(i) & attribute]

    def _make_room(self, rows: Sequence[Sequence[int]], firsts: Sequence[int]) -> None:
        """A context for these rows, each a sequence of its own that keeps what it shares with the one held before."""
        needed = sum(map(len, rows))
        if self._context is None or len(rows) > len(self._rows) or needed > self._context.n_ctx:
            self._open(len(rows), needed)
        for row, held in enumerate(self._rows):
            same = min(_shared(held, rows[row]), firsts[row]) if row < len(rows) else 0
            self._context.memory_seq_rm(row, same, -1)
            del held[same:]

    def _open(self, rows: int, tokens: int) -> None:
        from cyllama.llama import llama_cpp as binding

        settings = binding.LlamaContextParams()
        settings.n_ctx = tokens + tokens // 4 + CELLS  # an answer is to be written
        settings.n_seq_max, settings.kv_unified = rows, True
        settings.n_batch = settings.n_ubatch = CHUNK
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        self._rows = [[] for _ in range(rows)]
        with _as_model_error(f"{self.path}: llama.cpp has no room for {tokens} tokens"):
            self._context = binding.LlamaContext(self._model, settings, verbose=False)

    def _read(self, row: int, ids: Sequence[int], first: int) -> torch.Tensor:
        """Logits [len(ids) - first, vocabulary] of the tokens from `first` on."""
        from cyllama.llama import llama_cpp as binding

        found = []
        for start in range(len(self._rows[row]), len(ids), CHUNK):
            chunk = ids[start : start + CHUNK]
            batch = binding.LlamaBatch(n_tokens=len(chunk), embd=0, n_seq_max=1)
            for at, token in enumerate(chunk, start):
                batch.add(token, at, [row], at >= first)
            with _as_model_error(f"{self.path}: llama.cpp fails on it"):
                self._context.decode(batch)
                self._rows[row] += chunk
                places = range(max(first - start, 0), len(chunk))
                found += [torch.tensor(self._context.get_logits_ith(at)) for at in places]
        return torch.stack(found)


def _shared(held: Sequence[int], asked: Sequence[int]) -> int:
    """Tokens at the start of both."""
    pairs = zip(held, asked, strict=False)
    return next((at for at, (old, new) in enumerate(pairs) if old != new), min(len(held), len(asked)))


def _load(path: Path) -> Any:
    from cyllama.llama import llama_cpp as binding

    class Model(binding.LlamaModel):
        # get_logits_ith of cyllama 0.2.18 asks the model, and only the vocabulary knows.
        @property
        def n_vocab(self) -> int:
            return int(self.get_vocab().n_vocab)

    binding.disable_logging()
    return Model(str(path), binding.LlamaModelParams(), verbose=False)


@contextmanager
def _as_model_error(text: str) -> Iterator[None]:
    """The binding passes on whatever llama.cpp throws."""
    try:
        yield
    except (ValueError, RuntimeError, MemoryError) as error:
        raise ModelError(f"{text}: {error}") from error
