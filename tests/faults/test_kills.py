"""Commands that are killed at moments of a seed: nothing is lost, nothing half-written passes, the next one ends well.

QFT_KILLS says how many kills there are at least, as many of each command; `make kills` makes 150, and shows the table.
A kill comes at any moment of the whole run time, or before any of the command's changes of a file. A failure names its
seed, for QFT_KILLS_FROM.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from qft import registry as versions
from qft.commands.verify import verify
from qft.documents.evaluation import EvalDocument
from qft.documents.recorded import record_of
from qft.documents.training import read_report
from qft.errors import QftError
from qft.export import ExportOptions
from qft.export.job import find_job, load_run
from qft.progress import View
from qft.run.folder import Run
from tests.support.gguf import saved
from tests.support.kills import Ended, Killer, killer
from tests.support.models import tiny_llama
from tests.support.rows import chat, write_jsonl

COUNT = int(os.environ.get("QFT_KILLS", "5"))
FROM = int(os.environ.get("QFT_KILLS_FROM", "0"))
KILLED = -9
TARGETS = ["--to", "merged", "--to", "adapter"]
LOCKS = (".lock", ".add.lock")
"""That a registry keeps."""


def tree(folder: Path) -> dict[str, bytes]:
    """Every file, by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def leftovers(folder: Path) -> list[str]:
    found = [path for path in folder.rglob("*") if path.name.startswith(".") and path.name not in LOCKS]
    return [str(path.relative_to(folder)) for path in [*found, *folder.rglob("replaced-*")]]


@dataclass
class Case:
    """One command on its own copy of what it changes."""

    good: Path
    """Inputs, and complete results of each command. Nobody may change them."""
    folder: Path
    """Of this copy."""
    draw: random.Random
    arguments: list[str] = field(default_factory=list)

    def begin(self) -> None:
        """Put into the folder what the command finds, and say what is asked."""

    def check(self) -> None:
        """After each kill: what was complete is there, and what is not does not pass for it."""

    def go_on(self) -> None:
        """Say what somebody asks next; the same, if nothing else is set."""

    def follow(self, ended: Ended) -> bool:
        """Whether there is anything else to ask, by the advice of a command that refused; it is asked then."""
        raise AssertionError(ended)

    def done(self) -> None:
        """Behind a command that ended well."""

    def take(self, name: str) -> Path:
        return Path(shutil.copytree(self.good / name, self.folder / name, symlinks=True))


class _Run(Case):
    """A command that makes a run, and may replace one."""

    command, name, result = "", "", ""

    def begin(self) -> None:
        self.run, values = self.folder / self.name, yaml.safe_load((self.good / f"{self.command}.yaml").read_text())
        recipe = self.folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(values | {"output_dir": str(self.run)}))
        self.plain = self.arguments = [self.command, str(recipe)]
        self.before = {}
        if self.draw.random() < 0.5:
            self.before = tree(self.take(self.name))
            self.plain = self.arguments = [*self.plain, "--overwrite"]

    def is_earlier(self) -> bool:
        manifest = self.run / "manifest.json"
        return manifest.exists() and manifest.read_bytes() == self.before.get("manifest.json")

    def check(self) -> None:
        run = Run(self.run)
        manifest = run.manifest()
        status = manifest.status if manifest else None
        if status == "complete":
            assert self.is_earlier() or verify(self.run).problems == []
        elif status:
            with pytest.raises(QftError):
                find_job(self.run, load_run(self.run, ()), ExportOptions(), View())
        if status != "complete" or self.is_earlier():
            places = [self.run, *self.run.glob("replaced-*")]
            for name, content in self.before.items():
                assert any((place / name).is_file() and (place / name).read_bytes() == content for place in places), (
                    name
                )
        if (self.run / self.result).exists():
            assert weights(self.run / self.result) == weights(self.good / self.name / self.result)
        if (self.run / "report.json").exists():
            json.loads((self.run / "report.json").read_text())

    def go_on(self) -> None:
        manifest = Run(self.run).manifest()
        begun = manifest is not None and not self.is_earlier()
        self.arguments = [*self.plain[:2], "--resume"] if begun else self.plain

    def follow(self, ended: Ended) -> bool:
        assert ended.code == 7, ended
        if "there is nothing to resume" in ended.told:  # the kill came behind the end
            return False
        assert "start anew with --overwrite" in ended.told or "use --resume, --overwrite" in ended.told, ended
        self.arguments = [*self.plain[:2], "--overwrite"]
        return True

    def done(self) -> None:
        assert verify(self.run).problems == []
        assert weights(self.run / self.result) == weights(self.good / self.name / self.result)
        assert leftovers(self.folder) == []


