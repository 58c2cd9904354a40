"""What one training measures, noted as it happens, and the report that comes of it."""

import time
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from qft.data.audit import histogram
from qft.data.encoded import column
from qft.distributed.gate import BitGate
from qft.documents import training as documents
from qft.documents.distributed import Distributed
from qft.documents.manifest import Manifest
from qft.documents.memory import Leak, PhaseMemory
from qft.documents.skipped import SkippedModules
from qft.documents.state import TrainingState, read_state
from qft.kernels import Dither, Keep
from qft.machine.environment import allocator_settings
from qft.measure.scores import Answer
from qft.memory.leaks import FEWEST_STEPS, LeakWatch, growth_per_100_steps
from qft.memory.meter import Meter, Snapshot, child_peak, larger, resident_peak, weight_bytes
from qft.model.balance import BalanceWatch
from qft.plan import Plan
from qft.plan.stages import most_memory
from qft.progress import Step, View
from qft.run.checkpoint import STATE, step_of
from qft.run.folder import Run
from qft.training import summary
from qft.training.advice import advise
from qft.training.clock import PhaseClock


def stage_moment(plan: Plan) -> str:
    """Of the evaluation before a stage."""
    return f"stage-{plan.span.number}" if plan.span and plan.start else "before"


def _leak_watch(plan: Plan) -> LeakWatch:
    return LeakWatch(plan.recipe.memory.leak_threshold if plan.steps - plan.start >= FEWEST_STEPS else None)


