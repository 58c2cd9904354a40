"""quant.plugin: a quantizer of one's own, here the shipped int8_symmetric.py from outside the package."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from qft.calibration.layer_errors import layer_errors
from qft.commands.evaluate import EvalOptions, evaluate
from qft.errors import MissingError, ModelError, QftError, RecipeError, RunError
from qft.memory.meter import weight_bytes
from qft.model.adapter import attach_adapter
from qft.model.load import load_base
from qft.plan import make_plan
from qft.progress import View
from qft.quant.hold.plugin import load_plugin
from qft.recipe import load
from tests.support.cli import qft
from tests.support.models import plain_loss, tiny_llama
from tests.support.plugins import SHIPPED, changed, custom
from tests.support.runs import HARD, adapter, run

RecipeFile = Callable[..., Path]


def refusal(path: Path, kind: type[QftError]) -> str:
    with pytest.raises(kind) as caught:
        make_plan(load(path))
    return str(caught.value)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 40)[None]).logits


def int8_linear(plugin: Path, linear: nn.Linear, int8_matmul: bool = False) -> tuple[Any, nn.Linear]:
    """The plugin's layer with the weights of `linear`, and a plain one with what it holds."""
    load_plugin(plugin)
    code = sys.modules[AUTO_QUANTIZER_MAPPING["int8_symmetric"].__module__]
    layer = code.Int8Linear(linear, pre_quantized=True, int8_matmul=int8_matmul)
    layer.weight.data, layer.weight_scale = code.quantize(linear.weight.detach())
    layer.bias = linear.bias
    plain = nn.Linear(linear.in_features, linear.out_features, dtype=linear.weight.dtype)
    plain.weight.data = layer.dequantize().to(linear.weight.dtype)
    plain.bias = linear.bias
    return layer, plain


def test_the_shipped_plugin_is_short() -> None:
    assert len(SHIPPED.read_text().splitlines()) < 150


def test_weights_are_rounded_to_half_a_step(plugin: Path) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(40, 24)
    linear.weight.data[3] = 0
    layer, _ = int8_linear(plugin, linear)
    assert layer.weight.dtype == torch.int8
    assert layer.weight.shape == (24, 40)
    assert int(layer.weight.abs().max()) == 127
    step = linear.weight.detach().abs().amax(1) / 127
    assert ((layer.dequantize() - linear.weight).abs() <= step[:, None] * 0.5001).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_dequantized_layer(dtype: torch.dtype, plugin: Path) -> None:
    torch.manual_seed(0)
    layer, plain = int8_linear(plugin, nn.Linear(40, 24, dtype=dtype))
    x = torch.randn(2, 5, 40, dtype=dtype, requires_grad=True)
    results = []
    for module in (layer, plain):
        y = module(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, module.bias])))
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, expected)
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(layer, (x,))


def test_a_graph_keeps_no_dequantized_weight(plugin: Path) -> None:
    layer, _ = int8_linear(plugin, nn.Linear(40, 24))
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(5, 40, requires_grad=True))
    assert [t.dtype for t in kept if t.numel() >= 24 * 40] == [torch.int8]


@pytest.mark.parametrize(("tokens", "exact"), [(16, True), (17, False)])
def test_int8_products_are_for_evaluation_and_near_the_exact_ones(tokens: int, exact: bool, plugin: Path) -> None:
    torch.manual_seed(0)
    layer, plain = int8_linear(plugin, nn.Linear(64, 32), int8_matmul=True)
    x = torch.randn(1, tokens, 64)
    torch.testing.assert_close(layer(x), plain(x))  # a gradient may be asked for
    with torch.no_grad():
        assert torch.equal(layer(x), plain(x)) == exact
        assert (layer(x) - plain(x)).norm() < 0.02 * plain(x).norm()


