"""Engines, each against what plain transformers makes of the folder that is written of their layers."""

from __future__ import annotations

import copy
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import torchao.quantization
from bitsandbytes.functional import has_avx512bf16
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from qft.calibration.layer_errors import layer_errors
from qft.memory.meter import weight_bytes
from qft.quant.engines import Block, QuantizedLayer, find_engine
from qft.quant.layer import LayerScheme
from qft.recipe.catalogue import CATALOGUE
from tests.support.models import byte_tokenizer, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning")

WINDOWS = torch.randint(3, 264, (4, 32), generator=torch.Generator().manual_seed(1))
CASES = [(engine, *kind) for engine, row in CATALOGUE.items() if not row.whole_model for kind in sorted(row.makes)]
DTYPES = [torch.float32, torch.bfloat16]
KINDS = [*(f"{name}_proj" for name in "qkvo"), "gate_proj", "up_proj", "down_proj"]
Schemes = dict[str, LayerScheme | None]


def scheme_of(data_type: str, bits: int, activations: str = "none", **changes: Any) -> LayerScheme:
    by_group = data_type == "int" and bits == 4
    return LayerScheme(data_type, bits, **{"group_size": 32 if by_group else -1, "activations": activations} | changes)


def fresh(dtype: torch.dtype, **changes: Any) -> Any:
    """A tiny model in `dtype`, its rotary frequencies in float32 as in one that is loaded."""
    model = tiny_llama(**changes)
    model.config.dtype = dtype
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(value)
        value.data = value.data.to(dtype)
    return model.eval()


def linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def everywhere(model: nn.Module, scheme: LayerScheme, **others: LayerScheme | None) -> Schemes:
    """`scheme` for every layer but the head and those whose name ends in one of `others`."""
    schemes: Schemes = {}
    for name in linears(model):
        end = name.rsplit(".", 1)[-1]
        schemes[name] = None if end == "lm_head" else others.get(end, scheme)
    return schemes


@dataclass
class Written:
    """A folder, and the model that it is to be once it is loaded."""

    folder: Path
    model: Any
    held: dict[str, QuantizedLayer] = field(default_factory=dict)
    originals: dict[str, Any] = field(default_factory=dict)
    """The unquantized layers."""


def write(engine_name: str, model: Any, schemes: Schemes, folder: Path) -> Written:
    """Quantize `model` block by block, put each layer in its place, and write a folder of one shard a block."""
    engine, made = find_engine(engine_name), Written(folder, model)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for number, block in enumerate(model.model.layers):
        name = f"model.layers.{number}"
        own = {layer.removeprefix(f"{name}."): s for layer, s in schemes.items() if s and layer.startswith(f"{name}.")}
        made.originals |= {f"{name}.{layer}": copy_of(block.get_submodule(layer)) for layer in own}
        plain = {key: value.clone() for key, value in block.state_dict().items() if key.rsplit(".", 1)[0] not in own}
        with seen(model, block, own) as (calls, largest):
            model(WINDOWS)
        with torch.no_grad():
            held = engine.quantize(Block(name, block, own, calls, largest_inputs=largest, seed=0))
        shard = {f"{name}.{key}": value for key, value in plain.items()}
        for layer, kept in held.items():
            block.set_submodule(layer, kept.module)
            shard |= {f"{name}.{layer}.{key}": value.clone() for key, value in kept.tensors.items()}
            made.held[f"{name}.{layer}"] = kept
        shards[name] = shard
    shards["rest"] = {key: value for key, value in model.state_dict().items() if ".layers." not in key}
    write_files(engine, made, shards)
    settings = model.config.to_dict() | {"quantization_config": engine.config(schemes, model.dtype)}
    (folder / "config.json").write_text(json.dumps(settings | {"dtype": str(model.dtype).removeprefix("torch.")}))
    byte_tokenizer().save_pretrained(folder)
    return made


