"""What a GGUF file says of a tokenizer: its tokens, merges and the name of its pre-tokenizer."""

import json
import re
from collections.abc import Sequence
from typing import Any

import gguf

from qft.errors import ModelError

# The patterns are data: what tokenizer.json of Llama 3 and of Qwen 2 say.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_BYTES_SPLIT, _BYTES = ("ByteLevel", True), ("ByteLevel", False)

PRE_TOKENIZERS: dict[tuple[Any, ...], str] = {
    (_BYTES_SPLIT,): "gpt-2",
    (("Digits", True), _BYTES_SPLIT): "smollm",
    (("Split", _LLAMA3_SPLIT), _BYTES): "llama-bpe",
    (("Split", _QWEN2_SPLIT), _BYTES): "qwen2",
}
"""Steps of the pre-tokenizer in tokenizer.json -> the name that llama.cpp has for them."""


BYTE = re.compile("<0x[0-9A-F]{2}>")
ENDS = ("eos", "eot", "eom")
"""What llama.cpp calls tokens that end an answer: of a text, a turn and a message."""


def add_tokenizer(writer: Any, tokenizer: Any, vocabulary: int, ends: Sequence[int] = ()) -> None:
    """Write a tokenizer of byte-level BPE, or of SentencePiece's BPE; `vocabulary` is the number of the model's
    embeddings, `ends` are the tokens at which it ends an answer. Raises ModelError for any other kind, and for one that
    llama.cpp would split text differently with."""
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    add = _add_pieces if _has_pieces(definition) else _add_bytes
    add(writer, definition, vocabulary)
    _add_special(writer, tokenizer, ends)
    if tokenizer.chat_template is not None:
        if not isinstance(tokenizer.chat_template, str):
            names = ", ".join(tokenizer.chat_template)
            raise ModelError(
                f"GGUF: the tokenizer has several chat templates ({names}): give one as data.chat_template"
            )
        writer.add_chat_template(tokenizer.chat_template)


def _has_pieces(definition: dict[str, Any]) -> bool:
    """Whether bytes that no token has are tokens of their own: not where text is made of bytes first, and none is."""
    model, steps = definition["model"], {step[0] for step in _steps(definition.get("pre_tokenizer"))}
    if not model.get("byte_fallback"):
        return False
    has_some = model["type"] != "BPE" or any(BYTE.fullmatch(token) for token in model["vocab"])
    return has_some or "ByteLevel" not in steps