def test_linears_are_quantized_and_the_rest_is_as_the_recipe_says(plugin: Path, recipe_file: RecipeFile) -> None:
    quant = custom("mine.py", skip_modules=["up_proj"])
    plan = make_plan(load(recipe_file(quant=quant, model={"dtype": "bfloat16"})))
    model = load_base(plan.model)
    kinds = {name.rpartition(".")[2]: type(m).__name__ for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert kinds.pop("lm_head") == kinds.pop("up_proj") == "Linear"
    assert set(kinds.values()) == {"Int8Linear"}
    layer = model.model.layers[0].self_attn.q_proj
    assert (layer.weight.dtype, layer.weight_scale.dtype) == (torch.int8, torch.float32)
    original = tiny_llama().model.layers[0].self_attn.q_proj.weight
    assert 0 < (layer.dequantize() - original).norm() < 0.01 * original.norm()
    facts = plan.document().model_dump()["quantization"]
    assert facts["scheme"] == "int8_symmetric"
    assert facts["modules_to_not_convert"] == ["lm_head", "up_proj"]
    assert facts["plugin"]["sha256"] == hashlib.sha256(plugin.read_bytes()).hexdigest()
    up = 2 * 64 * 128  # in bfloat16, as the head, the embeddings and the norms; one float32 scale a row
    held = sum(weight_bytes(model).values())
    rest = plan.model.shape.parameters - plan.model.shape.linear_parameters + up
    scales = 2 * 4 * (64 + 32 + 32 + 64 + 128 + 64)
    assert (
        plan.model.shape.linear_parameters - up + scales + 2 * rest
        <= held
        <= plan.model.shape.linear_parameters + 2 * rest + 4096
    )


def test_it_learns_resumes_and_its_adapter_reloads_to_the_same_loss(
    plugin: Path, recipe_file: RecipeFile, chat_file: Path, tmp_path: Path
) -> None:
    saves = {"save_strategy": "steps", "save_steps": 6}
    path = recipe_file(quant=custom("mine.py"), train=HARD | saves, data={"eval": str(chat_file)})
    report = run(path)
    assert report.loss.last < 0.9 * report.loss.first
    assert report.model.scheme == "int8_symmetric"
    assert report.eval.after is not None
    plan = make_plan(load(path))
    model = PeftModel.from_pretrained(load_base(plan.model), tmp_path / "run" / "adapter").eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=plan.training["bf16"]):
        assert plain_loss(model, plan.data.eval) == pytest.approx(report.eval.after.loss, rel=0.02)

    known = {"path": str(plugin), "sha256": hashlib.sha256(plugin.read_bytes()).hexdigest(), "method": "int8_symmetric"}
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["plugin"] == known
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["quantization"]["plugin"] == known

    own, merged = evaluate([f"{tmp_path}/run", f"{tmp_path}/run@merged"], EvalOptions(), View()).targets
    assert merged.perplexity == pytest.approx(own.perplexity, rel=0.02)

    whole = adapter(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-12")
    run(path, resume=True)
    for name, tensor in adapter(tmp_path / "run").items():
        torch.testing.assert_close(tensor, whole[name])


def test_gradient_checkpointing_changes_no_loss(plugin: Path, recipe_file: RecipeFile, tmp_path: Path) -> None:
    def losses(name: str, checkpointing: bool) -> list[float]:
        train = HARD | {"max_steps": 2, "gradient_checkpointing": checkpointing}
        report = run(recipe_file(quant=custom("mine.py"), train=train, output_dir=str(tmp_path / name)))
        return [loss for _, loss, *_ in report.loss.history]

    assert losses("with", True) == pytest.approx(losses("without", False), rel=1e-3)


def test_a_changed_plugin_resumes_no_run_and_fits_no_adapter(
    plugin: Path, recipe_file: RecipeFile, chat_file: Path, tmp_path: Path
) -> None:
    saves = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    path = recipe_file(quant=custom("mine.py"), train=saves)
    run(path)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-2")
    changed(plugin, "LEVELS = 127", "LEVELS = 100")
    with pytest.raises(RunError, match=r"recipe.yaml:\d+: quant.plugin: the file has changed"):
        run(path, resume=True)
    with pytest.raises(ModelError, match=r"quant\.plugin .* has changed"):
        evaluate([str(tmp_path / "run")], EvalOptions(data=str(chat_file)), View())


def test_a_quantized_folder_is_saved_loaded_trained_and_evaluated(
    plugin: Path, recipe_file: RecipeFile, chat_file: Path, tmp_path: Path
) -> None:
    held_out = {"eval": str(chat_file)}
    plan = make_plan(load(recipe_file("base.yaml", quant=custom("mine.py"), data=held_out)))
    model = load_base(plan.model)
    folder = tmp_path / "int8"
    model.save_pretrained(folder)
    plan.model.tokenizer.save_pretrained(folder)
    saved = load_file(folder / "model.safetensors")
    assert saved["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8
    assert saved["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.float32

    path = recipe_file("int8.yaml", quant=custom("mine.py"), model={"path": str(folder)}, data=held_out, train=HARD)
    plan = make_plan(load(path))
    assert plan.model.scheme.name == "int8_symmetric"
    again = load_base(plan.model)
    assert type(again.model.layers[0].mlp.up_proj).__name__ == "Int8Linear"
    assert torch.equal(logits(again), logits(model))

    report = run(path)
    assert report.loss.last < 0.9 * report.loss.first
    targets = (tmp_path / "base.yaml", path, tmp_path / "run")
    result = qft("eval", *targets, f"--out={tmp_path / 'eval'}", "--json")
    assert result.exit_code == 0, result.output
    base, folder_again, adapted = (target["perplexity"] for target in json.loads(result.stdout)["targets"])
    assert base == folder_again
    assert adapted < 0.9 * base


@pytest.mark.parametrize(
    "quant", [None, {"mode": "none", "preset": None}, {"preset": "finetune"}], ids=["without", "none", "4bit"]
)
def test_a_quantized_folder_needs_its_plugin(
    quant: Any, plugin: Path, recipe_file: RecipeFile, chat_file: Path, tmp_path: Path
) -> None:
    model = load_base(make_plan(load(recipe_file(quant=custom("mine.py")))).model)
    model.save_pretrained(tmp_path / "int8")
    message = refusal(recipe_file(model={"path": str(tmp_path / "int8")}, quant=quant), RecipeError)
    assert "int8_symmetric" in message
    assert "set quant.mode to custom and quant.plugin to the file that made it" in message
    result = qft("eval", tmp_path / "int8", "--data", chat_file)
    assert result.exit_code == 2
    assert "quant.plugin" in result.stderr


def test_two_versions_of_a_quantizer_are_compared(
    plugin: Path, recipe_file: RecipeFile, chat_file: Path, tmp_path: Path
) -> None:
    coarse = changed(Path(shutil.copy(plugin, tmp_path / "coarse.py")), "LEVELS = 127", "LEVELS = 3")
    held_out = {"eval": str(chat_file)}
    float32 = {"dtype": "float32"}
    paths = [
        recipe_file(f"{p.stem}.yaml", quant=custom(p.name), data=held_out, model=float32) for p in (plugin, coarse)
    ]
    reference = recipe_file("none.yaml", quant=None, data=held_out, model=float32)
    options = EvalOptions(reference=str(reference), layers=True)
    _, fine, rough = evaluate([str(p) for p in (reference, *paths)], options, View()).targets
    for layer, coarser in zip(fine.layers, rough.layers, strict=True):
        if layer.kind != "lm_head":
            assert 0 < layer.weight_error < 0.01 < coarser.weight_error
    assert fine.layers[0].bytes == 64 * 64 + 4 * 64


def test_layer_errors_are_those_of_the_dequantized_weight(plugin: Path, recipe_file: RecipeFile) -> None:
    plan = make_plan(load(recipe_file(quant=custom("mine.py"), model={"dtype": "float32"})))
    model, reference = attach_adapter(load_base(plan.model), plan), tiny_llama()
    batch = {"input_ids": torch.arange(3, 40)[None], "attention_mask": torch.ones(1, 37, dtype=torch.int64)}
    errors = {error.name: error for error in layer_errors(reference, model, [batch])}
    name = "model.layers.1.mlp.down_proj"
    held = model.get_base_model().get_submodule(name).base_layer.dequantize()
    original = reference.get_submodule(name).weight.detach()
    assert errors[name].weight_error == pytest.approx(float((held - original).norm() / original.norm()), rel=1e-5)
    assert 30 < errors[name].output_snr_db < 60


BROKEN = {
    "syntax": ("LEVELS = 127", "LEVELS = (127", r"mine.py:\d+: cannot be imported: SyntaxError"),
    "import": ("import torch\n", "import torch, no_such_thing\n", r"mine.py:14: cannot be imported: ModuleNotFound"),
    "no quantizer": ("@register_quantizer(NAME)", "", "registers int8_symmetric, and should register one config"),
    "no config": ("@register_quantization_config(NAME)", "", "registers int8_symmetric, and should register one"),
    "two names": ("@register_quantizer(NAME)", "@register_quantizer('b')", "registers b, int8_symmetric, and"),
    "taken name": ('NAME = "int8_symmetric"', 'NAME = "gptq"', "ValueError: Config 'gptq' already registered"),
    "abstract": ("    @property\n    def is_trainable", "    def trainable", "cannot be made: TypeError"),
    "another method": ("quant_method: str = NAME", "quant_method: str = 'x'", "is 'x', and should be 'int8_symm"),
    "untrainable": ("def is_trainable(self) -> bool:\n        return True", "def is_trainable(self):\n        return 0",
                    "says that adapters cannot be trained on int8_symmetric"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_told_in_one_line(case: str, plugin: Path, recipe_file: RecipeFile) -> None:
    old, new, message = BROKEN[case]
    changed(plugin, old, new)
    result = qft("check", recipe_file(quant=custom("mine.py")))
    assert result.exit_code == (2 if case == "untrainable" else 6)
    assert len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.stderr
    with pytest.raises(QftError, match=message):
        make_plan(load(recipe_file(quant=custom("mine.py"))))
    shutil.copy(SHIPPED, plugin)
    load_plugin(plugin)  # a failed import leaves nothing behind


def test_a_plugin_that_quantizes_nothing_is_refused(plugin: Path, recipe_file: RecipeFile) -> None:
    changed(plugin, "isinstance(module, nn.Linear) and should", "isinstance(module, nn.Bilinear) and should")
    with pytest.raises(ModelError, match="has quantized no layer"):
        load_base(make_plan(load(recipe_file(quant=custom("mine.py")))).model)


def test_an_untrainable_one_is_evaluated_all_the_same(plugin: Path, recipe_file: RecipeFile, chat_file: Path) -> None:
    changed(plugin, "def is_trainable(self) -> bool:\n        return True", "def is_trainable(self):\n        return 0")
    path = recipe_file(quant=custom("mine.py"), data={"eval": str(chat_file)})
    assert evaluate([str(path)], EvalOptions(), View()).targets[0].name == str(path)


def test_what_is_no_plugin_is_refused(recipe_file: RecipeFile, tmp_path: Path) -> None:
    assert "nowhere.py: cannot be read: No such file" in refusal(recipe_file(quant=custom("nowhere.py")), MissingError)
    (tmp_path / "empty.py").touch()
    assert "empty.py: registers nothing" in refusal(recipe_file(quant=custom("empty.py")), ModelError)
    (tmp_path / "binary.py").write_bytes(b"\xff\0\xfe")
    assert "cannot be imported" in refusal(recipe_file(quant=custom("binary.py")), ModelError)
    (tmp_path / "exit.py").write_text("import sys\nsys.exit(0)\n")
    assert "exit.py:2: cannot be imported: SystemExit" in refusal(recipe_file(quant=custom("exit.py")), ModelError)


@pytest.mark.parametrize(
    ("quant", "adapter", "field", "message"),
    [
        ({"mode": "custom"}, {}, "quant.plugin", "needs the Python file"),
        ({"mode": "4bit", "plugin": "mine.py"}, {}, "quant.plugin", "only with quant.mode custom"),
        ({"mode": "none", "plugin": "mine.py"}, {}, "quant.plugin", "only with quant.mode custom"),
        ({"mode": "custom", "plugin": "mine.py", "quant_type": "nf4"}, {}, "quant.quant_type", "only with quant.mode"),
        ({"mode": "custom", "plugin": "mine.py"}, {"use_dora": True}, "adapter.use_dora", "set it to false"),
        ({"mode": "custom", "plugin": "mine.py"}, {"kind": "none", "r": ...}, "adapter.kind", "custom base"),
        ({"mode": "custom", "plugin": "mine.py"}, {"init_lora_weights": "pissa"}, "adapter.init_lora", "custom base"),
    ],
)
def test_fields_that_do_not_go_together(
    quant: dict[str, Any], adapter: dict[str, Any], field: str, message: str, recipe_file: RecipeFile
) -> None:
    with pytest.raises(RecipeError) as caught:
        load(recipe_file(quant={"preset": ..., **quant}, adapter=adapter))
    [problem] = caught.value.problems
    assert "recipe.yaml:" in problem
    assert field in problem
    assert message in problem


def test_the_file_is_run_once_for_its_content_and_never_from_old_bytecode(
    plugin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "plugin_runs", 0, raising=False)
    changed(plugin, "import torch\n", "import torch\ntorch.plugin_runs += 1\n")
    first = load_plugin(plugin)
    assert load_plugin(plugin) == first
    assert vars(torch)["plugin_runs"] == 1
    load_plugin(changed(plugin, "LEVELS = 127", "LEVELS = 126"))  # same size, same second
    assert vars(torch)["plugin_runs"] == 2
    assert not list(plugin.parent.glob("__pycache__"))
