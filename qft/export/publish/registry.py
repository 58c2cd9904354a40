"""An artifact -> the next version of a model in the registry."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qft.disk import require_free_space, same_disk
from qft.documents.export import ExportDocument, Registered
from qft.errors import RecipeError, RunError
from qft.recipe.schema import ExportSection
from qft.registry import add, facts_of, require_usable
from qft.run.folder import Run


@dataclass(frozen=True)
class Registration:
    """Where versions are added."""

    registry: Path
    name: str

    def require_possible(self, out: Path, targets: Iterable[str], needed: int) -> None:
        """Raise RecipeError or RunError for what would stop `register` once artifacts of `needed` bytes, for which
        there is room, are in OUT/TARGET."""
        require_usable(self.registry, self.name)
        for final in (out / target for target in targets):
            if self.registry.resolve().is_relative_to(final.resolve()):
                raise RunError(f"{self.registry}: lies in {final}, which is to be written; give another --registry")
        shared = same_disk(self.registry, out)
        what = "the export with its copy in the registry" if shared else "the copy of the export"
        require_free_space(self.registry, needed * (2 if shared else 1), what)


def find_registration(section: ExportSection, name: str | None, registry: Path | None) -> Registration | None:
    """What the command line asks, or else the recipe. Raises RecipeError for a registry without a name."""
    asked = section.register_as if name is None else name
    if asked is None:
        if registry is not None:
            raise RecipeError("--registry: nothing is to be added; give --register NAME, or leave it out")
        return None
    return Registration(registry or Path(section.registry or "models"), asked)


def register(registration: Registration, run: Run, document: ExportDocument) -> Registered:
    """Copy the artifact in, and say which version it became. Raises RunError if it cannot be copied."""
    artifact = Path(document.path)
    number = add(registration.registry, registration.name, artifact, facts_of(artifact, run.folder))
    return Registered(name=registration.name, version=number, registry=str(registration.registry))