def _add_bytes(writer: Any, definition: dict[str, Any], vocabulary: int) -> None:
    name = pre_tokenizer(definition)
    tokens, types = _tokens(definition, vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(_merges(definition))
    writer.add_add_space_prefix(False)


def _add_pieces(writer: Any, definition: dict[str, Any], vocabulary: int) -> None:
    """SentencePiece's BPE, where pairs are joined whose token has the highest score: here, that is joined first."""
    model, prefix = definition["model"], _space_prefix(definition)
    if model["type"] != "BPE":
        raise ModelError(f"GGUF: the tokenizer is {model['type']} with byte fallback; only BPE can be written")
    tokens, types = _tokens(definition, vocabulary)
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(_merges(definition)):
        ranks.setdefault(merge.replace(" ", ""), rank)
    kinds = [gguf.TokenType.BYTE if BYTE.fullmatch(token) else kind for token, kind in zip(tokens, types, strict=True)]
    kinds = [gguf.TokenType.UNKNOWN if token == model.get("unk_token") else kind
             for token, kind in zip(tokens, kinds, strict=True)]  # fmt: skip
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([float(-ranks.get(token, len(ranks))) for token in tokens])
    writer.add_token_types([int(kind) for kind in kinds])
    writer.add_add_space_prefix(prefix)


def _space_prefix(definition: dict[str, Any]) -> bool:
    """Whether a text begins with a space that it has not. Raises ModelError for other steps than llama.cpp takes: all
    spaces become ▁."""
    normalizer, splitter = definition.get("normalizer") or {}, definition.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if steps and steps[-1] == replaces and (not splitter or _keeps_pieces(splitter)):
        before = [step.get("prepend") for step in steps[:-1]]
        if before in ([], ["▁"]):
            return bool(before)
    if not steps and splitter.get("type") == "Metaspace" and not splitter.get("split"):
        return splitter.get("prepend_scheme") != "never"
    raise ModelError("GGUF: llama.cpp prepares text for no SentencePiece tokenizer as this one does")


def _keeps_pieces(splitter: dict[str, Any]) -> bool:
    """Whether it splits at spaces, of which there are none any more."""
    return splitter.get("type") == "Split" and splitter.get("pattern") == {"String": " "}


def pre_tokenizer(definition: dict[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer of a tokenizer.json. Raises ModelError where it has none known here."""
    model = definition["model"]
    if model["type"] != "BPE" or _has_pieces(definition):
        kind = "BPE with byte fallback" if model["type"] == "BPE" else model["type"]
        raise ModelError(f"GGUF: the tokenizer is {kind}; only byte-level BPE can be written")
    steps = _steps(definition.get("pre_tokenizer"))
    name = PRE_TOKENIZERS.get(steps)
    if name is None:
        raise ModelError(f"GGUF: no pre-tokenizer of llama.cpp is known to split text as this one does: {steps}")
    # llama.cpp looks whole words up before merging for llama-bpe alone.
    if bool(model.get("ignore_merges")) != (name == "llama-bpe"):
        raise ModelError(f"GGUF: ignore_merges {model.get('ignore_merges')}: llama.cpp assumes otherwise for {name}")
    normalizer = definition.get("normalizer") or {}
    normalizer = None if normalizer.get("normalizers") == [] else normalizer.get("type")
    if normalizer is not None and (name, normalizer) != ("qwen2", "NFC"):
        raise ModelError(f"GGUF: normalizer {normalizer}: llama.cpp normalizes no text for {name}")
    return name


def _steps(node: dict[str, Any] | None) -> tuple[Any, ...]:
    """The pre-tokenizer's steps with what decides how each splits; anything else about them stays visible."""
    if node is None:
        return ()
    kind = node["type"]
    if kind == "Sequence":
        return tuple(step for part in node["pretokenizers"] for step in _steps(part))
    if kind == "ByteLevel" and not node.get("add_prefix_space"):
        return ((kind, bool(node.get("use_regex", True))),)
    if kind == "Digits":
        return ((kind, bool(node.get("individual_digits"))),)
    if kind == "Split" and node["behavior"] == "Isolated" and not node["invert"]:
        return ((kind, node["pattern"].get("Regex")),)
    return ((kind, json.dumps(node, sort_keys=True)),)


def _tokens(definition: dict[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    """Token and type of each id below `vocabulary`; ids without a token are UNUSED."""
    found = {i: (token, gguf.TokenType.NORMAL) for token, i in definition["model"]["vocab"].items()}
    for added in definition["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        found[added["id"]] = (added["content"], kind)
    if max(found) >= vocabulary:
        raise ModelError(f"GGUF: the tokenizer's last id is {max(found)}, and the model embeds {vocabulary} tokens")
    every = [found.get(i, (f"[PAD{i}]", gguf.TokenType.UNUSED)) for i in range(vocabulary)]
    return [token for token, _ in every], [int(kind) for _, kind in every]


def _merges(definition: dict[str, Any]) -> list[str]:
    merges = definition["model"]["merges"]
    if not merges:
        raise ModelError("GGUF: the tokenizer has no merges, and llama.cpp loads no byte-level BPE without")
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def _add_special(writer: Any, tokenizer: Any, ends: Sequence[int]) -> None:
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    every = [token for token in dict.fromkeys([ids["eos"], *ends]) if token is not None]
    if not every:
        text = "the tokenizer has no end token (eos_token), and llama.cpp would take token 11 for it"
        raise ModelError(f"GGUF: {text}: name one in tokenizer_config.json")
    if len(every) > len(ENDS):
        raise ModelError(f"GGUF: answers end at {len(every)} tokens ({every}), and the file has names for {len(ENDS)}")
    for name, value in [*(ids | {"eos": None}).items(), *zip(ENDS, every, strict=False)]:
        if value is not None:
            getattr(writer, f"add_{name}_token_id")(value)
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    before, after = _around(tokenizer("a")["input_ids"], bare)
    if before not in ([], [ids["bos"]]) or after not in ([], [ids["eos"]]):
        raise ModelError("GGUF: the tokenizer adds more to a text than BOS before it and EOS after it")
    writer.add_add_bos_token(bool(before))
    writer.add_add_eos_token(bool(after))


def _around(whole: list[int], part: list[int]) -> tuple[list[int], list[int]]:
    for start in range(len(whole) - len(part) + 1):
        if whole[start : start + len(part)] == part:
            return whole[:start], whole[start + len(part) :]
    raise ModelError("GGUF: the tokenizer's special tokens change the tokens of the text")
