"""Weights and losses that are no numbers are told by tensor or row, and nothing is made of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qft.commands.calibrate import calibrate
from qft.commands.evaluate import EvalOptions, evaluate
from qft.commands.verify import accept
from qft.errors import ModelError, NonFiniteError
from qft.progress import View
from qft.recipe import load
from tests.support.architectures import write_model
from tests.support.rows import chat, write_jsonl
from tests.support.runs import MODES, run

RecipeFile = Callable[..., Path]
NEVER = "model.layers.1.mlp.up_proj.weight"


def spoil(path: Path, name: str, value: float = float("nan"), at: Any = (0, 3)) -> None:
    tensors = load_file(path)
    tensors[name][at] = value
    save_file(tensors, path, {"format": "pt"})


ROUNDED = {"quant": {"preset": None, "mode": "qat", "target": "int4-g32"}}


@pytest.mark.parametrize(
    ("mode", "value"),
    [
        *[("nf4", float("nan")), ("8bit", float("-inf")), ("bf16", float("nan")), ("fp32", float("-inf"))],
        ("qat", float("nan")),
    ],
)
def test_a_base_that_is_no_number_is_refused_by_tensor(
    mode: str, value: float, recipe_file: RecipeFile, tmp_path: Path
) -> None:
    base = write_model(tmp_path / "base", "llama")
    spoil(base / "model.safetensors", NEVER, value)
    sections = dict(MODES.get(mode, ROUNDED))
    sections["model"] = sections.get("model", {}) | {"path": str(base)}
    with pytest.raises(ModelError, match=rf"base: {NEVER} holds NaN or infinity"):
        run(recipe_file(**sections))
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "failed"


def test_what_reads_weights_one_by_one_tells_too(recipe_file: RecipeFile, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "llama")
    spoil(base / "model.safetensors", NEVER)
    path = recipe_file(model={"path": str(base)}, calibrate={"engine": "rtn", "bits": 8})
    with pytest.raises(ModelError, match=rf"model\.safetensors: {NEVER} holds NaN"):
        calibrate(load(path), View())


def test_an_adapter_that_is_no_number_is_refused(recipe_file: RecipeFile, tmp_path: Path) -> None:
    path = recipe_file()
    run(path)
    own = Path(shutil.copytree(tmp_path / "run" / "adapter", tmp_path / "adapter"))
    file = own / "adapter_model.safetensors"
    name = next(name for name in load_file(file) if "lora_B" in name)
    spoil(file, name)
    accept(tmp_path / "run")  # else it is refused for being another one
    with pytest.raises(ModelError, match=r"adapter: .*lora_B.* holds NaN or infinity"):
        evaluate([str(path)], EvalOptions(adapter=own, data=str(tmp_path / "chats.jsonl")), View())


@pytest.fixture
def brittle(tmp_path: Path) -> Path:
    """A model whose norm overflows where it reads a Z, and a file of which two rows hold one."""
    base = write_model(tmp_path / "brittle", "gpt_neox")
    name = "gpt_neox.embed_in.weight"
    spoil(base / "model.safetensors", name, 3e38, ord("Z") - ord("!") + 3)
    write_jsonl(tmp_path / "held.jsonl", [chat(f"say {word}", word) for word in ("a", "Z", "c", "d", "eZ")])
    return base


def test_held_out_rows_that_come_to_no_number_are_named(brittle: Path, recipe_file: RecipeFile, tmp_path: Path) -> None:
    sections = {"model": {"path": str(brittle), "dtype": "float32"}, "quant": None}
    sections["data"] = {"eval": str(tmp_path / "held.jsonl")}
    train = {"per_device_eval_batch_size": 1, "report_to": []}
    with pytest.raises(NonFiniteError, match=r"step 0: .*held-out rows.*held\.jsonl:2, \S*held\.jsonl:5\. ") as caught:
        run(recipe_file(**sections, train=train))
    assert caught.value.exit_code == 8
    assert not (tmp_path / "run" / "eval-before.json").exists()
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "failed"


def test_an_evaluation_that_comes_to_no_number_writes_nothing(brittle: Path, tmp_path: Path) -> None:
    for suffix, told in (("jsonl", r"held\.jsonl:2, \S*held\.jsonl:5 "), ("txt", r"window 1 of \S*held\.txt ")):
        (tmp_path / "held.txt").write_text("a text with a Z in it")
        options = EvalOptions(data=str(tmp_path / f"held.{suffix}"), out=tmp_path / "out")
        with pytest.raises(NonFiniteError, match=rf"brittle@float32: the loss of \S*{told}is not finite"):
            evaluate([f"{brittle}@float32"], options, View())
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("engine", "held", "told"),
    [
        ("rtn", "held", r"the loss of \S*held\.jsonl:2, \S*held\.jsonl:5 is not finite in the unquantized model\. "),
        ("custom", "held", r"the loss of \S*held\.jsonl:2, \S*held\.jsonl:5 is not finite in the unquantized model\. "),
        ("autoround", "good", r"what windows [\d, ]+ of the calibration rows come to in the .* is not finite"),
    ],
)
def test_a_calibration_names_what_comes_to_no_number(
    engine: str, held: str, told: str, brittle: Path, recipe_file: RecipeFile, plugin: Path, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "good.jsonl", [chat(f"say {number}", "it") for number in range(3)])
    write_jsonl(tmp_path / "rows.jsonl", [chat(f"Z {i}", "it is so and so") for i in range(40)])
    own = {"custom": {}, "rtn": {"bits": 8}, "autoround": {"group_size": 32, "iters": 1, "samples": 8}}[engine]
    path = recipe_file(
        model={"path": str(brittle), "dtype": "float32"},
        quant={"preset": ..., "mode": "custom", "plugin": str(plugin)} if engine == "custom" else None,
        data={"train": "rows.jsonl", "eval": f"{held}.jsonl"},
        calibrate=own | {"engine": engine, "max_length": 32},
    )
    with pytest.raises(NonFiniteError, match=told) as caught:
        calibrate(load(path), View())
    assert caught.value.exit_code == 8
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "failed"


def test_float8_and_empty_tensors_are_looked_at() -> None:
    from qft.checkpoint.finite import require_finite

    eight = torch.zeros(4).to(torch.float8_e4m3fn)
    require_finite("here", [("eight", eight), ("empty", torch.zeros(0)), ("whole", torch.ones(2, dtype=torch.int8))])
    eight[1] = float("nan")
    with pytest.raises(ModelError, match="here: eight holds NaN or infinity"):
        require_finite("here", [("eight", eight)])
