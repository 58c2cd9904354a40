"""Hub datasets, by their id, configuration, split and revision, and the commit that their rows are of."""

import re
from pathlib import Path

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError

from qft.errors import DataError, MissingError, first_line
from qft.recipe import Source

COMMIT = re.compile("[0-9a-f]{40}")
REMEDIES = {
    "Unknown split": "set the source's split",
    "Config name is missing": "set the source's name",
    "BuilderConfig": "set the source's name",
    "Revision": "set the source's revision",
    "Couldn't reach": "try again, or set HF_HUB_OFFLINE=1 to use what is on this machine",
}
"""By what the message of `datasets` begins with."""


def fetched(source: Source) -> tuple[Dataset, str | None]:
    """The rows, and their commit where it is known. Raises MissingError for what is not there, DataError for what
    cannot be read."""
    try:
        found = load_dataset(source.path, source.name, split=source.split, revision=source.revision)
    except DatasetGenerationError as error:
        text = first_line(error.__cause__ or error)
        raise DataError(f"{source.path}: the hub dataset cannot be read: {text}") from error
    except Exception as error:  # datasets and huggingface_hub raise a dozen unrelated types here
        said = " ".join(str(error).partition("\nExample")[0].split()).rstrip(".") or type(error).__name__
        remedy = next((f": {remedy}" for begins, remedy in REMEDIES.items() if said.startswith(begins)), "")
        text = f"{source.path}: not a local file, and the hub dataset cannot be loaded: {said}{remedy}"
        raise MissingError(text) from error
    return found, _commit(found)


def _commit(rows: Dataset) -> str | None:
    """`datasets` keeps rows in a folder of that name."""
    folders = {Path(each["filename"]).parent.name for each in rows.cache_files}
    name = folders.pop() if len(folders) == 1 else ""
    return name if COMMIT.fullmatch(name) else None
