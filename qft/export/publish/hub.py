"""A proven artifact -> one commit of a repository on the hub, without the paths of this machine.

What is uploaded lies in OUT/TARGET.hub until it has arrived: links to the artifact's files, and those that name a path
written anew. So what an interrupted upload leaves can be pushed as it is.
"""

import json
import os
import shlex
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # no __all__ there

from qft.documents.export import ExportDocument, Pushed
from qft.errors import MissingError, QftError, RecipeError, first_line
from qft.export.card import without_folders
from qft.files import atomic_folder, sha256, write_json, write_text

MODEL_FILES = (".safetensors", ".json", ".jinja")
"""Endings of what a loader could take for part of the model. Such files of an earlier one must not stay beside it."""


@dataclass(frozen=True)
class Repository:
    """A model repository that one may write to."""

    name: str
    private: bool
    """Whether it is to be private if it has to be made."""
    files: tuple[str, ...] = ()
    """What it holds already."""

    def stale(self, uploaded: Sequence[str]) -> list[str]:
        """Model files at its top, where loaders look, that it holds and that are not uploaded again."""
        top = (name for name in self.files if "/" not in name)
        return [name for name in top if name.endswith(MODEL_FILES) and name not in uploaded]


def require_pushable(name: str | None, *, private: bool, gate: bool, targets: Sequence[str]) -> None:
    """Raise RecipeError for what the command line must not ask of a push, MissingError where the hub is switched off.
    Asks no network."""
    if name is None:
        if private:
            raise RecipeError("--private: nothing is pushed; give --push-to-hub OWNER/NAME, or leave it out")
        return
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise RecipeError(f"--push-to-hub {name}: {first_line(error)}") from None
    if "/" not in name:
        raise RecipeError(f"--push-to-hub {name}: write OWNER/NAME; the owner is you or your organization")
    if not gate:
        raise RecipeError("--push-to-hub: only what passed its gate is pushed; leave --no-gate out")
    if len(targets) > 1:
        raise RecipeError(f"--push-to-hub {name}: holds one target, not {', '.join(targets)}; push them one by one")
    if constants.HF_HUB_OFFLINE:
        raise MissingError(f"--push-to-hub {name}: the hub is switched off (HF_HUB_OFFLINE); unset that to push")


def find_repository(name: str, *, private: bool) -> Repository:
    """Ask the hub whether one may write to `name`, and what is there. Raises MissingError if the hub does not answer or
    nobody is logged in, RecipeError for a repository that is another's, or public where `private` is asked."""
    api = HfApi()
    if get_token() is None:
        raise MissingError(f"--push-to-hub {name}: you are not logged in; run `hf auth login`, or set HF_TOKEN")
    info = None
    try:
        user = api.whoami()
        with suppress(RepositoryNotFoundError):
            info = api.model_info(name)
    except Exception as error:  # those of the HTTP library too, which is another one with each version of the client
        raise MissingError(f"--push-to-hub {name}: the hub cannot be asked: {_reason(error)}") from error
    _require_writer(name, user)
    if info is None:
        return Repository(name, private)
    if private and info.private is False:
        text = "is there already and public, so --private cannot be; take another name"
        raise RecipeError(f"--push-to-hub {name}: {text}")
    return Repository(name, private, tuple(sibling.rfilename for sibling in info.siblings or ()))


def _require_writer(name: str, user: dict[str, Any]) -> None:
    owners = [user["name"], *(organization["name"] for organization in user.get("orgs", ()))]
    if name.split("/")[0] not in owners:
        raise RecipeError(f"--push-to-hub {name}: you are logged in as {user['name']}; own are: {', '.join(owners)}")
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise MissingError(f"--push-to-hub {name}: the token may only read; log in with one that may write")


def push(repository: Repository, document: ExportDocument) -> Pushed:
    """Upload an artifact that passed its gate as one commit, and say which. Raises QftError with the command that
    pushes it again; the artifact is whole all the same."""
    folder = _staged(document, repository.name)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    stale = repository.stale(names)
    added = [CommitOperationAdd(name, (folder / name).resolve()) for name in names]
    removed = [CommitOperationDelete(name) for name in stale]
    api = HfApi()
    try:
        # None leaves it to what the organization has set.
        api.create_repo(repository.name, private=True if repository.private else None, exist_ok=True)
        # upload_folder would split a large model into several commits, of which each but the last is half a model.
        commit = api.create_commit(repository.name, [*removed, *added], commit_message=_message(document))
    except Exception as error:  # as in find_repository
        raise QftError(_not_pushed(repository, document, folder, stale, error)) from error
    shutil.rmtree(folder)
    return Pushed(repository=repository.name, commit=commit.oid, url=str(commit.commit_url))


def _message(document: ExportDocument) -> str:
    checks = {check.name: check.value for check in document.gate.checks}
    figures = [f"{name} {checks[name]:.4g}" for name in ("kl", "top1_agreement") if name in checks]
    return f"{document.target}, exported by qft: gate passed ({', '.join(figures)})"


def _not_pushed(
    repository: Repository, document: ExportDocument, folder: Path, stale: Sequence[str], error: Exception
) -> str:
    options = ["--private"] if repository.private else []
    options += [word for name in stale for word in ("--delete", name)]
    again = shlex.join(["hf", "upload", repository.name, str(folder), *options])
    return (
        f"{document.path}: passed its gate and is kept, but was not pushed to {repository.name}: {_reason(error)}. "
        f"Push it again: {again}"
    )


def _reason(error: BaseException) -> str:
    """The client says of a file's upload only that it failed, and of the rest why."""
    wrapped = isinstance(error, RuntimeError) and error.__cause__
    return first_line(wrapped or error).rstrip(".")


def staging_folder(artifact: Path) -> Path:
    """Where what is to be uploaded lies until it has arrived."""
    return artifact.with_name(f"{artifact.name}.hub")


def _staged(document: ExportDocument, repository: str) -> Path:
    """The filled staging folder."""
    artifact = Path(document.path)
    with atomic_folder(staging_folder(artifact)) as folder:
        _fill(folder, artifact, document, repository)
    return staging_folder(artifact)


def _fill(folder: Path, artifact: Path, document: ExportDocument, repository: str) -> None:
    """Links have the folder's siblings in them, and so hold when it is renamed."""
    for path in artifact.rglob("*"):
        if path.is_file():
            link = folder / path.relative_to(artifact)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(path, link.parent))
    # The card loads from the repository, and not from a folder.
    before, heading, usage = (artifact / "README.md").read_text("utf-8").partition("\n## Loading\n")
    write_text(folder / "README.md", before + heading + usage.replace("FOLDER", repository))
    digests = _rewrite_adapter_config(folder)
    write_json(folder / "export.json", _without_paths(document, digests))


def _rewrite_adapter_config(folder: Path) -> dict[str, str]:
    """Leave of a base in a folder of this machine its name. Returns the SHA-256 of what was written anew."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return {}
    config = json.loads(path.read_text("utf-8"))
    base = without_folders(config["base_model_name_or_path"])
    if base == config["base_model_name_or_path"]:
        return {}
    write_json(path, config | {"base_model_name_or_path": base})
    return {path.name: sha256(path)}


def _without_paths(document: ExportDocument, digests: dict[str, str]) -> dict[str, Any]:
    told = document.model_dump(mode="json", exclude={"registered", "pushed"})
    names = {field: Path(told[field]).name for field in ("path", "run")}
    base = told["base"] | {"path": without_folders(told["base"]["path"])}
    return told | names | {"base": base, "sha256": told["sha256"] | digests}
