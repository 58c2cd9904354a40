"""The tokenizer that a GGUF file describes, for a transformers that takes it for another.

Up to 5.17 transformers goes by the architecture alone: the end token becomes the one of the beginning, words that the
file marks as whole are cut, text is split as another model's, and a file with one merge is none. What is made here is
what 5.24 makes, of the same classes; a transformers that reads the description itself is left alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import tokenization_utils_tokenizers as tokenization
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.integrations import gguf
from transformers.models.gemma.tokenization_gemma import GemmaTokenizer
from transformers.models.gpt2.tokenization_gpt2 import GPT2Tokenizer
from transformers.models.llama.tokenization_llama import LlamaTokenizer
from transformers.models.t5.tokenization_t5 import T5Tokenizer
from transformers.tokenization_utils_base import generate_merges

# The patterns are data: what tokenizer.json of those models say.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35_SPLIT = QWEN2_SPLIT.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"\s\p{L}", r"\s\p{L}\p{M}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = r"[^\r\n\p{L}\p{N}]?" + _UPPER + "{0}" + _LOWER + "{1}"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cased(after: str, digits: str) -> str:
    """The pattern of a vocabulary whose words keep their case together."""
    words = (_CASED.replace("{0}", a).replace("{1}", b) + after for a, b in ("*+", "+*"))
    return "|".join([*words, digits, _REST])


_NAMES = {
    LLAMA3_SPLIT: ("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano dbrx smaug-bpe"),
    QWEN2_SPLIT: "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez",
    _QWEN35_SPLIT: "qwen35",
    _cased("", r"\p{N}"): "tekken",
    _cased(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?", r"\p{N}{1,3}"): "gpt-4o llama4 kanana2 talkie minimax-m2",
}
SPLITS = {name: pattern for pattern, names in _NAMES.items() for name in names.split()}
"""tokenizer.ggml.pre -> how text is split first; one that is not here is split as GPT-2's."""
_CONTROL, _USER_DEFINED = 3, 4
"""Types of tokens that stay whole."""
_T5_BLANKS = 100
_READ = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges")
_ARGUMENTS = {"chat_template": "chat_template", "add_bos_token": "ggml.add_bos_token",
              "add_eos_token": "ggml.add_eos_token"}  # fmt: skip
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_GEMMAS = ("gemma", "gemma2", "gemma3")


class _Every(dict[str, str]):
    """The architectures whose tokenizer is read by its description: all."""

    def __contains__(self, name: object) -> bool:
        return True


@contextmanager
def tokenizer_as_described() -> Iterator[None]:
    """Within it transformers makes the tokenizer that a GGUF file describes, whatever its own version."""
    if hasattr(gguf, "convert_gguf_tokenizer"):
        yield
        return
    theirs = ((gguf, "GGUF_TOKENIZER_ARCHS", _Every()), (gguf, "get_gguf_tokenizer", described),
              (tokenization, "convert_gguf_tokenizer", converted))  # fmt: skip
    before = [getattr(module, name) for module, name, _ in theirs]
    for module, name, mine in theirs:
        setattr(module, name, mine)
    try:
        yield
    finally:
        for (module, name, _), value in zip(theirs, before, strict=True):
            setattr(module, name, value)


