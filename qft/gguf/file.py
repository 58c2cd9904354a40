"""Tensors of a safetensors folder, one at a time, into a GGUF file; and back out of one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from qft.checkpoint.quick_gguf import quick_gguf
from qft.checkpoint.stored import stored_tensors
from qft.checkpoint.weights import open_tensors
from qft.disk import require_free_space
from qft.errors import ModelError
from qft.files import atomic_file
from qft.gguf.llamacpp import KINDS, end_tokens
from qft.gguf.shape import add_shape, architecture, deinterleave, heads_to_interleave, interleave, rope_factors
from qft.gguf.vocabulary import add_tokenizer
from qft.quant.rounding.q4_k import q4_k

_T = gguf.GGMLQuantizationType
WRITABLE = [name for name, kind in KINDS.items() if not kind.by_llamacpp]
"""Each is also the name of its matrices' type."""

EMBEDDINGS = ("token_embd.weight", "output.weight")
READ = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file: its name there, shape and type, and how to read it as float32."""

    name: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    read: Callable[[], NDArray[np.float32]]

    @property
    def nbytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return int(np.prod(self.shape)) // int(block) * int(size)


def write_gguf(model_folder: Path, out: Path, *, kind: str, name: str | None = None) -> None:
    """Write the model of `model_folder` as one GGUF file (version 3) that holds `out` whole or not at all.

    The folder has config.json, a tokenizer and float32, float16 or bfloat16 safetensors in Hugging Face layout.
    `kind` is one of WRITABLE; `name` is what the file calls the model, by default as its folder. Matrices [out, in]
    become that type, vectors float32; in a q4_0 or q4_k file the embedding and the output layer are q8_0. One tensor at
    a time is in memory.

    Raises ModelError for a model or tokenizer that GGUF cannot hold faithfully, RunError if the disk is too full.
    Source: the GGUF specification, docs/gguf.md of ggml-org/ggml."""
    config = AutoConfig.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    writer = _header(config, tokenizer, _ends(model_folder, config), kind, name or model_folder.resolve().name)
    if getattr(config, "quantization_config", None):
        raise ModelError(f"{model_folder}: its weights are quantized; GGUF is written from 16-bit or 32-bit weights")
    tensors = _tensors(model_folder, config, kind)
    require_free_space(out.parent, sum(tensor.nbytes for tensor in tensors), "the GGUF file")
    for each in tensors:
        writer.add_tensor_info(each.name, each.shape, np.dtype(np.float32), each.nbytes, raw_dtype=each.type)
    with atomic_file(out) as temporary:
        try:
            writer.write_header_to_file(temporary)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in tensors:
                writer.write_tensor_data(_encoded(tensor))
        finally:
            if writer.fout is not None:
                writer.close()


def writable_tensors(config: Any, tokenizer: Any, ends: Sequence[int] = ()) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of such a model's file, by the names that the model has for them. Raises ModelError for a
    model or a tokenizer that `write_gguf` would refuse for every kind, before there are weights."""
    _header(config, tokenizer, ends, "f32", name="")
    expected, names = _expected(config), _names(config)
    for name in expected:
        _name(names, name)
    return expected


def require_rows(tensors: Mapping[str, tuple[int, ...]], config: Any, kind: str) -> None:
    """Raise ModelError for tensors that a file of `kind`, one of KINDS, cannot hold: rows must be whole blocks."""
    names = _names(config)
    for name, shape in tensors.items():
        if not KINDS[kind].by_llamacpp:
            _type(name, _name(names, name), shape, kind)
        elif _name(names, name) in EMBEDDINGS:  # others are held in 16 bits then
            _type(name, _name(names, name), shape, "q8_0")


def _header(config: Any, tokenizer: Any, ends: Sequence[int], kind: str, name: str) -> Any:
    """A writer that knows everything but the tensors."""
    if kind not in WRITABLE:
        raise ModelError(f"GGUF: kind {kind!r} is none of {', '.join(WRITABLE)}")
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[architecture(config)])
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(KINDS[kind].number)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_shape(writer, config)
    add_tokenizer(writer, tokenizer, config.vocab_size, ends)
    return writer


