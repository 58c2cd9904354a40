"""A streamed model -> its quantized blocks on disk, one at a time, and what they do to held-out rows.

Every sequence goes through twice: as the unquantized model has it, and as the quantized one will. A block counts as
finished once the hidden states behind it are written, which is where an interrupted run goes on.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file
from torch import nn

from qft.calibration.distill import distill, requantized
from qft.calibration.finished import damage, record
from qft.calibration.finite import require_finite, require_finite_states, require_finite_windows
from qft.calibration.layer_errors import block_errors, inputs_seen
from qft.calibration.quantizer import EngineProcess, QuantizeTask, Schemes, Trial
from qft.calibration.reached import watch_experts
from qft.calibration.remedy import RAISED_BY, remedies
from qft.calibration.streamed import StreamedModel
from qft.checkpoint.stored import read_metadata
from qft.checkpoint.weights import save_tensors, write_index
from qft.documents.evaluation import LayerError
from qft.documents.recorded import lies_beside_work
from qft.files import remove_folder, write_json
from qft.measure.likelihood import Verification, compare
from qft.progress import View
from qft.quant.engines import Block, Engine, QuantizedLayer, find_engine, linear_of
from qft.quant.experts import expert_parameters, owner
from qft.quant.layer import LayerScheme

Hidden = list[torch.Tensor]
T = TypeVar("T")


@dataclass
class _Streams:
    """Hidden states [1, tokens, hidden] of each sequence in front of a block, on the host."""

    windows: Hidden
    verify: Hidden
    quantized_windows: Hidden
    quantized_verify: Hidden

    def save(self, path: Path) -> None:
        save_tensors({f"{name}.{i}": h for name, all_ in vars(self).items() for i, h in enumerate(all_)}, path)

    @classmethod
    def load(cls, path: Path) -> _Streams:
        tensors = load_file(path)
        names = cls.__dataclass_fields__
        counts = {name: sum(key.startswith(f"{name}.") for key in tensors) for name in names}
        return cls(**{name: [tensors[f"{name}.{i}"] for i in range(count)] for name, count in counts.items()})


@dataclass
class BlockQuantizer:
    """The blocks of `model`, quantized in `folder`."""

    model: StreamedModel
    task: QuantizeTask
    folder: Path
    view: View
    block_seconds: list[float] = field(default_factory=list)
    process: EngineProcess = field(default_factory=EngineProcess)

    def __post_init__(self) -> None:
        self.engine: Engine = find_engine(self.task.settings.engine)
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def quantized_layers(self) -> list[str]:
        return [name for name, scheme in self.task.schemes.items() if scheme]

    @property
    def skipped_layers(self) -> list[str]:
        return [name for name, scheme in self.task.schemes.items() if scheme is None]

    def shard(self, number: int, attempt: int = 0) -> Path:
        """The newest file of a block's weights up to an attempt; only what an attempt changed is written again."""
        newest_first = (self._shard(number, back) for back in range(attempt, 0, -1))
        return next((path for path in newest_first if path.exists()), self._shard(number, 0))

    def metadata(self, number: int, attempt: int) -> dict[str, str]:
        """QuantizedLayer.metadata of that file, by full names."""
        metadata: dict[str, str] = json.loads(self.shard(number, attempt).with_suffix(".json").read_text("utf-8"))
        return metadata

    def trials(self) -> Iterator[Trial]:
        """The task's own schemes, then those of its remedy."""
        schemes, limit = self.task.schemes, self.task.settings.max_bytes
        yield Trial(0, schemes, self.quantize(), self.weight_bytes(0))
        if self.task.settings.remedy == "none":
            return
        if self.task.settings.remedy == "distill":
            yield Trial(1, schemes, self.distilled(1), self.weight_bytes(1), distilled=True)
            return
        weights = {name: self.model.weights_of(name) for name in self.quantized_layers}
        used, serve = self.weight_bytes(0), self.task.settings.serve
        others = remedies(schemes, self.errors(), weights, used=used, limit=limit, serve=serve)
        for number, raised in enumerate(others, 1):
            yield Trial(number, raised, self.again(raised, number), self.weight_bytes(number))

    def quantize(self) -> Verification:
        """All blocks, from the first that is not finished."""
        done, streams = self._resume()
        for number in range(done, len(self.model)):
            started = time.perf_counter()
            errors = self._quantize_block(number, streams)
            write_json(self.folder / f"errors-{number:05}.json", [error.model_dump() for error in errors])
            streams.save(self._streams(number + 1))
            shard = self._shard(number, 0)
            told = [self.folder / f"{kind}-{number:05}.json" for kind in ("errors", "experts")]
            record(self.folder, number, [shard, shard.with_suffix(".json"), *told, self._streams(number + 1)])
            self._streams(number).unlink(missing_ok=True)
            self.block_seconds.append(time.perf_counter() - started)
            self._tell(number, errors)
        return self.verify(streams.verify, streams.quantized_verify)

    def errors(self) -> list[LayerError]:
        """Of every quantized layer as the task has it."""
        paths = sorted(self.folder.glob("errors-*.json"))
        return [LayerError(**error) for path in paths for error in json.loads(path.read_text("utf-8"))]

    @property
    def unreached(self) -> list[str]:
        """What experts no window reached, in words."""
        return [each for path in sorted(self.folder.glob("experts-*.json")) for each in json.loads(path.read_text())]

    def _experts(self, number: int) -> dict[str, int]:
        """Modules of experts, by their names in the block, and how many each has."""
        prefix = f"{self.model.name(number)}."
        stacks = expert_parameters(self.model.model).items()
        return {owner(n).removeprefix(prefix): s.shape[0] for n, s in stacks if n.startswith(prefix)}

    def again(self, schemes: Schemes, attempt: int) -> Verification:
        """The same with some layers held otherwise; those that are not stay as they are."""
        hidden = [self.model.enter(row["input_ids"]) for row in self.task.rows]
        for number in range(len(self.model)):
            block = self._block_of(number, schemes, attempt)
            hidden = [self.model.run(block, number, h) for h in hidden]
        unquantized = _Streams.load(self._streams(len(self.model))).verify
        return self.verify(unquantized, hidden)

    def distilled(self, attempt: int) -> Verification:
        """The same with quantized weights that have learnt from the unquantized model, scales as they are."""
        shards = (load_file(self._shard(number, 0)) for number in range(len(self.model)))
        written = {name: tensor for shard in shards for name, tensor in shard.items()}
        held = {name: _of_layer(name, written) for name in self.quantized_layers}
        learnt = distill(self.task, held, self.view)
        for number in range(len(self.model)):
            prefix, block, layers = self.model.name(number), self.model.block(number), {}
            for name, scheme in self._within(number, self.task.schemes).items():
                full, before = f"{prefix}.{name}", _linear(block, name)
                layer = linear_of(learnt[full].to(before.weight.device), before.bias)
                layers[name] = requantized(self.engine, layer, scheme, held[full])
            self._write(number, attempt, block, layers)
        return self.again(self.task.schemes, attempt)

    def verify(self, unquantized: Hidden, quantized: Hidden) -> Verification:
        """Compare both models' predictions, from the hidden states behind the last block."""
        before, after = (map(self.model.leave, hidden) for hidden in (unquantized, quantized))
        rows = self.task.rows
        return require_finite(compare((row["labels"] for row in rows), before, after), rows, self.task.place)

    def weight_bytes(self, attempt: int) -> int:
        """Of all weights as an attempt's result holds them, in files."""
        around = sum(tensor.nbytes for tensor in self.model.around().values())
        return around + sum(self.shard(number, attempt).stat().st_size for number in range(len(self.model)))

    def assemble(self, folder: Path, trial: Trial) -> None:
        """Write the weights and the configuration of a trial as engines load them: the blocks' files, the rest."""
        metadata: dict[str, str] = {}
        layout = self.model.layout
        assert layout is not None
        config = copy.deepcopy(self.model.model.config)
        config.quantization_config = self.engine.config(trial.schemes, self.model.dtype)
        if config.quantization_config["quant_method"] == "compressed-tensors":
            layout.keep_whole()  # transformers (5.24) takes every part of an expert for a compressed one
        saved = layout.saved_with([name for name, scheme in trial.schemes.items() if scheme])
        for number in range(len(self.model)):
            shard, written = self.shard(number, trial.number), folder / f"model-block-{number:05}.safetensors"
            if layout.rules == []:  # nothing is called otherwise
                shutil.copyfile(shard, written)
            else:
                save_tensors(saved(load_file(shard)), written, read_metadata(shard))
            metadata |= self.metadata(number, trial.number)
        around = {name: tensor.cpu().contiguous() for name, tensor in self.model.around().items()}
        # The last file by name: its header speaks for all. It is by the names of the modules.
        save_tensors(saved(around), folder / "model-outside.safetensors", self.engine.header(metadata, list(around)))
        write_index(folder)
        config.save_pretrained(folder)

    def _resume(self) -> tuple[int, _Streams]:
        """Blocks that are finished, and what stands behind them."""
        finished = [int(path.stem.partition("-")[2]) for path in self.folder.glob("streams-*.safetensors")]
        if finished and (wrong := damage(self.folder, max(finished))):
            told = f"not what was written: {', '.join(wrong)}; all blocks are quantized again"
            self.view.note(f"Of what was finished in {self.folder}, {told}")
            remove_folder(self.folder, lies_beside_work)
            self.folder.mkdir(exist_ok=True)
        elif finished:
            done = max(finished)
            streams = _Streams.load(self._streams(done))
            for ids in [*self.task.windows[:1], *(row["input_ids"] for row in self.task.rows)]:
                self.model.enter(ids)  # teaches the model the arguments of each length
            return done, streams
        windows = [self.model.enter(ids) for ids in self.task.windows]
        require_finite_windows(windows)
        verify = [self.model.enter(row["input_ids"]) for row in self.task.rows]
        return 0, _Streams(windows, verify, list(windows), list(verify))

    def _quantize_block(self, number: int, streams: _Streams) -> list[LayerError]:
        """Quantize a block, write it, and take `streams` behind it."""
        model = self.model
        block = model.block(number)
        schemes = self._within(number, self.task.schemes)
        layers = self.engine.quantize(self._given(number, block, schemes, streams)) if schemes else {}
        pairs = {f"{model.name(number)}.{name}": (_linear(block, name), layer.module) for name, layer in layers.items()}
        after: Hidden = []

        def run() -> None:
            after[:] = [model.run(block, number, h) for h in streams.verify]
            require_finite_states(after, self.task.rows, self.task.place)

        errors = block_errors(pairs, run)
        streams.verify = after
        with watch_experts(block, self._experts(number)) as missed:
            streams.windows = [model.run(block, number, h) for h in streams.windows]
        told = [f"{model.name(number)}.{each}" for each in missed()]
        write_json(self.folder / f"experts-{number:05}.json", told)
        require_finite_windows(streams.windows)
        self._write(number, 0, block, layers)
        for name, layer in layers.items():
            block.set_submodule(name, layer.module)
        streams.quantized_windows = [model.run(block, number, h) for h in streams.quantized_windows]
        streams.quantized_verify = [model.run(block, number, h) for h in streams.quantized_verify]
        sizes = {name: sum(tensor.nbytes for tensor in layer.tensors.values()) for name, layer in layers.items()}
        prefix = f"{model.name(number)}."
        return [error.model_copy(update={"bytes": sizes[error.name.removeprefix(prefix)]}) for error in errors]

    def _given(self, number: int, block: nn.Module, schemes: dict[str, LayerScheme], streams: _Streams) -> Block:
        largest = dict.fromkeys(schemes, 0.0)

        def look(name: str, inputs: torch.Tensor) -> None:
            largest[name] = max(largest[name], float(inputs.abs().max()))

        settled = self.task.settled and self.task.settled.within(f"{self.model.name(number)}.")
        if settled:
            largest.update(settled.largest_inputs)
        elif any(scheme.activations == "static" for scheme in schemes.values()):
            with inputs_seen([(block.get_submodule(name), name) for name in schemes], look):
                for hidden in streams.quantized_windows:
                    self.model.run(block, number, hidden)
        return Block(
            name=self.model.name(number),
            module=copy.deepcopy(block),
            schemes=schemes,
            calls=[self.model.call(number, hidden) for hidden in streams.windows],
            quantized_inputs=streams.quantized_windows,
            largest_inputs=largest,
            scales=settled.scales if settled else None,
            iters=self.task.settings.iters,
            seed=self.task.seed + number,
        )

    def _block_of(self, number: int, schemes: Schemes, attempt: int) -> nn.Module:
        """A block as an attempt holds it, written if the attempt changes it."""
        block, before, wanted = self.model.block(number), self.task.schemes, self._within(number, schemes)
        newest = self.shard(number, attempt if self.task.settings.remedy == "distill" else 0)
        tensors, metadata = load_file(newest), self.metadata(number, 0)
        layers = {}
        for name in self._within(number, before):
            full = f"{self.model.name(number)}.{name}"
            if schemes[full] == before[full]:
                parts = _of_layer(full, tensors)
                module = self.engine.restore(_linear(block, name), parts, wanted[name])
                layers[name] = QuantizedLayer(module, parts, _of_layer(full, metadata))
        raised = {name: scheme for name, scheme in wanted.items() if name not in layers}
        if raised:
            layers |= find_engine(RAISED_BY).quantize(Block(self.model.name(number), copy.deepcopy(block), raised))
        if layers.keys() != self._within(number, before).keys() or raised:
            self._write(number, attempt, block, layers)
        for name, layer in layers.items():
            block.set_submodule(name, layer.module)
        return block

    def _within(self, number: int, schemes: Schemes) -> dict[str, LayerScheme]:
        """Schemes of a block's quantized layers, by their names within it."""
        prefix = f"{self.model.name(number)}."
        return {name.removeprefix(prefix): s for name, s in schemes.items() if s and name.startswith(prefix)}

    def _write(self, number: int, attempt: int, block: nn.Module, layers: Mapping[str, QuantizedLayer]) -> None:
        prefix, held = self.model.name(number), tuple(f"{layer}." for layer in layers)
        rest = {name: value for name, value in block.state_dict().items() if not name.startswith(held)}
        parts = {f"{name}.{key}": t for name, layer in layers.items() for key, t in layer.tensors.items()}
        tensors = {f"{prefix}.{name}": t.detach().cpu().contiguous() for name, t in (rest | parts).items()}
        told = {f"{name}.{key}": text for name, layer in layers.items() for key, text in layer.metadata.items()}
        metadata = {f"{prefix}.{name}": text for name, text in told.items()}
        path = self._shard(number, attempt)
        write_json(path.with_suffix(".json"), metadata)
        save_tensors(tensors, path, self.engine.header(metadata, [f"{prefix}.{name}" for name in rest]))

    def _tell(self, number: int, errors: list[LayerError]) -> None:
        left = (len(self.model) - number - 1) * sum(self.block_seconds) / len(self.block_seconds)
        worst = min(errors, key=lambda error: error.output_snr_db, default=None)
        noise = f", {worst.kind} {worst.output_snr_db:.1f} dB" if worst else ""
        timing = f"{self.block_seconds[-1]:.1f} s, {left:,.0f} s left"
        self.view.note(f"block {number + 1} of {len(self.model)}{noise}, {timing}")

    def _shard(self, number: int, attempt: int) -> Path:
        return self.folder / f"block-{number:05}-{attempt}.safetensors"

    def _streams(self, number: int) -> Path:
        return self.folder / f"streams-{number:05}.safetensors"


def _linear(block: nn.Module, name: str) -> nn.Linear:
    layer = block.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def _of_layer(name: str, values: Mapping[str, T]) -> dict[str, T]:
    """What belongs to a layer, by names within it."""
    return {key.removeprefix(f"{name}."): value for key, value in values.items() if key.startswith(f"{name}.")}