class _Train(_Run):
    command, name, result = "train", "run", "adapter"

    def done(self) -> None:
        super().done()
        assert read_report(self.run).loss == read_report(self.good / "run").loss
        assert (self.run / "report.html").read_text().rstrip().endswith("</html>")


class _Calibrate(_Run):
    command, name, result = "calibrate", "quantized", "model"

    def done(self) -> None:
        super().done()
        assert not (self.run / "work").exists()


class _Eval(Case):
    def begin(self) -> None:
        self.before = tree(self.take("evaluated")) if self.draw.random() < 0.5 else {}
        out = self.folder / "evaluated"
        self.arguments = ["eval", str(self.good / "run"), "--out", str(out), "--batch-size", "3"]

    def check(self) -> None:
        for name in ("eval.json", "report.html"):
            path = self.folder / "evaluated" / name
            assert path.exists() or name not in self.before
            if path.exists() and path.read_bytes() != self.before.get(name):
                self._require_whole(path)

    def _require_whole(self, path: Path) -> None:
        if path.suffix == ".html":
            assert path.read_text().rstrip().endswith("</html>")
            return
        found, wanted = (
            EvalDocument(**json.loads(each.read_text())) for each in (path, self.good / "evaluated" / path.name)
        )
        assert found.targets[0].perplexity == pytest.approx(wanted.targets[0].perplexity, rel=1e-5)

    def done(self) -> None:
        for name in ("eval.json", "report.html"):
            path = self.folder / "evaluated" / name
            assert path.read_bytes() != self.before.get(name)
            self._require_whole(path)
        assert leftovers(self.folder) == []


class _Registry(Case):
    """A command that changes a registry."""

    def begin(self) -> None:
        self.models = self.take("models")
        self.numbers = ["v1", "v2"]
        self.before = {name: tree(self.models / "m" / name) for name in self.numbers}

    def check(self) -> None:
        assert versions.problems(self.models, "m") == []
        assert {name: tree(self.models / "m" / name) for name in self.numbers} == self.before

    def done(self) -> None:
        self.check()
        assert leftovers(self.folder) == []


class _Export(_Registry):
    def begin(self) -> None:
        super().begin()
        self.exports = self.take("exports")
        asked = ["export", str(self.good / "run"), *TARGETS, "--out", str(self.exports), "--overwrite"]
        self.arguments = [*asked, "--register", "m", "--registry", str(self.models)]

    def check(self) -> None:
        super().check()
        for name in ("merged", "adapter"):
            found = self.exports / name
            if not found.exists():  # moved aside; the next command puts it back
                [found] = [old for old in self.exports.glob(f".{name}.qft-old-*") if any(old.iterdir())]
            assert weights(found) == weights(self.good / "exports" / name)
            record = record_of(found)
            assert record
            record.require_whole()

    def done(self) -> None:
        super().done()
        assert {path.name for path in self.exports.iterdir()} == {"merged", "adapter"}
        self.check()


class _Models(_Registry):
    def begin(self) -> None:
        super().begin()
        merged = str(self.good / "exports" / "merged")
        steps = [["add", "m", merged], ["promote", "m", "1"], ["rollback", "m"]]
        self.arguments = ["models", *self.draw.choice(steps), "--registry", str(self.models)]
        assert versions.find_shelf(self.models, "m").leads_to() == "v2"

    def check(self) -> None:
        super().check()
        shelf = versions.find_shelf(self.models, "m")
        assert shelf.leads_to() in ("v1", "v2")
        for number in shelf.numbers():
            assert shelf.manifest(f"v{number}").sha256

    def follow(self, ended: Ended) -> bool:
        """The kill came behind the step."""
        assert ended.code == 7, ended
        assert "is current already" in ended.told or "nothing was current before v1" in ended.told, ended
        return False

    def done(self) -> None:
        super().done()
        assert versions.find_shelf(self.models, "m").leads_to() == ("v2" if "add" in self.arguments else "v1")


