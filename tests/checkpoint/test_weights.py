"""Which weights a folder holds: those that transformers reads, every one of them, and no others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qft.checkpoint.find import find_checkpoint
from qft.checkpoint.layout import unmergeable
from qft.checkpoint.skeleton import without_contents
from qft.errors import MissingError, ModelError, QftError, RecipeError
from qft.gguf.file import write_gguf
from qft.model.load import load_base
from qft.plan import ModelPlan, plan_model
from qft.recipe import load
from tests.support.families import write_tiny
from tests.support.gguf import saved
from tests.support.models import byte_tokenizer, tiny_llama

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], object]
BLOCK = "model.layers.1"
UP = f"{BLOCK}.mlp.up_proj.weight"
INDEX = "model.safetensors.index.json"


def planned(folder: Path, *overrides: str) -> ModelPlan:
    path = folder.parent / "recipe.yaml"
    path.write_text(f"model: {{path: {folder}, dtype: float32}}\ndata: {{train: -}}\noutput_dir: run\n")
    return plan_model(load(path, overrides))


def refusal(folder: Path, *overrides: str) -> tuple[type[QftError], str]:
    with pytest.raises(QftError) as caught:
        planned(folder, *overrides)
    return type(caught.value), str(caught.value)


def changed(folder: Path, change: Change) -> Path:
    """The folder with its one file changed."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model, tmp_path / "base")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Three files and their index."""
    tiny_llama().save_pretrained(tmp_path / "sharded", max_shard_size="150KB")
    byte_tokenizer().save_pretrained(tmp_path / "sharded")
    return tmp_path / "sharded"


def indexed(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))
    return folder