def write_files(engine: Any, made: Written, shards: dict[str, dict[str, torch.Tensor]]) -> None:
    where: dict[str, str] = {}
    metadata = {f"{layer}.{key}": text for layer, held in made.held.items() for key, text in held.metadata.items()}
    ours = {f"{layer}.{key}" for layer, held in made.held.items() for key in held.tensors}
    for number, (name, shard) in enumerate(shards.items(), 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        inside = metadata if name == "rest" else {key: t for key, t in metadata.items() if key.startswith(f"{name}.")}
        header = engine.header(inside, [key for key in shard if key not in ours])
        save_file(shard, made.folder / file, {"format": "pt"} | header)
        where |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (made.folder / "model.safetensors.index.json").write_text(json.dumps(index))


@contextmanager
def seen(model: nn.Module, block: nn.Module, layers: Mapping[str, LayerScheme]) -> Iterator[Any]:
    """Calls of `block`, a window each, and the largest inputs of its `layers`."""
    calls: list[Any] = []
    largest: dict[str, float] = {}

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.extend(((row[None], *args[1:]), kwargs) for row in args[0].detach())

    def measure(name: str) -> Any:
        return lambda _, args: largest.update({name: float(args[0].abs().max())})

    handles = [block.register_forward_pre_hook(keep, with_kwargs=True)]
    handles += [block.get_submodule(name).register_forward_pre_hook(measure(name)) for name in layers]
    with torch.no_grad():
        yield calls, largest
    for handle in handles:
        handle.remove()


def copy_of(layer: Any) -> nn.Linear:
    made = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=layer.weight.dtype)
    made.load_state_dict(layer.state_dict())
    return made


def loaded(folder: Path) -> Any:
    """By plain transformers, with bitsandbytes' layers computing as the engine's do on every CPU."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(WINDOWS).logits
        return found


@pytest.mark.parametrize(
    ("engine", "data_type", "bits", "activations", "dtype"),
    [(*case, DTYPES[number % 2]) for number, case in enumerate(CASES)],
    ids=str,
)
def test_a_folder_loads_as_what_was_held(
    engine: str, data_type: str, bits: int, activations: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = fresh(dtype, attention_bias=True)
    before = logits(model)
    made = write(engine, model, everywhere(model, scheme_of(data_type, bits, activations)), tmp_path)
    reloaded = loaded(tmp_path)
    assert reloaded.dtype == dtype
    torch.testing.assert_close(logits(reloaded), logits(model), rtol=0, atol=0)
    assert 0 < (logits(model) - before).float().norm() < 0.25 * before.float().norm()
    check_restored(engine, made, scheme_of(data_type, bits, activations))


SAMPLES = [
    ("rtn", scheme_of("int", 4)),
    ("rtn", scheme_of("int", 8, "static")),
    ("bitsandbytes", scheme_of("nf4", 4)),
    ("bitsandbytes", scheme_of("int", 8, "dynamic")),
    ("torchao", scheme_of("int", 8, "dynamic")),
]
ELSEWHERE = [*zip(itertools.cycle(DTYPES), SAMPLES, strict=False), (torch.bfloat16, SAMPLES[2])]
PLAIN = """
import sys
import torch
from transformers import AutoModelForCausalLM
*folders, windows = sys.argv[1:]
with torch.no_grad():
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder)
        torch.save(model(torch.load(windows)).logits, f"{folder}/logits.pt")
