"""`qft doctor`: versions and flags that are there, and such that are not."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from qft.machine import doctor
from tests.support.cli import qft

CPU = "processor : 0\nflags\t\t: fpu avx2 amx_bf16\n\nprocessor : 1\nflags : fpu\n"
ASKS = {
    "qft": ["torch>=2.10", "peft>=0.21", "gguf>=0.19; extra == 'gguf'", "numpy<1; python_version < '3'"],
    "torch": ["sympy>=1", "numpy>=2"],
    "peft": ["torch<2"],
}


def here(monkeypatch: pytest.MonkeyPatch, **versions: str) -> list[doctor.Finding]:
    """What is found where these versions are installed, and nothing else."""

    def version(name: str) -> str:
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(doctor, "requires", lambda name: ASKS.get(name))
    return doctor.diagnose(Path.cwd())


def test_the_flags_are_those_of_the_first_processor() -> None:
    assert doctor.flags(CPU) == {"fpu", "avx2", "amx_bf16"}
    assert doctor.flags("") == set()


def test_versions_that_do_not_go_together_are_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    found = here(monkeypatch, torch="2.13", peft="0.20", sympy="1.2", numpy="1.9")
    broken = [each.text for each in found if each.state == "broken"]
    assert broken == [
        "0.20 is installed, and >=0.21 is needed: pip install 'peft>=0.21'",
        "torch needs numpy>=2: 1.9 is installed, and >=2 is needed",
        "peft needs torch<2: 2.13 is installed, and <2 is needed",
    ]


def test_what_is_missing_is_told_with_what_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {each.name: each for each in here(monkeypatch, torch="2.13", peft="0.21", sympy="1", numpy="2")}
    assert found["gguf"].state == "missing"
    assert found["gguf"].text.endswith("gguf (not installed); pip install 'qft[gguf]'")
    assert (found["torch"].state, found["torch"].text) == ("ok", "2.13")
    assert found["wandb"].state == "missing"


def test_requirements() -> None:
    assert doctor.unmet(Requirement("pytest>=1")) is None
    assert doctor.unmet(Requirement("no-such-package-anywhere")) == "not installed"


def test_the_command() -> None:
    shown = qft("doctor", "--json")
    found = {each["name"]: each for each in json.loads(shown.stdout)}
    assert shown.exit_code == int(any(each["state"] == "broken" for each in found.values()))
    assert {"python", "gpu", "memory", "disk", "torch", "calibrate"} <= found.keys()
    assert "What qft needs" in qft("doctor").stdout
