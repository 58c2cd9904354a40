"""`qft models`: versions of exported models, which of them is current, and the way back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qft.cli.shell import AsJson, Debug, messages, register, tell
from qft.errors import GateError, MissingError, QftError

if TYPE_CHECKING:
    from qft.documents.registry import VersionManifest
    from qft.registry import Shelf, Which

HELP = "Keep versions of exported models: promote one, go back to another."
models = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help=HELP)

Registry = Annotated[Path, typer.Option(metavar="FOLDER", help="Folder of the registry.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="A model of the registry.", show_default=False)]
Version = Annotated[str, typer.Argument(metavar="VERSION", help="A number, or current.", show_default=False)]
Reason = Annotated[str, typer.Option(help="Why, for the history.", show_default=False)]
MODELS = Path("models")
TO = "By default what was current before."
WHICH = "A number, current or original; by default all."


def add(
    name: Name,
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Folder of an export.", show_default=False)],
    run: Annotated[Path | None, typer.Option(help="The run that it comes from.", show_default=False)] = None,
    registry: Registry = MODELS,
    reason: Reason = "",
    debug: Debug = False,
) -> None:
    """Copy an artifact in as the next version; it does not become current."""
    with messages(debug):
        from qft import registry as versions

        number = versions.add(registry, name, artifact, versions.facts_of(artifact, run), reason=reason)
        shelf = versions.find_shelf(registry, name)
        gate = shelf.manifest(f"v{number}").gate
        forced = "" if gate and gate.passed else " --force (no gate has passed it)"
        typer.echo(f"{name} v{number} added; next: {shelf.say('promote', str(number))}{forced}")
        _warn(registry, name)


def list_models(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Only this model.", show_default=False)] = None,
    registry: Registry = MODELS,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show every version, its gate, and which one is current."""
    with messages(debug):
        from qft import registry as versions
        from qft.documents.registry import ModelVersions, RegistryListing
        from qft.views.terminal.models import render_list

        models = {}
        for each in [name] if name else versions.names(registry):
            shelf = versions.find_shelf(registry, each)
            found = ((f"v{number}", _readable(shelf, f"v{number}")) for number in shelf.numbers())
            manifests = {entry: manifest for entry, manifest in found if manifest}
            problems = versions.damages(shelf)
            models[each] = ModelVersions(current=shelf.leads_to(), versions=manifests, problems=problems)
        tell(RegistryListing(registry=str(registry), models=models), render_list, as_json=as_json)


def show(
    name: Name, version: Version = "current", registry: Registry = MODELS, as_json: AsJson = False, debug: Debug = False
) -> None:
    """Show one version: where it comes from, how good it is, and the model's history."""
    with messages(debug):
        from qft.documents.registry import VersionDetails
        from qft.registry import damages, find_shelf
        from qft.views.terminal.models import render_version

        shelf = find_shelf(registry, name)
        entry = _entry(registry, name, version)
        details = VersionDetails(
            name=name,
            entry=entry,
            current=shelf.leads_to(),
            path=str(shelf.folder / entry),
            manifest=_readable(shelf, entry),
            history=shelf.read_history().events,
            problems=damages(shelf),
        )
        tell(details, render_version, as_json=as_json)


def diff(
    name: Name, a: Version, b: Version, registry: Registry = MODELS, as_json: AsJson = False, debug: Debug = False
) -> None:
    """Compare two versions: recipe fields, data, base, scores, bytes and gate figures."""
    with messages(debug):
        from qft import registry as versions
        from qft.documents.registry import VersionComparison
        from qft.views.terminal.models import render_diff

        entries = [_entry(registry, name, text) for text in (a, b)]
        rows = versions.diff(*(versions.find_shelf(registry, name).manifest(entry) for entry in entries))
        tell(VersionComparison(name=name, a=entries[0], b=entries[1], rows=rows), render_diff, as_json=as_json)


def promote(
    name: Name,
    version: Annotated[str, typer.Argument(metavar="VERSION", help="A number.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Although its gate did not pass; recorded.")] = False,
    registry: Registry = MODELS,
    reason: Reason = "",
    debug: Debug = False,
) -> None:
    """Make a version current, once its files are found unchanged and its gate passed."""
    with messages(debug):
        from qft import registry as versions

        number = _number(version)
        versions.promote(registry, name, number, reason=reason, force=force)
        typer.echo(f"{name}: v{number} is current: {registry / name / 'current' / 'artifact'}")
        _warn(registry, name)


def rollback(
    name: Name,
    to: Annotated[str | None, typer.Option(metavar="VERSION|original", help=TO)] = None,
    force: Annotated[bool, typer.Option("--force", help="Although it cannot be accepted; recorded.")] = False,
    registry: Registry = MODELS,
    reason: Reason = "",
    debug: Debug = False,
) -> None:
    """Go back: to the version before, to any other, or to the base that the current one was made from."""
    with messages(debug):
        from qft import registry as versions

        target: Which = None if to is None else "original" if to == "original" else _number(to)
        entry = versions.rollback(registry, name, target, reason=reason, force=force)
        manifest = _readable(versions.find_shelf(registry, name), entry)
        base = manifest and manifest.base
        path = base.path if base and not entry.startswith("v") else registry / name / "current" / "artifact"
        typer.echo(f"{name}: {entry} is current: {path}")
        _warn(registry, name)


def verify(
    name: Name,
    version: Annotated[str | None, typer.Argument(metavar="[VERSION]", help=WHICH, show_default=False)] = None,
    registry: Registry = MODELS,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Hash every file, and name what is missing, changed or extra; exit code 4 if anything is."""
    with messages(debug):
        from qft import registry as versions
        from qft.documents.registry import VersionVerification
        from qft.views.terminal.models import render_findings

        which = _which(registry, name, version)
        findings = versions.inspect(registry, name, which)
        sentences = [text for finding in findings for text in finding.sentences()]
        wrong = sentences if version else versions.problems(registry, name, findings)
        document = VersionVerification(name=name, valid=not wrong, entries=findings, problems=wrong)
        tell(document, render_findings, as_json=as_json)
        if wrong:
            raise GateError("\n".join(f"{name}: {text}" for text in wrong))


def _readable(shelf: Shelf, entry: str) -> VersionManifest | None:
    """None for one that is damaged, which `damages` tells. Raises MissingError if there is no such version."""
    try:
        return shelf.manifest(entry)
    except MissingError:
        raise
    except QftError:
        return None


def _warn(registry: Path, name: str) -> None:
    """Tell what is still damaged after a change that it did not stop."""
    from qft.registry import damages, find_shelf

    for text in damages(find_shelf(registry, name)):
        typer.echo(f"note: {text}", err=True)


def _number(text: str) -> int:
    digits = text.removeprefix("v")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 18 and int(digits)):
        raise typer.BadParameter(f"{text} is no version; give a number, as `qft models list` shows them")
    return int(digits)


def _entry(registry: Path, name: str, text: str) -> str:
    """vN, or what is current, by the history if `current` is damaged. Raises MissingError before the first promote."""
    from qft.registry import find_shelf

    if text != "current":
        return f"v{_number(text)}"
    shelf = find_shelf(registry, name)
    current = shelf.leads_to() or shelf.read_history().recorded
    if current is None:
        raise MissingError(f"{name}: nothing is current yet; give a version's number")
    return current


def _which(registry: Path, name: str, text: str | None) -> Which:
    if text is None:
        return None
    if text == "original":
        return "original"
    entry = _entry(registry, name, text)
    return int(entry[1:]) if entry.startswith("v") else "original"


register(models, add, list_models, show, diff, promote, rollback, verify)