"""


@pytest.fixture(scope="module")
def read_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, list[tuple[LayerScheme, Any, Any]]]:
    """By dtype: each scheme of SAMPLES, the logits here, and those of the folder in a process of its own."""
    made = {}
    for number, (dtype, (engine, scheme)) in enumerate(ELSEWHERE):
        folder, model = tmp_path_factory.mktemp(f"sample{number}-"), fresh(dtype)
        write(engine, model, everywhere(model, scheme), folder)
        made[folder] = dtype, scheme, logits(model)
    windows = tmp_path_factory.mktemp("windows")
    torch.save(WINDOWS, windows / "windows.pt")
    places = [*map(str, made), str(windows / "windows.pt")]
    subprocess.run([sys.executable, "-c", PLAIN, *places], check=True, cwd=windows, capture_output=True)
    found: dict[torch.dtype, list[tuple[LayerScheme, Any, Any]]] = {dtype: [] for dtype in DTYPES}
    for folder, (dtype, scheme, ours) in made.items():
        found[dtype].append((scheme, ours, torch.load(folder / "logits.pt")))
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_process_that_knows_nothing_of_qft_loads_it(dtype: torch.dtype, read_elsewhere: Any) -> None:
    assert len(read_elsewhere[dtype]) == 3
    for scheme, ours, theirs in read_elsewhere[dtype]:
        # On a CPU with AVX512-BF16 bitsandbytes itself multiplies 4-bit weights in bfloat16, whatever it was asked for.
        exact = scheme.data_type != "nf4" or not has_avx512bf16()
        tolerance = 0.0 if exact else 2**-6 * float(ours.abs().max())
        torch.testing.assert_close(theirs, ours, rtol=0, atol=tolerance)


QUIET = """
import sys
from qft.machine.environment import prepare_libraries
prepare_libraries()
import auto_round, torch, torchao.prototype.safetensors.safetensors_support
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1])(torch.ones(1, 4, dtype=torch.long))
"""


def test_the_libraries_are_silent(tmp_path: Path) -> None:
    model = fresh(torch.bfloat16)
    write("rtn", model, everywhere(model, scheme_of("int", 8)), tmp_path)
    done = subprocess.run([sys.executable, "-c", QUIET, str(tmp_path)], check=True, capture_output=True)
    assert (done.stdout, done.stderr) == (b"", b"")


def test_a_skipped_layer_of_torchao_is_that_layer() -> None:
    scheme = scheme_of("int", 8)
    names = ["l.1.gate", "l.1.gate_proj", "l.11.gate", "fc", "l.1.fc"]
    for skipped in names:
        schemes: Schemes = {name: None if name == skipped else scheme for name in names}
        entries = find_engine("torchao").config(schemes, torch.bfloat16)["modules_to_not_convert"]
        assert [name for name in names if not should_convert_module(f"{name}.weight", entries)] == [skipped]


@pytest.mark.parametrize(
    ("engine", "scheme"), [*SAMPLES, ("rtn", scheme_of("float", 8, "dynamic")), ("torchao", scheme_of("int", 8))]
)
def test_errors_of_held_layers_are_those_of_loaded_ones(engine: str, scheme: LayerScheme, tmp_path: Path) -> None:
    model = fresh(torch.bfloat16)
    reference = copy.deepcopy(model)
    write(engine, model, everywhere(model, scheme), tmp_path)
    batches = [{"input_ids": WINDOWS, "attention_mask": torch.ones_like(WINDOWS)}]
    of_held, of_loaded = (
        [error.model_dump(exclude={"bytes"}) for error in layer_errors(reference, other, batches)]
        for other in (model, loaded(tmp_path))
    )
    assert of_held == of_loaded
    assert all(10 < error["output_snr_db"] < 60 for error in of_held if error["kind"] != "lm_head")


def check_restored(engine_name: str, made: Written, scheme: LayerScheme) -> None:
    """A second module of the tensors, which the first one's forward passes have not touched, computes the same."""
    engine = find_engine(engine_name)
    for name, held in made.held.items():
        again = engine.restore(made.originals[name], held.tensors, scheme)
        layer = made.originals[name]
        inputs = torch.randn(2, 5, layer.in_features).to(layer.weight.dtype)
        with torch.no_grad():
            torch.testing.assert_close(again(inputs), held.module(inputs), rtol=0, atol=0)