REFUSED: dict[str, tuple[Change, str]] = {
    "missing": (lambda t: [t.pop(UP), t.pop("lm_head.weight")], f"2 missing: lm_head.weight, {UP}"),
    "many missing": (lambda t: [t.pop(n) for n in list(t) if "layers" in n], "18 missing: model.layers.0.input"),
    "misshapen": (lambda t: t.update({UP: torch.zeros(128, 63)}), f"{UP} is [128, 63] and should be [128, 64]"),
    "transposed": (lambda t: t.update({UP: torch.zeros(64, 128)}), f"{UP} is [64, 128] and should be [128, 64]"),
    "integers": (lambda t: t.update({UP: torch.zeros(128, 64, dtype=torch.int8)}), f"{UP} cannot be I8"),
    "bits": (lambda t: t.update({UP: torch.zeros(128, 64, dtype=torch.bool)}), f"{UP} cannot be BOOL"),
    "float8": (lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)}), f"{UP} cannot be F8_E4M3"),
    "another head": (lambda t: t.update({"score.weight": torch.zeros(2, 64)}), "1 unexpected: score.weight in model.s"),
    "a third block": (lambda t: t.update({UP.replace("1", "2"): t[UP].clone()}), "unexpected: model.layers.2.mlp.up_"),
    "two names": (lambda t: t.update({UP.removeprefix("model."): t[UP].clone()}), f"{UP} is there under two names"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_the_models_is_refused_before_it_is_loaded(kind: str, base: Path) -> None:
    change, message = REFUSED[kind]
    error, text = refusal(changed(base, change))
    assert error is ModelError
    assert f"{base}: its weights are not those of the LlamaForCausalLM" in text
    assert message in text


TAKEN: dict[str, Change] = {
    "in half precision": lambda t: t.update({name: value.half() for name, value in t.items()}),
    "in double precision": lambda t: t.update({UP: t[UP].double()}),
    "with a buffer that is computed": lambda t: t.update(
        {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    ),
    "by the names of the bare model": lambda t: [
        t.update({name.removeprefix("model."): t.pop(name)}) for name in list(t) if name.startswith("model.")
    ],
}


@pytest.mark.parametrize("kind", TAKEN)
def test_what_transformers_reads_aright_is_taken(kind: str, base: Path, tiny_model: Path) -> None:
    loaded = load_base(planned(changed(base, TAKEN[kind]))).state_dict()
    original = load_file(tiny_model / "model.safetensors")
    for name, value in original.items():
        torch.testing.assert_close(loaded[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dropped", ["lm_head.weight", "model.embed_tokens.weight"])
def test_of_tied_weights_one_is_enough(dropped: str, tmp_path: Path) -> None:
    folder = tmp_path / "tied"
    tiny_llama(tie_word_embeddings=True).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)

    def keep_one(tensors: Tensors) -> None:
        [value] = [tensors.pop(name) for name in ("lm_head.weight", "model.embed_tokens.weight") if name in tensors]
        tensors.update({"lm_head.weight": value, "model.embed_tokens.weight": value.clone()})
        del tensors[dropped]

    loaded = load_base(planned(changed(folder, keep_one)))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    ends = ("lm_head.weight", "model.embed_tokens.weight")
    changed(folder, lambda tensors: [tensors.pop(name, None) for name in ends])
    assert "2 missing: lm_head.weight, model.embed_tokens.weight" in refusal(folder)[1]


def test_a_head_that_the_adapter_brings_need_not_be_there(base: Path) -> None:
    changed(base, lambda tensors: tensors.pop("lm_head.weight"))
    assert "1 missing: lm_head.weight" in refusal(base)[1]
    assert load_base(planned(base, "adapter.modules_to_save=[lm_head]")).lm_head.weight.shape == (264, 64)
    assert "1 missing: lm_head.weight" in refusal(base, "adapter.modules_to_save=[embed_tokens]")[1]


def test_unexpected_tensors_can_be_meant(base: Path) -> None:
    extra = {"score.weight": torch.zeros(2, 64), "v_head.summary.bias": torch.zeros(1)}
    changed(base, lambda tensors: tensors.update(extra))
    text = refusal(base)[1]
    assert "2 unexpected: score.weight in model.safetensors, v_head.summary.bias in" in text
    assert "model.ignore_unexpected" in text
    both = r"model.ignore_unexpected=['^score\.', v_head]"
    assert load_base(planned(base, both)).lm_head.weight.shape == (264, 64)
    assert "1 unexpected: v_head" in refusal(base, r"model.ignore_unexpected=['^score\.']")[1]
    error, text = refusal(base, r"model.ignore_unexpected=['^score\.', v_head, nothing]")
    assert error is RecipeError
    assert "model.ignore_unexpected: 'nothing' fits no tensor" in text
    assert "'(' is no regular expression" in refusal(base, "model.ignore_unexpected=['(']")[1]


def test_what_the_models_class_knows_to_leave_out_is_left_out(tmp_path: Path) -> None:
    folder = write_tiny("gpt_neox", tmp_path / "neox")
    masks = {f"gpt_neox.layers.{i}.attention.{name}": torch.ones(1) for i in (0, 1) for name in ("bias", "masked_bias")}
    changed(folder, lambda tensors: tensors.update(masks))
    assert load_base(planned(folder)).lm_head.weight.shape == (264, 64)


def test_an_expert_that_is_missing_is_missed(tmp_path: Path) -> None:
    folder = write_tiny("mixtral", tmp_path / "mixtral")
    changed(folder, lambda tensors: tensors.pop("model.layers.1.block_sparse_moe.experts.2.w2.weight"))
    text = refusal(folder)[1]
    assert "model.layers.1.mlp.experts.down_proj is [3, 64, 128] and should be [4, 64, 128]" in text
    assert "block_sparse_moe.experts.0.w2.weight in model.safetensors" in text


def test_the_index_is_followed_and_anything_else_left_alone(sharded: Path) -> None:
    wrong = {name: value + 1 for name, value in tiny_llama().state_dict().items()}
    for name in ("zz.safetensors", "consolidated.safetensors", "optimizer.safetensors", "model-00009.safetensors"):
        save_file(wrong, sharded / name)
    (sharded / "scheduler.bin").write_bytes(b"pickle")
    checkpoint = find_checkpoint(planned(sharded).recipe)
    named = sorted(set(json.loads((sharded / INDEX).read_text())["weight_map"].values()))
    assert [path.name for path in checkpoint.weight_files()] == named
    assert {name for name in checkpoint.digests() if name.endswith(".safetensors")} == set(named)
    assert unmergeable(checkpoint, without_contents(checkpoint, planned(sharded).recipe.model)) is None
    loaded = load_base(planned(sharded)).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in tiny_llama().state_dict().items())


def first(weight_map: dict[str, Any]) -> str:
    return next(iter(weight_map))


INDICES: dict[str, tuple[Callable[[dict[str, Any]], object], type[QftError], str]] = {
    "a file that is not there": (lambda m: m.update({first(m): "gone.safetensors"}), MissingError, "gone.safetensors"),
    "a tensor that is not there": (lambda m: m.update({"x.y": m[first(m)]}), ModelError, "says that x.y is in model-"),
    "another file's tensor": (
        lambda m: m.update({first(m): sorted(set(m.values()) - {m[first(m)]})[0]}), ModelError, "does not hold it"
    ),
    "out of the folder": (lambda m: m.update({first(m): "../x.safetensors"}), ModelError, "leads out of the folder"),
    "from the root": (lambda m: m.update({first(m): "/tmp/x.safetensors"}), ModelError, "leads out of the folder"),
    "a pickle": (lambda m: m.update({first(m): "x.bin"}), ModelError, "unpickling can run any code"),
    "no name": (lambda m: m.update({first(m): 3}), ModelError, "is no index of weights"),
    "nothing": (lambda m: m.clear(), ModelError, "is no index of weights"),
}  # fmt: skip


@pytest.mark.parametrize("kind", INDICES)
def test_an_index_that_is_wrong_is_refused(kind: str, sharded: Path) -> None:
    change, error, message = INDICES[kind]
    found, text = refusal(indexed(sharded, change))
    assert found is error
    assert message in text


def test_a_tensor_in_a_second_file_is_refused_where_it_would_be_taken(sharded: Path) -> None:
    where = json.loads((sharded / INDEX).read_text())["weight_map"]
    last = max(where.values())
    name = next(name for name, file in where.items() if file != last)
    tensors = load_file(sharded / last)
    save_file(tensors | {name: torch.zeros(1)}, sharded / last, metadata={"format": "pt"})
    assert f"says that {name} is in {where[name]}, but {last} holds one too" in refusal(sharded)[1]


def test_a_file_that_is_not_whole_is_named(sharded: Path, base: Path) -> None:
    shard = next(sharded.glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])
    assert f"{shard}: cannot be read" in refusal(sharded)[1]
    (base / "model.safetensors").write_text("not one")
    assert f"{base / 'model.safetensors'}: cannot be read" in refusal(base)[1]
    (base / "model.safetensors").rename(base / "weights.safetensors")
    found, text = refusal(base)
    assert found is MissingError
    assert "there is weights.safetensors" in text


@pytest.fixture(scope="module")
def in_4_bits(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that comes in nf4 with double quantization."""
    folder = tmp_path_factory.mktemp("quantized") / "nf4"
    held = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=held).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


LAYER = f"{BLOCK}.self_attn.q_proj"
NORM = f"{BLOCK}.input_layernorm.weight"
QUANTIZED: dict[str, tuple[Change, str]] = {
    "a norm is missing": (lambda t: t.pop(NORM), f"1 missing: {NORM}"),
    "a norm of integers": (lambda t: t.update({NORM: torch.ones(64, dtype=torch.int8)}), f"{NORM} cannot be held in"),
    "a norm of another shape": (lambda t: t.update({NORM: torch.ones(3)}), f"{NORM} is [3] and should be [64]"),
    "another head": (lambda t: t.update({"score.weight": torch.zeros(2, 64)}), "unexpected: score.weight"),
    "the codes are missing": (lambda t: t.pop(f"{LAYER}.weight"), f"{LAYER} lacks weight"),
    "the scales are missing": (lambda t: t.pop(f"{LAYER}.weight.absmax"), f"{LAYER} lacks weight.absmax"),
    "their scales are missing": (lambda t: t.pop(f"{LAYER}.weight.nested_absmax"), f"quantized weights of {LAYER}"),
    "half of the codes": (lambda t: t.update({f"{LAYER}.weight": t[f"{LAYER}.weight"][:1024]}), f"weights of {LAYER}"),
    "half of the scales": (
        lambda t: t.update({f"{LAYER}.weight.absmax": t[f"{LAYER}.weight.absmax"][:32]}), f"weights of {LAYER}"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_quantized_checkpoint_that_is_not_whole_is_refused(kind: str, in_4_bits: Path, tmp_path: Path) -> None:
    change, message = QUANTIZED[kind]
    folder = changed(shutil.copytree(in_4_bits, tmp_path / "changed"), change)
    with pytest.raises(ModelError) as caught:
        load_base(planned(folder))
    assert message in str(caught.value)


def test_a_quantized_checkpoint_that_is_whole_is_loaded(in_4_bits: Path) -> None:
    assert load_base(planned(in_4_bits)) is not None


def without(path: Path, out: Path, name: str) -> Path:
    """A GGUF file but for one of its tensors."""
    source = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, "llama")
    for key, field in source.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=inner)
    for tensor in source.tensors:
        if tensor.name != name:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def test_a_gguf_file_without_a_weight_is_refused(tmp_path: Path) -> None:
    folder = saved(tiny_llama(), tmp_path / "model")
    write_gguf(folder, tmp_path / "whole.gguf", kind="f32")
    assert load_base(planned(tmp_path / "whole.gguf")) is not None
    cut = without(tmp_path / "whole.gguf", tmp_path / "cut.gguf", "blk.1.ffn_up.weight")
    with pytest.raises(ModelError, match=f"1 missing: {UP}"):
        load_base(planned(cut))
