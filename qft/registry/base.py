"""The base that versions were made from: never copied, referenced by what its files hash to."""

import hashlib
import importlib.util
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from qft.documents.manifest import Base
from qft.documents.registry import VersionManifest
from qft.errors import QftError, RunError
from qft.files import now, write_json
from qft.registry.shelf import MANIFEST, ORIGINAL, Shelf


def base_entry(base: Base | None, of: str) -> str:
    """original-HASH for the base of version `of`. Raises RunError if its hashes were not recorded."""
    if base is None or not base.sha256:
        raise RunError(f"{of}: the base was not recorded; add the version with --run, or with its export.json")
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(base.sha256.items()))
    return f"{ORIGINAL}-{hashlib.sha256(lines.encode()).hexdigest()[:12]}"


def record_base(shelf: Shelf, entry: str, base: Base) -> None:
    """Write down what the base is, once. Call it under the lock."""
    final = shelf.folder / entry
    if os.path.lexists(final):
        if _is_record(shelf, entry):
            return
        shelf.move_aside(final)
    temporary = Path(tempfile.mkdtemp(dir=shelf.folder, prefix=f".{entry}."))
    manifest = VersionManifest(kind="original", created=now(), base=base)
    write_json(temporary / MANIFEST, manifest.model_dump(mode="json"))
    (temporary / MANIFEST).chmod(0o444)
    temporary.chmod(0o755)
    os.rename(temporary, final)


def _is_record(shelf: Shelf, entry: str) -> bool:
    with suppress(QftError):
        return base_entry(shelf.manifest(entry).base, entry) == entry
    return False


def base_file(base: Base, name: str) -> Path | None:
    """Where one file of the base is on this machine; None if it is not. Asks no network."""
    path = base.path
    if path.startswith("package:"):
        package, _, inner = path.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        folders = list(spec.submodule_search_locations or ()) if spec else []
        places = [(Path(folder) / inner).parent / name for folder in folders]
    elif Path(path).is_absolute():
        places = [(Path(path).parent if path.endswith(".gguf") else Path(path)) / name]
    else:
        from huggingface_hub import try_to_load_from_cache

        cached = None
        with suppress(ValueError):  # no name of a repository
            cached = try_to_load_from_cache(path, name, revision=base.commit)
        places = [Path(cached)] if isinstance(cached, str) else []
    return next((file for file in places if file.is_file()), None)