@pytest.mark.parametrize("engine", ["rtn", "autoround"])
def test_a_mixture_loads_as_what_was_held(engine: str, tmp_path: Path) -> None:
    model = fresh(torch.bfloat16)
    schemes = everywhere(model, scheme_of("int", 4), o_proj=None, down_proj=scheme_of("int", 8))
    made = write(engine, model, schemes, tmp_path)
    assert {name.rsplit(".", 1)[-1] for name in made.held} == set(KINDS) - {"o_proj"}
    torch.testing.assert_close(logits(loaded(tmp_path)), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("engine", ["rtn", "autoround"])
@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_are_loaded(engine: str, bits: int, tmp_path: Path) -> None:
    model = fresh(torch.bfloat16)
    for block in model.model.layers:
        block.mlp.up_proj.weight.data += 0.02  # all zero points off the middle
    scheme = scheme_of("int", bits, symmetric=False)
    made = write(engine, model, everywhere(model, scheme, o_proj=None), tmp_path)
    torch.testing.assert_close(logits(loaded(tmp_path)), logits(model), rtol=0, atol=0)
    check_restored(engine, made, scheme)


def test_zero_points_are_not_mixed() -> None:
    model, schemes = fresh(torch.bfloat16), [scheme_of("int", 4, symmetric=False), scheme_of("int", 8)]
    with pytest.raises(ValueError, match="zero points"):
        find_engine("rtn").config(everywhere(model, schemes[0], up_proj=schemes[1]), torch.bfloat16)


@pytest.mark.parametrize("engine", ["bitsandbytes", "torchao"])
def test_formats_of_one_scheme_refuse_a_second(engine: str) -> None:
    model, schemes = fresh(torch.bfloat16), [scheme_of("int", 8), scheme_of("int", 8, "dynamic")]
    with pytest.raises(ValueError, match="2 ways"):
        find_engine(engine).config(everywhere(model, schemes[0], up_proj=schemes[1]), torch.bfloat16)


@pytest.mark.parametrize(
    ("engine", "scheme"),
    [
        ("bitsandbytes", scheme_of("nf4", 4)),
        ("bitsandbytes", scheme_of("int", 8, "dynamic")),
        ("torchao", scheme_of("int", 8)),
        ("rtn", scheme_of("int", 8, "dynamic")),
    ],
)
def test_skipped_layers_stay_as_they_were(engine: str, scheme: LayerScheme, tmp_path: Path) -> None:
    model = fresh(torch.bfloat16, num_hidden_layers=12)
    schemes = everywhere(model, scheme, up_proj=None)
    schemes["model.layers.1.self_attn.q_proj"] = None
    kept = {name: model.get_submodule(name).weight.clone() for name, own in schemes.items() if own is None}
    write(engine, model, schemes, tmp_path)
    reloaded = loaded(tmp_path)
    torch.testing.assert_close(logits(reloaded), logits(model), rtol=0, atol=0)
    for name, weight in kept.items():
        layer = reloaded.get_submodule(name)
        assert type(layer) is nn.Linear
        torch.testing.assert_close(layer.weight.data, weight, rtol=0, atol=0)


TORCHAO = {"none": "Int8WeightOnlyConfig", "dynamic": "Int8DynamicActivationInt8WeightConfig"}


def theirs(scheme: LayerScheme, dtype: torch.dtype) -> Any:
    """How transformers is asked for the same."""
    if scheme.data_type == "int" and scheme.activations == "dynamic":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=scheme.data_type,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def contents(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and headers of all files."""
    tensors: dict[str, torch.Tensor] = {}
    headers: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        inside, header = one(path)
        tensors |= inside
        headers |= header
    return tensors, headers


def one(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("engine", "scheme"),
    [
        ("bitsandbytes", scheme_of("nf4", 4)),
        ("bitsandbytes", scheme_of("fp4", 4)),
        ("bitsandbytes", scheme_of("int", 8, "dynamic")),
        ("torchao", scheme_of("int", 8)),
        ("torchao", scheme_of("int", 8, "dynamic")),
    ],
)
def test_files_are_those_of_transformers(engine: str, scheme: LayerScheme, dtype: torch.dtype, tmp_path: Path) -> None:
    model = fresh(dtype, attention_bias=True)
    model.save_pretrained(tmp_path / "original")
    asked: Any = theirs(scheme, dtype)
    if engine == "torchao":
        settings = getattr(torchao.quantization, TORCHAO[scheme.activations])
        asked = TorchAoConfig(settings(set_inductor_config=False), modules_to_not_convert=["lm_head"])
    other = AutoModelForCausalLM.from_pretrained(
        tmp_path / "original", quantization_config=asked, dtype=dtype, device_map="cpu"
    )
    other.save_pretrained(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    write(engine, model, everywhere(model, scheme), tmp_path / "ours")

    (ours, our_header), (expected, header) = contents(tmp_path / "ours"), contents(tmp_path / "theirs")
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape)
        if "quant_state" not in name:  # JSON, whose numbers are compared by what is loaded
            assert torch.equal(tensor, expected[name])
    settings = [json.loads((tmp_path / name / "config.json").read_text())["quantization_config"] for name in WRITERS]
    if engine == "torchao":
        plain = {name for name, text in header.items() if text == '{"_type": "Tensor"}'}
        assert {n: t for n, t in header.items() if n not in plain | {"tensor_names"}}.items() <= our_header.items()
    else:
        assert settings[0].pop("llm_int8_skip_modules") == ["lm_head"]
        assert settings[1].pop("llm_int8_skip_modules") is None
    assert settings[0] == settings[1]


WRITERS = ("ours", "theirs")


def test_each_file_of_torchao_tells_of_its_own_tensors(tmp_path: Path) -> None:
    model = fresh(torch.bfloat16, attention_bias=True)
    write("torchao", model, everywhere(model, scheme_of("int", 8), up_proj=None), tmp_path)
    found: dict[str, torch.Tensor] = {}
    for path in sorted(tmp_path.glob("*.safetensors")):
        tensors, header = one(path)
        whole, left = unflatten_tensor_state_dict(tensors, header)
        assert not left
        found |= whole
    assert found.keys() == model.state_dict().keys()
    # Bytes of a weight: one of its own, and 5 for the scale and the zero point of each row.
    q = model.model.layers[0].self_attn.q_proj
    assert weight_bytes(q)["frozen"] == 64 * 64 + 64 * 5 + 64 * 2


def test_llm_int8_keeps_what_is_written_when_it_computes() -> None:
    model = fresh(torch.bfloat16)
    block = model.model.layers[0]
    layer = copy_of(block.mlp.up_proj)
    held = find_engine("bitsandbytes").quantize(Block("", block, {"mlp.up_proj": scheme_of("int", 8, "dynamic")}))
    tensors, module = held["mlp.up_proj"].tensors, held["mlp.up_proj"].module
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    inputs = torch.randn(4, 64, dtype=torch.bfloat16)
    inputs[1, 3] = 40.0  # an outlier, which sends a column through float16
    with torch.no_grad():
        first, second = module(inputs), module(inputs)
        expected = layer(inputs)
    assert torch.equal(first, second)
    assert (first - expected).float().norm() < 0.02 * expected.float().norm()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_products_of_8_bits_are_those_of_integers(activations: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = fresh(dtype, attention_bias=True)
    write("rtn", model, everywhere(model, scheme_of("int", 8, activations)), tmp_path)
    reloaded = loaded(tmp_path)
    logits(reloaded)  # the first pass makes dense weights of the loaded ones
    tensors, _ = contents(tmp_path)
    for name in (f"model.layers.{n}.{kind}" for n in (0, 1) for kind in ("self_attn.k_proj", "mlp.down_proj")):
        layer = reloaded.get_submodule(name)
        inputs = torch.randn(2, 9, layer.in_features).to(dtype) * torch.logspace(-2, 1, 9)[:, None].to(dtype)
        own = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
        expected, size = by_integers(inputs, own)
        with torch.no_grad():
            difference = (layer(inputs).float() - expected).abs()
        unit = torch.finfo(dtype).eps / 2
        # Each factor is rounded once when it is dequantized, the output once, and its bias is added after that; sums
        # of n products in float32 are n units of its own off.
        float32 = torch.finfo(torch.float32).eps / 2
        bound = 2.1 * unit * size + 2 * unit * expected.abs() + layer.in_features * float32 * size
        if layer.bias is not None:
            bound += unit * (expected.abs() + layer.bias.float().abs())
        assert (difference <= bound).all()
        assert difference.norm() <= 4 * unit * expected.norm()


def by_integers(inputs: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """What int8 hardware computes, and the sum of the products' magnitudes: both float32 [rows, tokens, out].

    Quotients are taken in the dtype of the inputs, as compressed-tensors does, so that both round to the same integer.
    """
    scale = tensors.get("input_scale", inputs.abs().amax(-1, keepdim=True) / 127.5)
    rounded = (inputs / scale).round().clamp(-128, 127).to(torch.int8)
    weight = tensors["weight"]
    assert weight.dtype == torch.int8
    scales = scale.float() * tensors["weight_scale"].float().T
    sums = torch.matmul(rounded.int(), weight.int().T)
    sizes = torch.matmul(rounded.int().abs(), weight.int().abs().T)
    assert sums.dtype == torch.int32
    return sums.float() * scales + tensors.get("bias", torch.zeros(1)).float(), sizes.float() * scales
