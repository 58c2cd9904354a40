"""A quantizer of the user's own: the Python file that quant.plugin names, run because a recipe names it."""

import hashlib
import importlib.abc
import importlib.util
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as CONFIGS
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as QUANTIZERS

from qft.errors import MissingError, ModelError
from qft.files import require_regular

REGISTERED: dict[str, tuple[str, type[Any], type[Any]]] = {}
"""Name, config class and quantizer class of each file run in this process, by the file's SHA-256."""


@dataclass(frozen=True)
class Plugin:
    """A quantizer that a recipe brings."""

    path: str
    sha256: str
    """Of the file's bytes, as they were run."""
    method: str
    """The quant_method that it registers."""

    def activate(self) -> None:
        """Make `method` mean this file to transformers: two versions of one quantizer can be compared in a process."""
        CONFIGS[self.method], QUANTIZERS[self.method] = REGISTERED[self.sha256][1:]

    def config(self, skip: list[str]) -> dict[str, Any]:
        """Its quantization config as plain values; layers of the names `skip` stay unquantized."""
        config: dict[str, Any] = REGISTERED[self.sha256][1](modules_to_not_convert=skip).to_dict()
        return config

    def untrainable(self, quantization: dict[str, Any]) -> str | None:
        """Why adapters cannot be trained on an unquantized model that it quantizes; None if they can."""
        reason = f"its quantizer says that adapters cannot be trained on {self.method}"
        return self._unless(lambda quantizer: quantizer.is_trainable, quantization, reason)

    def unserializable(self, quantization: dict[str, Any]) -> str | None:
        """Why a model that it quantizes cannot be saved; None if it can."""
        reason = f"its quantizer says (is_serializable) that {self.method} cannot be saved"
        return self._unless(lambda quantizer: quantizer.is_serializable(), quantization, reason)

    def _unless(self, able: Callable[[Any], bool], quantization: dict[str, Any], reason: str) -> str | None:
        """`reason`, or why that cannot be told; None if its quantizer is `able`."""
        _, config_class, quantizer_class = REGISTERED[self.sha256]
        try:
            return None if able(quantizer_class(config_class.from_dict(quantization), pre_quantized=False)) else reason
        except Exception as error:
            return f"its quantizer cannot be used here: {_in_a_line(error)}"

    def require_layers(self, model: nn.Module) -> None:
        """Raise ModelError if it has put nothing into the loaded `model` that peft and qft can work with."""
        if not any(isinstance(module, nn.Linear) and hasattr(module, "dequantize") for module in model.modules()):
            raise ModelError(
                f"quant.plugin: {self.path}: has quantized no layer: the model holds no subclass of torch.nn.Linear "
                "with a dequantize() method after loading, which is what LoRA is put on and errors are measured of"
            )


def load_plugin(path: Path) -> Plugin:
    """Run the file, unless its content has been run before. Raises MissingError, or ModelError for what it lacks."""
    try:
        source = require_regular(path).read_bytes()
    except OSError as error:
        raise MissingError(f"quant.plugin: {path}: cannot be read: {error.strerror}") from None
    digest = hashlib.sha256(source).hexdigest()
    if digest not in REGISTERED:
        REGISTERED[digest] = _register(path, source, f"qft_plugin_{digest[:16]}")
    plugin = Plugin(str(path), digest, REGISTERED[digest][0])
    plugin.activate()
    return plugin


def is_known(method: str) -> bool:
    """Whether transformers itself has a quantizer of this name, rather than a plugin or nobody."""
    return method in CONFIGS and method not in {name for name, _, _ in REGISTERED.values()}


def _register(path: Path, source: bytes, module: str) -> tuple[str, type[Any], type[Any]]:
    """Run `source` and take what it registers with transformers, whose registries are left as they were."""
    registries: tuple[dict[str, type[Any]], ...] = (CONFIGS, QUANTIZERS)
    before = [dict(registry) for registry in registries]
    for name, _, _ in REGISTERED.values():  # else another version of a quantizer could not take its name
        for registry in registries:
            registry.pop(name, None)
    without_plugins = [dict(registry) for registry in registries]
    try:
        _run(path, source, module)
        pairs = zip(registries, without_plugins, strict=True)
        added = [{name: made for name, made in now.items() if name not in old} for now, old in pairs]
    finally:
        for registry, old in zip(registries, before, strict=True):
            registry.clear()
            registry.update(old)
    return _one_of_each(path, *added)


def _run(path: Path, source: bytes, name: str) -> None:
    spec = importlib.util.spec_from_loader(name, _Source(str(path), source))
    if spec is None or spec.loader is None:
        raise ModelError(f"quant.plugin: {path}: is no Python file")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        where = f"quant.plugin: {path}{_line(error, path)}"
        raise ModelError(f"{where}: cannot be imported: {_in_a_line(error)}") from error


class _Source(importlib.abc.ExecutionLoader):
    """Runs the very bytes that were hashed; importlib's own loader may take older bytecode that lies beside a file."""

    def __init__(self, path: str, source: bytes) -> None:
        self.path, self.source = path, source

    def get_filename(self, fullname: str) -> str:
        return self.path

    def get_source(self, fullname: str) -> str:
        return importlib.util.decode_source(self.source)


def _one_of_each(path: Path, configs: dict[str, Any], quantizers: dict[str, Any]) -> tuple[str, type[Any], type[Any]]:
    """The one config and the one quantizer of the same name. Raises ModelError if it is otherwise or they are unfit."""
    if len(configs) != 1 or configs.keys() != quantizers.keys():
        names = ", ".join(sorted({*configs, *quantizers})) or "nothing"
        raise ModelError(
            f"quant.plugin: {path}: registers {names}, and should register one config and one quantizer under one "
            "name: @register_quantization_config(NAME) and @register_quantizer(NAME) of transformers.quantizers"
        )
    [(name, config_class)], quantizer_class = configs.items(), quantizers[next(iter(quantizers))]
    wanted = {"quant_method": name, "modules_to_not_convert": ["a_layer"]}
    try:
        saved = json.loads(json.dumps(config_class(modules_to_not_convert=["a_layer"]).to_dict()))
        quantizer_class(config_class.from_dict(saved), pre_quantized=True)
    except Exception as error:
        where = f"quant.plugin: {path}{_line(error, path)}"
        raise ModelError(f"{where}: its config or quantizer cannot be made: {_in_a_line(error)}") from error
    for key, value in wanted.items():
        if saved.get(key) != value:
            difference = f"{config_class.__name__}.{key} is {saved.get(key)!r}, and should be {value!r}"
            raise ModelError(f"quant.plugin: {path}: {difference}")
    return name, config_class, quantizer_class


def _line(error: BaseException, path: Path) -> str:
    """`:LINE` of the plugin where it failed, if it failed there."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines.append(error.lineno)
    return f":{lines[-1]}" if lines else ""


def _in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