class Recorder:
    """Holds the instruments of a run, keeps what they measure, and shows it as it comes.

    It outlives a Trainer: a run that trains with several, one after another, has one recorder."""

    def __init__(self, plan: Plan, view: View, started: float, skipped: SkippedModules | None) -> None:
        self.plan, self.view, self.started, self.skipped = plan, view, started, skipped
        self.stages = plan.stages
        self.meter = Meter(plan.model.device.kind, phase="prepare")
        self.leaks = _leak_watch(plan)
        self.clock = PhaseClock(self.meter.on_gpu)
        self.earlier = TrainingState()
        """What the parts of the run before this one measured, if it is resumed."""
        self.steps: list[Step] = []
        """Of all parts."""
        self.moments: dict[str, Snapshot] = {}
        """Memory by the moment: before_load, after_load, after_adapters, after_first_step, at_end."""
        self.fused_loss = False
        """Whether head, loss and gradient are one pass over few logits at a time; see qft.memory.fused_loss."""
        self.unmasked = False
        """Whether training needs no mask; see qft.memory.unmasked."""
        self.logit_bytes: int | None = None
        """What logits take at once where the loss is computed from few of them."""
        self.kernels: documents.Kernels | None = None
        self.keeps: list[Keep] = []
        """What kernels keep of each block; none: they compute nothing."""
        self.dither = Dither()
        """How kernels round to float8."""
        self.balance: BalanceWatch | None = None
        """None: nothing is loaded yet."""
        self.largest_micro_batch = 0
        """In tokens, with padding."""
        self.distributed: Distributed | None = None
        """What each of several processes measured, once they have told."""
        self.gate: BitGate | None = None
        """Over packed weights that are sharded."""
        self.leak: Leak | None = None
        self.bytes = dict.fromkeys(("frozen", "trainable", "gradients", "optimizer_state"), 0)
        """Of each part; of gradients and optimizer state, as they were when there first were any."""
        self.bytes_elsewhere = 0
        """Of frozen weights, what memory.offload keeps off the device."""
        self.recomputed: tuple[int, float] | None = None
        """What CheckpointingProbe measured, where it was on."""
        self.out_of_memory: list[documents.OutOfMemory] = []
        """What was changed because memory ran out, in all parts."""
        self.quantized_share: float | None = None
        """Of the loaded base's weights; see qft.quant.share."""
        self.models: dict[str, documents.ModelPart] = {}
        """As each stage so far had it, by its number."""
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
        self.largest_micro_batch = state.largest_micro_batch_tokens
        self.out_of_memory, self.models = list(state.out_of_memory), dict(state.models)
        if self.plan.recipe.train.gradient_checkpointing:
            self.recomputed = state.recomputed

    def take_up(self, plan: Plan) -> None:
        """The training goes on with that one of its stages, which has a model of its own."""
        if plan is self.plan:
            return
        self.plan, self.leaks, self.moments = plan, _leak_watch(plan), {}
        self.bytes, self.bytes_elsewhere = dict.fromkeys(self.bytes, 0), 0
        self.logit_bytes = self.quantized_share = self.kernels = None
        self.fused_loss = self.unmasked = False
        self.keeps = []
        if self.steps and self.steps[-1].step <= plan.start:
            self.recomputed = None

    def is_evaluation_due(self, step: int) -> bool:
        """Whether the checkpoint of that step was written before its evaluation, and that is still to be made."""
        return self.earlier.evaluation_due and f"step-{step}" not in self.evaluations

    def state(self) -> TrainingState:
        """What has been measured so far."""
        phases = self.phases()
        peak = self.peak(phases)
        return TrainingState(
            steps=self.steps,
            unmeasured_steps=self.earlier.unmeasured_steps,
            evaluations=self.evaluations,
            phase_seconds=self.clock.seconds,
            wall_seconds=self.wall_seconds(),
            peak_gpu_bytes=peak.gpu,
            peak_gpu_reserved_bytes=peak.gpu_reserved,
            peak_host_bytes=peak.host,
            memory_phases=phases,
            largest_micro_batch_tokens=self.largest_micro_batch,
            recomputed=self.recomputed,
            out_of_memory=self.out_of_memory,
            models=self.models,
        )

    def reach(self, moment: str, phase: str) -> None:
        """One phase is over, and another begins."""
        self.moments[moment] = self.meter.settled()
        self.meter.enter(phase)

    def loaded(self, model: nn.Module) -> None:
        """All that trains is there, and nothing has run."""
        self.bytes |= weight_bytes(model)
        self.moments["after_adapters"] = self.meter.settled()
        if span := self.plan.span:
            self.models[str(span.number)] = self._model()

    def begin(self, done: int) -> None:
        """The training goes on behind `done` steps."""
        self.view.begin(self.stages[-1].steps, done)
        self.meter.enter("train")

    def look(self) -> Snapshot:
        """Memory behind a step."""
        now = self.meter.now()
        self.moments.setdefault("after_first_step", now)
        self.leaks.look(now)
        return now

    def end(self) -> None:
        """The last step was made."""
        self.clock.settle()
        self.moments["at_end"] = self.meter.now()
        self.meter.enter("save")
        self.leak = self.leaks.leak(self.meter.on_gpu) or self.leak

    def step(self, step: Step) -> None:
        self.steps.append(step)
        self.view.step(step)

    def survived(self, event: documents.OutOfMemory) -> None:
        """Memory ran out, and the training goes on."""
        self.out_of_memory.append(event)
        self.view.note(event.told())

    def evaluated(self, moment: str, evaluation: documents.Evaluation, answers: list[Answer]) -> None:
        self.evaluations[moment], self.answers[moment] = evaluation, answers
        self.view.evaluated(evaluation.step, evaluation.loss, evaluation.perplexity, evaluation.scores)

    def report(self, run: Run, result: Path) -> documents.Report:
        """The report of a run that wrote its model to `result`."""
        steps = self.steps
        evaluations = {name: each for name, each in self.evaluations.items() if not name.startswith("stage-")}
        report = documents.Report(
            run=str(run.folder),
            result=str(result),
            model=self._model(),
            throughput=summary.throughput(steps),
            distributed=self.distributed,
            phases=documents.Phases(**self.clock.shares()),
            memory=self._memory(),
            skipped_modules=self.skipped,
            settings=self._settings(),
            stages=[self._stage(plan) for plan in self.stages if plan.span],
            kernels=self.kernels,
            checkpointing=self.recomputed and summary.checkpointing(*self.recomputed, steps),
            loss=summary.loss(steps),
            balance=self.balance and self.balance.document(),
            eval=documents.Evaluations(
                before=evaluations.pop("before", None),
                after=evaluations.pop("after", None),
                history=list(evaluations.values()),
            ),
            lengths=histogram(column(self.plan.data.train, "length")),
            resumed_from=(run.manifest() or Manifest()).resumed_from,
            steps=len(steps),
            unmeasured_steps=self.earlier.unmeasured_steps,
            out_of_memory=self.out_of_memory,
            skipped_steps=sum(step.skipped for step in steps),
            samples=sum(step.rows for step in steps),
            tokens=sum(step.tokens for step in steps),
            supervised_tokens=sum(step.supervised_tokens for step in steps),
            wall_seconds=self.wall_seconds(),
            advice=[],
        )
        return report.model_copy(update={"advice": advise(report)})

    def wall_seconds(self) -> float:
        return self.earlier.wall_seconds + time.perf_counter() - self.started

    def phases(self) -> dict[str, PhaseMemory]:
        """Largest values of all parts."""
        return larger(self.earlier.memory_phases, self.meter.phases())

    def peak(self, phases: Mapping[str, PhaseMemory]) -> Snapshot:
        """Largest values of all parts, in all phases."""
        earlier, all_phases = self.earlier, phases.values()
        return Snapshot(
            self.meter.on_gpu,
            max(earlier.peak_gpu_bytes, *(phase.gpu_allocated_bytes or 0 for phase in all_phases)),
            max(earlier.peak_gpu_reserved_bytes, *(phase.gpu_reserved_bytes or 0 for phase in all_phases)),
            max(earlier.peak_host_bytes, resident_peak(), *(phase.host_resident_bytes for phase in all_phases)),
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
            trainable_share=min(shape.trainable_parameters / shape.parameters, 1.0),  # scales are no parameters
            quantized_share=self.quantized_share,
            bits_per_weight=held * 8 / shape.parameters,
        )

    def _stage(self, plan: Plan) -> documents.StageReport:
        assert plan.span
        steps = [step for step in self.steps if plan.start < step.step <= plan.steps]
        return documents.StageReport(
            first_step=plan.start + 1,
            last_step=steps[-1].step if steps else plan.steps,
            model=self.models.get(str(plan.span.number)),
            settings=documents.StageSettings(
                **{name: plan.training[name] for name in ("learning_rate", "lr_scheduler_type", "optim")},
                reset_optimizer=plan.span.reset_optimizer,
                reset_lr_scheduler=plan.span.reset_lr_scheduler,
            ),
            loss=summary.loss(steps) if any(not step.skipped for step in steps) else None,
            before=self.evaluations.get(stage_moment(plan)),
            after=self.evaluations.get(f"step-{plan.steps}" if plan.leads_on else "after"),
            throughput=summary.throughput(steps) if steps else None,
            peak_bytes=max((step.peak_memory for step in steps), default=None),
            predicted_peak_bytes=plan.memory.predicted_peak_bytes,
        )

    def _settings(self) -> documents.Settings:
        asked, model = self.plan.training, self.plan.model
        mixed = asked["bf16"] or asked["fp16"]
        logits = self.largest_micro_batch * model.shape.embeddings * 4
        return documents.Settings(
            per_device_train_batch_size=asked["per_device_train_batch_size"],
            gradient_accumulation_steps=asked["gradient_accumulation_steps"],
            dataloader_num_workers=asked["dataloader_num_workers"],
            dataloader_pin_memory=asked["dataloader_pin_memory"],
            tf32_unused=model.device.tf32 and not asked["tf32"] and not mixed and model.dtype == "float32",
            largest_micro_batch_tokens=self.largest_micro_batch,
            chunked_loss=self.logit_bytes is not None,
            fused_loss=self.fused_loss,
            attention_mask=not self.unmasked,
            logits_bytes=min(logits, self.logit_bytes or logits),
        )

    def _memory(self) -> documents.Memory:
        steps, moments, phases = self.steps, self.moments, self.phases()
        peak = self.peak(phases)
        part = steps[len(self.earlier.steps) :] or steps  # of another process nothing can leak into this one
        part = [step for step in part if step.step > self.plan.start] or part
        planned = most_memory(self.stages[-1])
        return documents.Memory(
            peak_gpu_bytes=peak.gpu,
            peak_gpu_reserved_bytes=peak.gpu_reserved,
            peak_host_bytes=peak.host,
            peak_child_bytes=child_peak(),
            predicted_peak_bytes=planned.predicted_peak_bytes,
            predicted_host_bytes=planned.predicted_host_bytes,
            fits=planned.fits,
            predicted_components=planned.components,
            device_bytes=self.plan.model.device.total_bytes,
            after_load_bytes=moments["after_adapters"].device,
            after_first_step_bytes=part[0].memory,
            at_end_bytes=moments["at_end"].device,
            moments={name: moment.document() for name, moment in moments.items()},
            phases=phases,
            gpu_allocator=allocator_settings() if self.meter.on_gpu else None,
            history=[(step.step, step.memory, step.peak_memory) for step in steps],
            growing=self.leak is not None,
            growth_bytes_per_100_steps=growth_per_100_steps(self.leaks.device),
            host_growth_bytes_per_100_steps=growth_per_100_steps(self.leaks.host),
            leak_threshold_bytes=self.leaks.threshold,
            leak=self.leak,
            components=self._components(phases["train"]),
            offloaded_bytes=self.bytes_elsewhere,
        )

    def _components(self, train: PhaseMemory) -> documents.Components:
        held, on_gpu = self.bytes, self.meter.on_gpu
        peak = train.gpu_allocated_bytes if on_gpu else train.host_resident_bytes
        if self.plan.start:  # others were not held by what is told here
            peak = max(step.peak_memory for step in self.steps if step.step > self.plan.start)
        rest = max((peak or 0) - sum(held.values()), 0)
        return documents.Components(
            base_weights=held["frozen"],
            trainable_weights=held["trainable"],
            gradients=held["gradients"],
            optimizer_state=held["optimizer_state"],
            activations=rest if on_gpu else None,
            undivided=None if on_gpu else rest,
        )
