"""`qft check MODEL`: what can be done with a model, and why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qft.documents import DOCUMENTS
from tests.support.cli import qft
from tests.support.tiny import write_tiny_model


def told(*arguments: Any) -> dict[str, Any]:
    result = qft("check", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def test_a_model_is_told_what_it_is_good_for(tiny_model: Path) -> None:
    found = told(tiny_model)
    DOCUMENTS["abilities"].model_validate(found)
    assert found["architecture"] == "LlamaForCausalLM"
    assert {mode: held["share"] for mode, held in found["quantize"].items()} == {"4bit": 1.0, "8bit": 1.0}
    assert set(found["train"].values()) == {None}
    assert found["exports"]["merged"] is None
    assert found["exports"]["bnb-4bit"] is None
    assert found["calibrate"]["rtn"] is None
    assert "quant.plugin" in found["calibrate"]["custom"]
    shown = qft("check", tiny_model).output
    assert "100.0% of the weights" in " ".join(shown.split())


def test_what_it_is_not_good_for_has_a_reason(tmp_path: Path) -> None:
    found = told(write_tiny_model(tmp_path / "gpt2", "gpt2"))
    assert found["exports"]["merged"] is None
    assert "torch.nn.Linear" in found["exports"]["bnb-4bit"]
    assert "torch.nn.Linear" in found["calibrate"]["rtn"]
    assert "cannot write GPT2LMHeadModel" in found["exports"]["gguf"]


def test_a_model_alone_takes_no_options_of_a_recipe_and_must_be_one(tiny_model: Path, tmp_path: Path) -> None:
    assert qft("check", tiny_model, "--show", 2).exit_code == 2
    missing = qft("check", tmp_path / "nowhere")
    assert missing.exit_code != 0
    assert "Traceback" not in missing.output
