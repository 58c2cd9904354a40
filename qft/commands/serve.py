"""`qft serve`: what is to be served, found and proven, and the command line of the server that fits it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from shlex import join

from qft.documents.export import export_in
from qft.errors import GateError, MissingError, RecipeError
from qft.registry import find_shelf
from qft.run.folder import Run
from qft.serving.command import Model, ServingEngine, Start, Where, fitting, start

Tell = Callable[[str], None]
LEFT = (".failed", ".hub")
"""Of folders beside an export that are none."""


@dataclass(frozen=True)
class ServeOptions:
    """What the command line says."""

    to: str | None = None
    """Which export of a run."""
    engine: ServingEngine | None = None
    """None: the one that fits."""
    registry: Path = Path("models")
    version: str = "current"
    """Of a model of the registry: a number, or current."""
    name: str | None = None
    where: Where = field(default_factory=Where)
    engine_python: Path | None = None
    """Beside which the engine's program lies; None: on the search path."""
    trust_remote_code: bool = False
    force: bool = False
    """Although no gate has passed it."""


def find_start(target: str, options: ServeOptions, tell: Tell) -> Start:
    """How the server of `target` is started. Raises MissingError for what is not there, GateError for what no gate
    has passed, RecipeError for what the engine does not serve."""
    model = find_model(target, options, tell)
    found = start(options.engine or fitting(model.path), model, options.where)
    for note in found.notes:
        tell(note)
    return found


def find_model(target: str, options: ServeOptions, tell: Tell) -> Model:
    """What of `target` is served. Raises MissingError for what is not there, GateError for what no gate has passed."""
    path, dtype = _proven(_found(target, options), options, tell)
    return Model(path.resolve(), options.name or _name(target), dtype, options.trust_remote_code)


def shown(found: Start) -> str:
    """The Modelfile, or else the command line, for a shell."""
    return found.modelfile.rstrip("\n") if found.modelfile else join(found.command)


def run(found: Start, options: ServeOptions) -> None:
    """Become the server. Raises MissingError if its program is not installed, RecipeError for Ollama, which is a
    service already."""
    if found.modelfile:
        raise RecipeError("--run: Ollama is a service of its own; write what is printed as Modelfile, and create it")
    program = found.command[0]
    beside = os.path.abspath(options.engine_python.expanduser().with_name(program)) if options.engine_python else None
    path = shutil.which(beside or program)
    if path is None:
        raise MissingError(f"{beside or program}: is not installed; name an environment that has it by --engine-python")
    os.execv(path, found.command)  # noqa: S606  # the program that the user asked for, and no shell


def _found(target: str, options: ServeOptions) -> Path:
    """Folder or file of an artifact or a model. A folder of that name comes before a model of the registry."""
    path = Path(target)
    if not path.exists():
        if len(path.parts) > 1:  # a name has none
            raise MissingError(f"{target}: is not there")
        return _of_registry(target, options)
    if options.version != "current":
        raise RecipeError(f"--version: {path} is there, and is no model of the registry; leave it out")
    if Run(path).manifest():
        return _of_run(path, options.to)
    if options.to:
        raise RecipeError(f"--to: says which export of a run, and {path} is none; leave it out")
    return path


def _of_registry(name: str, options: ServeOptions) -> Path:
    shelf = find_shelf(options.registry, name)
    entry = shelf.leads_to() if options.version == "current" else f"v{options.version.removeprefix('v')}"
    if entry is None:
        raise MissingError(f"{name}: nothing is current yet; {shelf.say('promote', 'VERSION')}, or give --version")
    shelf.manifest(entry)
    artifact = shelf.folder / entry / "artifact"
    if not artifact.is_dir():
        raise MissingError(f"{name}: {entry} has no files here; give --version")
    return artifact


def _of_run(run: Path, to: str | None) -> Path:
    """The run's export; the only one, unless `to` names it."""
    exports = {mark.target: folder for folder in _exports(run) if (mark := export_in(folder))}
    there = ", ".join(sorted(exports)) or "none"
    if to and to not in exports:
        raise MissingError(f"{run}: has no export {to} (there: {there}); `qft export {run} --to {to}` makes it")
    if not exports and Run(run).full_model.is_dir():
        return Run(run).full_model
    if not exports:
        raise MissingError(f"{run}: nothing of it is exported; `qft export {run} --to merged` makes what can be served")
    if to is None and len(exports) > 1:
        raise RecipeError(f"{run}: has several exports ({there}); say which by --to, or name its folder")
    return exports[to] if to else next(iter(exports.values()))


def _exports(run: Path) -> list[Path]:
    return sorted(path for path in run.glob("export/*") if not path.name.startswith(".") and path.suffix not in LEFT)


def _proven(folder: Path, options: ServeOptions, tell: Tell) -> tuple[Path, str | None]:
    """The file or folder that an engine is given, and its dtype. Raises GateError for what did not pass its gate."""
    mark = export_in(folder if folder.is_dir() else folder.parent)
    if mark is None:
        tell(f"{folder} is no export of qft: nothing is known of it but its files")
        return _model(folder), None
    if not mark.passed:
        why = "was switched off" if mark.passed is None else "refused it"
        if not options.force:
            raise GateError(f"{folder}: its gate {why}; export it again, or give --force")
        tell(f"{folder}: its gate {why}")
    return _model(folder), mark.dtype


def _model(path: Path) -> Path:
    """The GGUF file of a folder that holds one and no other model; else what it is."""
    if path.is_file() and path.suffix != ".gguf":
        raise RecipeError(f"{path}: is neither a folder nor a GGUF file")
    if path.is_file() or any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        return path
    files = sorted(path.glob("*.gguf"))
    if len(files) != 1:
        raise MissingError(f"{path}: holds no model (config.json, adapter_config.json or one .gguf file)")
    return files[0]


def _name(target: str) -> str:
    """By which requests name the model: the run's, the registry's or the file's."""
    path = Path(target).resolve()
    parts = path.parts
    if path.parent.name == "export" and len(parts) > 2:
        return f"{parts[-3]}-{path.name}"
    return path.stem if path.suffix == ".gguf" else path.name