CASES: dict[str, type[Case]] = {
    "train": _Train, "calibrate": _Calibrate, "eval": _Eval, "export": _Export, "models": _Models
}  # fmt: skip


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A model, rows and recipes."""
    folder = tmp_path / "good"
    folder.mkdir()
    saved(tiny_llama(), folder / "model")
    rows = write_jsonl(folder / "rows.jsonl", [chat(f"say {i}", f"it is {i} and {i * 7}") for i in range(24)])
    shared: dict[str, Any] = {"model": {"path": str(folder / "model"), "device": "cpu"}}
    shared["data"] = {"train": str(rows), "eval_fraction": 0.25}
    stages = [{"quant.mode": "8bit", "max_steps": 2}, {"quant.mode": "4bit", "max_steps": 2}]
    saves = {"stages": stages, "save_strategy": "steps", "save_steps": 1, "report_to": []}
    saves |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    recipes: dict[str, dict[str, Any]] = {
        "train": {"quant": {"preset": "finetune"}, "adapter": {"r": 4}, "train": saves, "output_dir": "run"},
        "calibrate": {"calibrate": {"engine": "rtn", "group_size": 32, "verify_samples": 4}, "output_dir": "quantized"},
    }
    for name, sections in recipes.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(shared | sections))
    return folder


@pytest.fixture
def forks(good: Path, tmp_path: Path) -> Iterator[Killer]:
    """What forks, once it has run each command to its end; the results are in `good`."""
    run, models = str(good / "run"), ["--registry", str(good / "models")]
    warm = [
        ["train", str(good / "train.yaml")],
        ["calibrate", str(good / "calibrate.yaml")],
        ["eval", run, "--out", str(good / "evaluated")],
        ["export", run, *TARGETS, "--out", str(good / "exports"), "--register", "m", *models],
        ["models", "promote", "m", "1", *models],
        ["models", "promote", "m", "2", *models],
    ]
    with killer(tmp_path, warm) as forking:
        yield forking


def chain(case: Case, forks: Killer, whole: Ended) -> Iterator[Ended]:
    """Kill the command, and those that go on from there, until one ends; yield what was killed."""
    case.begin()
    while True:
        moment: dict[str, Any] = {"after": case.draw.uniform(0, whole.seconds)}
        if case.draw.random() < 0.5:
            moment = {"change": case.draw.randint(1, whole.changes)}
        ended = forks.run(*case.arguments, **moment)
        if ended.code != KILLED:
            break
        yield ended
        case.check()
        case.go_on()
        if case.draw.random() < 0.5:
            ended = forks.run(*case.arguments)
            break
    while ended.code and case.follow(ended):
        ended = forks.run(*case.arguments)
    case.done()


def test_no_kill_loses_anything(good: Path, forks: Killer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, wholes, hits = tree(good), dict[str, Ended](), {name: Counter[str]() for name in CASES}
    wrong: list[str] = []
    seed = FROM
    while any(hit.total() < COUNT / len(CASES) for hit in hits.values()):
        name = [*CASES][seed % len(CASES)]
        if hits[name].total() >= COUNT / len(CASES):
            seed += 1
            continue
        folder = tmp_path / str(seed)
        folder.mkdir()
        case = CASES[name](good, folder, random.Random(f"{name} {seed}"))
        if name not in wholes:
            probe = CASES[name](good, tmp_path / "probe" / name, random.Random(1))
            probe.folder.mkdir(parents=True)
            probe.begin()
            wholes[name] = forks.run(*probe.arguments)
            assert wholes[name].code == 0, wholes[name]
            probe.done()
        try:
            for killed in chain(case, forks, wholes[name]):
                hits[name][killed.place] += 1
        except (AssertionError, QftError, OSError, ValueError) as error:
            wrong.append(f"{name} {seed}: {type(error).__name__}: {error}"[:3000])
        else:
            shutil.rmtree(folder)
        assert tree(good) == before, f"{name} {seed}"
        seed += 1
    with capsys.disabled():
        sys.stdout.writelines(f"{line}\n" for line in table(hits, len(wrong)))
    assert not wrong, "\n".join(wrong)


def table(hits: dict[str, Counter[str]], lost: int) -> Iterator[str]:
    yield f"\n{'command':<10} {'kills':>5}  where they hit"
    for name, places in hits.items():
        yield f"{name:<10} {places.total():>5}  {', '.join(f'{place} {n}' for place, n in places.most_common(8))}"
    yield f"{'all':<10} {sum(places.total() for places in hits.values()):>5}  lost: {lost}"