def described(path: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """(architecture, tokenizer.ggml.* without that, arguments of the tokenizer) of the file at `path`."""
    metadata, _ = gguf.read_gguf_metadata(path, _READ)
    said = {key.removeprefix("tokenizer."): value for key, value in metadata.items() if key.startswith("tokenizer.")}
    arguments = {name: said[key] for name, key in _ARGUMENTS.items() if key in said}
    parts = {key.removeprefix("ggml."): value for key, value in said.items() if key.startswith("ggml.")}
    if parts.get("model") == "llama":
        arguments.setdefault("add_bos_token", True)  # as llama.cpp does for files older than the key
    elif parts.get("model") == "gemma4":
        arguments["add_bos_token"] = False  # its chat template writes it
    for name, key in _SPECIAL.items():
        number = parts.get(f"{key}_token_id")
        arguments[name] = None if number is None else parts["tokens"][number]
    return metadata["general.architecture"], parts, arguments


def converted(architecture: str, parts: Mapping[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """The backend, and no more arguments. Raises ValueError for a kind of vocabulary that is not known."""
    tokenizer = _made(architecture, parts)
    _keep_whole(tokenizer, parts)
    backend = tokenizer.backend_tokenizer
    split = SPLITS.get(parts.get("pre", ""))
    if split is not None:
        steps = [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return backend, {}


def _made(architecture: str, parts: Mapping[str, Any]) -> Any:
    """The tokenizer of the kind that tokenizer.ggml.model names."""
    kind = parts.get("model")
    if kind == "gpt2":
        return _byte_level(parts)
    if kind == "t5":
        return _unigram(parts)
    if kind == "gemma4":
        return _pieces(parts, GemmaTokenizer)
    if kind != "llama":
        raise ValueError(f"a GGUF file's tokenizer of the kind {kind!r} is not known: gpt2, llama, t5 or gemma4")
    if architecture in _GEMMAS:
        return _gemma(parts)
    made = _pieces(parts, LlamaTokenizer)
    if architecture == "phi3":  # the space before a text is written by a normalizer
        steps = [normalizers.Prepend(prepend="▁"), normalizers.Replace(pattern=" ", content="▁")]
        made.backend_tokenizer.normalizer = normalizers.Sequence(steps)
        made.backend_tokenizer.pre_tokenizer = None
    return made


def _pieces(parts: Mapping[str, Any], kind: type[Any], ranks: Mapping[str, float] | None = None) -> Any:
    """SentencePiece's BPE; what is joined first is of the highest score, or of the highest of `ranks`."""
    tokens = parts["tokens"]
    vocabulary = _numbered(tokens)
    merges = _merges(parts)
    if merges is None:
        merges = generate_merges(vocabulary, ranks or dict(zip(tokens, parts["scores"], strict=False)))
    return kind(vocab=vocabulary, merges=merges)


def _gemma(parts: Mapping[str, Any]) -> Any:
    """Its scores are no ranks, its order is; and it writes tokens of several spaces as such."""
    tokens = ["▁" * len(token) if " " in token and not token.strip() else token for token in parts["tokens"]]
    return _pieces({**parts, "tokens": tokens}, GemmaTokenizer, {token: -i for i, token in enumerate(tokens)})


def _byte_level(parts: Mapping[str, Any]) -> Any:
    """GPT-2's BPE, where a token that is not written in its letters for bytes is written so."""
    letters = bytes_to_unicode()
    alphabet = set(letters.values())
    tokens = [
        token if set(token) <= alphabet else "".join(letters[byte] for byte in token.encode())
        for token in parts["tokens"]
    ]
    merges = _merges(parts)
    if merges is None:
        merges = generate_merges(_numbered(parts["tokens"]), dict(zip(parts["tokens"], parts["scores"], strict=False)))
    return GPT2Tokenizer(vocab=_numbered(tokens), merges=merges)


def _unigram(parts: Mapping[str, Any]) -> Any:
    """T5's, whose blanks the file calls [PAD32000] and so on."""
    tokens = list(parts["tokens"])
    blanks = [i for i, token in enumerate(tokens) if re.match(r"^\[PAD\d+\]$", token)]
    for offset, i in enumerate(blanks[:_T5_BLANKS]):
        tokens[i] = f"<extra_id_{_T5_BLANKS - 1 - offset}>"
    return T5Tokenizer(vocab=list(zip(tokens, parts["scores"], strict=False)))


def _numbered(tokens: list[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(tokens)}


def _merges(parts: Mapping[str, Any]) -> list[tuple[str, ...]] | None:
    return [tuple(merge.split(" ")) for merge in parts["merges"]] if "merges" in parts else None


def _keep_whole(tokenizer: Any, parts: Mapping[str, Any]) -> None:
    """Tokens that the file marks as control become special, user-defined ones stay whole. A control token that is not
    in the letters of a byte-level vocabulary is none of it."""
    typed = list(zip(parts["tokens"], parts.get("token_type") or (), strict=False))
    alphabet = set(bytes_to_unicode().values()) if parts.get("model") == "gpt2" else None
    control = [token for token, kind in typed if kind == _CONTROL and (alphabet is None or set(token) <= alphabet)]
    if control:
        special = [AddedToken(token, normalized=False, special=True) for token in control]
        tokenizer.add_special_tokens({"additional_special_tokens": special}, replace_extra_special_tokens=False)
    vocabulary = tokenizer.get_vocab()
    own = [token for token, kind in typed if kind == _USER_DEFINED and token in vocabulary]
    if own:
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in own])