def _encoded(tensor: _Tensor) -> NDArray[Any]:
    values = tensor.read()
    if not np.isfinite(values).all():
        raise ModelError(f"GGUF: {tensor.name} holds NaN or infinity")
    if tensor.type == _T.F16 and np.abs(values).max() > np.finfo(np.float16).max:
        raise ModelError(f"GGUF: {tensor.name} holds values beyond float16; write bf16, f32 or q8_0")
    if tensor.type == _T.Q4_K:  # of which gguf-py knows how to read it alone
        return q4_k(torch.from_numpy(np.ascontiguousarray(values))).packed()
    encoded: NDArray[Any] = gguf.quants.quantize(np.ascontiguousarray(values), tensor.type)
    return encoded


def _tensors(folder: Path, config: Any, kind: str) -> list[_Tensor]:
    """The file's tensors in the order of the model's. Raises ModelError unless the folder holds just those."""
    where = {name: tensor.path for name, tensor in stored_tensors(folder).items()}
    expected = _expected(config)
    missing = sorted(set(expected) - set(where))
    extra = sorted(n for n in set(where) - set(expected) if not _is_derived(n, config))
    if missing or extra:
        raise ModelError(f"{folder}: weights are not those of its config; missing: {missing[:3]}, other: {extra[:3]}")
    names = _names(config)
    made = [_tensor(name, shape, where[name], names, config, kind) for name, shape in expected.items()]
    factors = rope_factors(config)
    if factors is not None:
        made.append(_Tensor("rope_freqs.weight", factors.shape, _T.F32, lambda: factors))
    return made


def _tensor(name: str, shape: tuple[int, ...], path: Path, names: Any, config: Any, kind: str) -> _Tensor:
    theirs = _name(names, name)
    with open_tensors(path) as file:
        part = file.get_slice(name)
        held, real = part[:0].dtype, tuple(part.get_shape())
    if held not in READ or real != shape:
        raise ModelError(f"{path}: {name} is {held} {list(real)}; wanted is a 16-bit or 32-bit float {list(shape)}")
    heads = heads_to_interleave(name, config, architecture(config))
    return _Tensor(theirs, shape, _type(name, theirs, shape, kind), lambda: _read(path, name, heads))


def _names(config: Any) -> Any:
    return gguf.get_tensor_name_map(architecture(config), config.num_hidden_layers)


def _name(names: Any, name: str) -> str:
    theirs: str | None = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if theirs is None:
        raise ModelError(f"GGUF: has no name for {name}")
    return theirs


def _type(name: str, theirs: str, shape: tuple[int, ...], kind: str) -> gguf.GGMLQuantizationType:
    type_ = _T[kind.upper()] if len(shape) > 1 else _T.F32
    if type_ in (_T.Q4_0, _T.Q4_K) and theirs in EMBEDDINGS:
        type_ = _T.Q8_0
    if shape[-1] % (block := gguf.GGML_QUANT_SIZES[type_][0]):
        raise ModelError(
            f"GGUF: {name} has rows of {shape[-1]} weights, and blocks hold {block}: the kinds f16 and bf16 have none"
        )
    return type_


def _ends(folder: Path, config: Any) -> list[int]:
    """Tokens at which the model's own settings end an answer."""
    own = (folder / "generation_config.json").is_file()
    settings = GenerationConfig.from_pretrained(folder) if own else GenerationConfig.from_model_config(config)
    return end_tokens(settings)


def _read(path: Path, name: str, heads: int) -> NDArray[np.float32]:
    with open_tensors(path) as file:
        values: NDArray[np.float32] = file.get_tensor(name).float().numpy()
    return interleave(values, heads) if heads else values


def _expected(config: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of each weight that the configuration calls for; a tied output layer is none of its own."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    state = model.state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items() if not _is_derived(name, config)}


def _is_derived(name: str, config: Any) -> bool:
    """Whether the model makes this weight from others or from its configuration."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and bool(config.tie_word_embeddings))


def read_gguf(path: Path, config: Any) -> Callable[[str], torch.Tensor | None]:
    """A function from the name of a weight to its values, float32 in the order of Hugging Face; None if the file has no
    such weight. `config` is the model's."""
    with quick_gguf():
        held = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    arch, names = architecture(config), _names(config)

    def read(name: str) -> torch.Tensor | None:
        tensor = held.get(names.get_name(name, try_suffixes=(".weight", ".bias")))
        if tensor is None:
            return None
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        heads = heads_to_interleave(name, config, arch)
        return torch.tensor(deinterleave(values, heads) if heads else values)

    return read
