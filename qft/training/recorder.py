"""What one training measures, noted as it happens, and the report that comes of it."""

import time
from pathlib import Path

from torch import nn

from qft.documents import training as documents
from qft.documents.manifest import Manifest
from qft.documents.state import TrainingState, read_state
from qft.measure.scores import Answer
from qft.memory.meter import Meter, Snapshot, weight_bytes
from qft.plan import Plan
from qft.progress import Step, View
from qft.run.checkpoint import STATE, step_of
from qft.run.folder import Run
from qft.training import summary
from qft.training.advice import advise
from qft.training.clock import PhaseClock


class Recorder:
    """Holds the instruments of a run, keeps what they measure, and shows it as it comes.

    It outlives a Trainer: a run that trains with several, one after another, has one recorder."""

    def __init__(self, plan: Plan, view: View, started: float, skipped: documents.SkippedModules | None) -> None:
        self.plan, self.view, self.started, self.skipped = plan, view, started, skipped
        self.meter = Meter(plan.model.device.kind)
        self.clock = PhaseClock(self.meter.on_gpu)
        self.earlier = TrainingState()
        """What the parts of the run before this one measured, if it is resumed."""
        self.steps: list[Step] = []
        """Of all parts."""
        self.moments: dict[str, Snapshot] = {}
        """Memory by the moment: after_load, peak, at_end."""
        self.bytes = dict.fromkeys(("frozen", "trainable", "gradients", "optimizer_state"), 0)
        """Of each part; of gradients and optimizer state, as they were when there first were any."""
        self.bytes_elsewhere = 0
        """Of frozen weights, what memory.offload keeps off the device."""
        self.recomputed: tuple[int, float] | None = None
        """What CheckpointingProbe measured, where it was on."""
        self.quantized_share: float | None = None
        """Of the loaded base's weights; see qft.quant.share."""
        self.evaluations: dict[str, documents.Evaluation] = {}
        """By the moment: before, step-N, after."""
        self.answers: dict[str, list[Answer]] = {}
        """To the held-out rows, by the moment."""

    def recall(self, checkpoint: Path) -> None:
        """Take up what had been measured by the time of a checkpoint."""
        state, done = read_state(checkpoint / STATE), step_of(checkpoint)
        if state is None:
            self.view.note(f"{checkpoint} has no {STATE}: the report counts from step {done + 1} on")
            state = TrainingState(unmeasured_steps=done)
        self.earlier, self.steps, self.evaluations = state, list(state.steps), dict(state.evaluations)
        self.clock.seconds |= state.phase_seconds
        if self.plan.recipe.train.gradient_checkpointing:
            self.recomputed = state.recomputed

    def state(self) -> TrainingState:
        """What has been measured so far."""
        peak = self._peak()
        return TrainingState(
            steps=self.steps,
            unmeasured_steps=self.earlier.unmeasured_steps,
            evaluations=self.evaluations,
            phase_seconds=self.clock.seconds,
            wall_seconds=self._wall_seconds(),
            peak_gpu_bytes=peak.gpu,
            peak_gpu_reserved_bytes=peak.gpu_reserved,
            peak_host_bytes=peak.host,
            recomputed=self.recomputed,
        )

    def loaded(self, model: nn.Module) -> None:
        """All that trains is there, and nothing has run."""
        self.bytes |= weight_bytes(model)
        self.moments["after_load"] = self.meter.settled()

    def begin(self, done: int) -> None:
        """The training goes on behind `done` steps."""
        self.view.begin(self.plan.steps, done)
        self.meter.restart()

    def end(self) -> None:
        """The last step was made."""
        self.moments["peak"] = self._peak()
        self.clock.settle()
        self.moments["at_end"] = self.meter.now()

    def step(self, step: Step) -> None:
        self.steps.append(step)
        self.view.step(step)

    def evaluated(self, moment: str, evaluation: documents.Evaluation, answers: list[Answer]) -> None:
        self.evaluations[moment], self.answers[moment] = evaluation, answers
        self.view.evaluated(evaluation.step, evaluation.loss, evaluation.perplexity, evaluation.scores)

    def report(self, run: Run, result: Path) -> documents.Report:
        """The report of a run that wrote its model to `result`."""
        steps, evaluations = self.steps, dict(self.evaluations)
        report = documents.Report(
            run=str(run.folder),
            result=str(result),
            model=self._model(),
            throughput=summary.throughput(steps),
            phases=documents.Phases(**self.clock.shares()),
            memory=self._memory(),
            skipped_modules=self.skipped,
            checkpointing=self.recomputed and summary.checkpointing(*self.recomputed, steps),
            loss=summary.loss(steps),
            eval=documents.Evaluations(
                before=evaluations.pop("before", None),
                after=evaluations.pop("after", None),
                history=list(evaluations.values()),
            ),
            lengths=summary.lengths(self.plan.data.train["length"]),
            resumed_from=(run.manifest() or Manifest()).resumed_from,
            steps=len(steps),
            unmeasured_steps=self.earlier.unmeasured_steps,
            skipped_steps=sum(step.skipped for step in steps),
            samples=sum(step.rows for step in steps),
            tokens=sum(step.tokens for step in steps),
            supervised_tokens=sum(step.supervised_tokens for step in steps),
            wall_seconds=self._wall_seconds(),
            advice=[],
        )
        return report.model_copy(update={"advice": advise(report)})

    def _wall_seconds(self) -> float:
        return self.earlier.wall_seconds + time.perf_counter() - self.started

    def _peak(self) -> Snapshot:
        """Largest values of all parts."""
        peak, earlier = self.meter.peak(), self.earlier
        return Snapshot(
            peak.on_gpu,
            max(peak.gpu, earlier.peak_gpu_bytes),
            max(peak.gpu_reserved, earlier.peak_gpu_reserved_bytes),
            max(peak.host, earlier.peak_host_bytes),
        )

    def _model(self) -> documents.ModelPart:
        plan, shape = self.plan.model, self.plan.model.shape
        held = self.bytes["frozen"] + self.bytes_elsewhere if self.plan.lora else self.bytes["trainable"]
        return documents.ModelPart(
            path=plan.checkpoint.path,
            architecture=shape.architecture,
            device=plan.device.name,
            scheme=plan.scheme.name,
            quant_type=plan.scheme.quant_type,
            dtype=plan.dtype,
            parameters=shape.parameters,
            trainable_parameters=shape.trainable_parameters,
            trainable_share=shape.trainable_parameters / shape.parameters,
            quantized_share=self.quantized_share,
            bits_per_weight=held * 8 / shape.parameters,
        )

    def _memory(self) -> documents.Memory:
        peak, steps = self.moments["peak"], self.steps
        part = steps[len(self.earlier.steps) :] or steps  # of another process nothing can leak into this one
        return documents.Memory(
            peak_gpu_bytes=peak.gpu,
            peak_gpu_reserved_bytes=peak.gpu_reserved,
            peak_host_bytes=peak.host,
            device_bytes=self.plan.model.device.total_bytes,
            after_load_bytes=self.moments["after_load"].device,
            after_first_step_bytes=part[0].memory,
            at_end_bytes=self.moments["at_end"].device,
            history=[(step.step, step.memory, step.peak_memory) for step in steps],
            growing=summary.growing([step.memory for step in part]),
            components=self._components(),
            offloaded_bytes=self.bytes_elsewhere,
        )

    def _components(self) -> documents.Components:
        """On a GPU the peak holds the weights too; on the host, only what came since they were loaded is told apart."""
        held = self.bytes
        weights = held["frozen"] + held["trainable"] if self.meter.on_gpu else self.moments["after_load"].host
        rest = self.moments["peak"].device - weights - held["gradients"] - held["optimizer_state"]
        return documents.Components(
            base_weights=held["frozen"],
            trainable_weights=held["trainable"],
            gradients=held["gradients"],
            optimizer_state=held["optimizer_state"],
            activations=max(rest, 0),
        )
