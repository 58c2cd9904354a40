"""The command line that starts an engine's own server on one model; nothing is started here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from shlex import join
from typing import Any, Literal

from qft.errors import MissingError, ModelError, RecipeError, first_line
from qft.files import read_json_text
from qft.serving.vllm import rank_limit, rank_of

ServingEngine = Literal["vllm", "llama.cpp", "ollama"]
ROOMS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx", "seq_length")
"""Names by which configurations tell how many tokens a model is built for."""
TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class Model:
    """What is to be model."""

    path: Path
    """A folder of safetensors, an adapter's folder, or a GGUF file."""
    name: str
    """By which it is asked for."""
    dtype: str | None = None
    """Of weights and activations; None: what its configuration says."""
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Where:
    """How it is model."""

    host: str | None = None
    port: int | None = None
    """None, of both: 127.0.0.1, port 8000."""
    context: int | None = None
    """Tokens of the longest request with its answer. None: what the model was built for."""
    more: tuple[str, ...] = ()
    """Options of the server's own."""

    @property
    def options(self) -> list[str]:
        return ["--host", self.host or "127.0.0.1", "--port", str(self.port or 8000), *self.more]


@dataclass(frozen=True)
class Start:
    """How a server is started."""

    command: list[str]
    """A program and its arguments."""
    modelfile: str | None = None
    """For Ollama, which the command reads from a file."""
    notes: list[str] = field(default_factory=list)
    """What its user should know."""


def start(engine: ServingEngine, model: Model, where: Where) -> Start:
    """Raises RecipeError for what the engine does not serve, MissingError or ModelError for what is not there."""
    if engine == "vllm":
        return _vllm(model, where)
    if model.path.suffix != ".gguf":
        raise RecipeError(f"{model.path}: {engine} serves GGUF files alone; export --to gguf, or serve it by vllm")
    if model.trust_remote_code:
        raise RecipeError(f"--trust-remote-code: a GGUF file has no code, and {engine} runs none; leave it out")
    return _llamacpp(model, where) if engine == "llama.cpp" else _ollama(model, where)


def fitting(path: Path) -> ServingEngine:
    """The engine that serves a thing of this kind without more."""
    return "llama.cpp" if path.suffix == ".gguf" else "vllm"


def _vllm(model: Model, where: Where) -> Start:
    if model.path.suffix == ".gguf":
        raise RecipeError(f"{model.path}: is a GGUF file; serve it by llama.cpp or ollama, or export --to merged")
    is_adapter = (model.path / "adapter_config.json").is_file()
    base, words = _adapter(model) if is_adapter else (str(model.path), ["--served-model-name", model.name])
    template, notes = model.path / TEMPLATE, []
    if template.is_file():
        words += ["--chat-template", str(template)]
    elif not _has_template(model.path):
        notes.append("it has no chat template: ask /v1/completions, for /v1/chat/completions has nothing to render by")
    words += ["--dtype", model.dtype] if model.dtype else []
    words += ["--trust-remote-code"] if model.trust_remote_code else []
    room = built_for(Path(base)) if Path(base).is_dir() else None
    words += _context(where.context, room, model.path, "--max-model-len")
    return Start(["vllm", "serve", base, *words, *where.options], notes=notes)


def _adapter(model: Model) -> tuple[str, list[str]]:
    """The base that an adapter names, and how it is put on it."""
    config = read_config(model.path / "adapter_config.json")
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base:
        raise ModelError(f"{model.path}: its adapter_config.json names no base; export --to merged")
    if base.startswith("package:") or base.endswith(".gguf"):
        raise RecipeError(f"{model.path}: its base is a GGUF file ({base}), on which vLLM puts none; export merged")
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise MissingError(f"{model.path}: its base {base} is not there")
    lora = ["--enable-lora", "--lora-modules", f"{model.name}={model.path}"]
    rank = ["--max-lora-rank", str(rank_limit(rank_of(config)))]
    pinned = ["--revision", revision] if revision else []
    own = ["--tokenizer", str(model.path)] if (model.path / "tokenizer_config.json").is_file() else []
    return base, [*pinned, *own, *lora, *rank]


def _llamacpp(model: Model, where: Where) -> Start:
    words = ["-m", str(model.path), "--alias", model.name, "--jinja"]
    context = _context(where.context, gguf_room(model.path), model.path, "--ctx-size")
    return Start(["llama-server", *words, *context, *where.options])


def _ollama(model: Model, where: Where) -> Start:
    """Ollama's own default is a context of a few thousand tokens, whatever the model."""
    if where.host or where.port or where.more:
        raise RecipeError("--host, --port and options of a server: Ollama is told them elsewhere; leave them out")
    beside = model.path.parent / "Modelfile"
    if not beside.is_file():
        raise MissingError(f"{beside}: does not exist; `qft export --to gguf` writes it beside the file")
    text = beside.read_text("utf-8").replace(f"FROM ./{model.path.name}", f"FROM {model.path}", 1)
    context = _context(where.context, gguf_room(model.path), model.path, "PARAMETER num_ctx")
    text += "".join([" ".join(context), "\n"] if context else [])
    command = ["ollama", "create", model.name, "-f", "Modelfile"]
    return Start(command, text, [f"write it as Modelfile, then: {join(command)}"])


def _context(asked: int | None, room: int | None, path: Path, option: str) -> list[str]:
    """Raises RecipeError for more than the model was built for."""
    if asked and room and asked > room:
        raise RecipeError(f"--context {asked}: {path} is built for {room} tokens; give that or less")
    number = asked or room
    return [option, str(number)] if number else []


def built_for(folder: Path) -> int | None:
    """Tokens that a model is built for, by its config.json; None if that does not say."""
    config = read_config(folder / "config.json")
    text = config.get("text_config")
    places = [text, config] if isinstance(text, dict) else [config]
    found = (place.get(name) for place in places for name in ROOMS)
    return next((number for number in found if isinstance(number, int) and number > 0), None)


def gguf_room(file: Path) -> int | None:
    """The same of a GGUF file, by its header."""
    from gguf import GGUFReader

    try:
        fields = GGUFReader(file).fields
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ModelError(f"{file}: is no GGUF file that can be read: {first_line(error)}") from error
    found = (one for name, one in fields.items() if name.endswith(".context_length"))
    return next((int(one.parts[one.data[0]][0]) for one in found), None)


def _has_template(folder: Path) -> bool:
    path = folder / "tokenizer_config.json"
    told = path.is_file() and bool(read_config(path).get("chat_template"))
    return told or (folder / "additional_chat_templates").is_dir()


def read_config(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise MissingError(f"{path}: does not exist")
    try:
        found = read_json_text(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path}: is no JSON object")
    return found
