"""README.md of an artifact: its model card, with the metadata that the Hub reads."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from qft.checkpoint.language import auto_class
from qft.documents.export import ExportDocument, GateCheck
from qft.documents.manifest import Manifest
from qft.documents.plan import PlanDocument
from qft.documents.training import read_report
from qft.errors import QftError
from qft.export.job import Job
from qft.export.targets import Exporter
from qft.quant.hold import Qat


def model_card(job: Job, exporter: Exporter, document: ExportDocument) -> str:
    """Markdown with front matter; figures are those of the run's report and of the gate."""
    parts = [
        f"---\n{yaml.safe_dump(_metadata(job, exporter, document), sort_keys=False)}---",
        f"# {job.run.folder.name}, {document.target}",
        _origin(job, document),
        f"## Data\n\n{_data(job)}",
        f"## Scores\n\n{_scores(job)}",
        f"## Gate\n\n{_gate(document)}",
        f"## Loading\n\n{_usage(job, exporter)}",
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _metadata(job: Job, exporter: Exporter, document: ExportDocument) -> dict[str, Any]:
    license_ = _license(job)
    return {
        **({"base_model": _base(job)} if job.run.base and job.run.base.commit else {}),
        "library_name": exporter.library,
        **({"license": license_} if license_ else {}),
        "pipeline_tag": "text-generation",
        "tags": ["qft", document.target, *(["lora"] if job.adapter else [])],
    }


def _base(job: Job) -> str:
    return without_folders(job.run.base.path if job.run.base else job.plan.checkpoint.path)


def without_folders(base: str) -> str:
    """A base's hub id, or its name without the folders of this machine."""
    return Path(base).name if Path(base).is_absolute() else base


def _license(job: Job) -> str | None:
    """Of the base, if its own card tells."""
    card = job.plan.checkpoint.folder / "README.md"
    front = re.match(r"---\n(.*?)\n---", card.read_text("utf-8"), re.DOTALL) if card.is_file() else None
    values = yaml.safe_load(front[1]) if front else None
    license_ = values.get("license") if isinstance(values, dict) else None
    return license_ if isinstance(license_, str) else None


def _origin(job: Job, document: ExportDocument) -> str:
    commit = document.base.commit
    lines = [f"Finetuned with qft from `{_base(job)}`{f' at commit `{commit}`' if commit else ''}."]
    if isinstance(job.plan.scheme, Qat):
        kind = job.plan.scheme.quant_type
        lines.append(f"Its weights were trained as they are rounded here (quantization-aware training for {kind}).")
    elif job.adapter:
        lines.append(f"The adapter was trained on a base held in {job.plan.scheme.short_words()}.")
    if stages := (job.run.manifest() or Manifest()).stages:
        lines.append(f"It was trained in stages, by their steps: {'; '.join(stages)}.")
    if document.merge_into:
        which = "the same values, dequantized" if document.merge_into == "dequantized" else "the original weights"
        lines.append(f"It was added to {which}.")
    if document.quantization:
        told = document.quantization
        by = f"{told['engine']}{', since autoround could not search' * ('not_searched' in told)}"
        lines.append(
            f"The result was quantized again ({by}, {told['scheme']}): mean KL {told['kl']:.4f} nats and "
            f"perplexity {told['perplexity_change']:+.2%} from the merged model."
        )
    return " ".join([*lines, f"Other weights are {document.dtype}."])


def _data(job: Job) -> str:
    """Counts, of the plan and of the run's report; no contents and no paths."""
    try:
        report = read_report(job.run.folder)
        data = PlanDocument.model_validate_json((job.run.folder / "plan.json").read_bytes()).data
    except (QftError, OSError, ValueError):
        return "The run has no record of its data."
    formats = ", ".join(dict.fromkeys(source.format for source in data.sources))
    return (
        f"{data.train_rows:,} training rows ({formats}) and {data.eval_rows:,} held out. Trained on "
        f"{report.samples:,} rows and {report.tokens:,} tokens, {report.supervised_tokens:,} of them learnt, in "
        f"{report.steps:,} optimizer steps."
    )


def _scores(job: Job) -> str:
    try:
        found = read_report(job.run.folder).eval
    except QftError:
        return "The run has no report."
    moments = [(name, part) for name, part in (("before", found.before), ("after", found.after)) if part]
    if not moments:
        return "No rows were held out."
    names = list(moments[0][1].scores)
    head = ["training", "loss", "perplexity", *names]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for moment, part in moments:
        figures = [f"{part.loss:.4f}", f"{part.perplexity:.3f}", *(f"{part.scores[name]:.3f}" for name in names)]
        lines.append(" | ".join([moment, *figures]))
    return f"On {moments[-1][1].rows:,} held-out rows:\n\n" + "\n".join(f"| {line} |" for line in lines)


def _gate(document: ExportDocument) -> str:
    gate = document.gate
    if gate.passed is None:
        return "**Not verified**: it was exported with the gate switched off."
    verdict = "Passed" if gate.passed else "**Refused**"
    told = f"{verdict}: loaded by {gate.engine} and compared with the model as trained on {gate.rows} rows."
    parts = [told, _table(gate.checks)]
    if served := gate.served:
        on = f", on {served.base}," if served.base else ""
        parts += [
            f"Then loaded by {served.engine} {served.version}{on} and compared likewise:",
            _table(served.checks),
        ]
    return "\n\n".join(parts)


def _table(checks: Sequence[GateCheck]) -> str:
    lines = ["| check | value | threshold | passed |", "| --- | --- | --- | --- |"]
    for check in checks:
        value = f"{check.value:.4g}" if isinstance(check.value, float) else _cell(check.value)
        limit = f"{check.threshold:.4g}" if isinstance(check.threshold, float) else ""
        lines.append(f"| {check.name} | {value} | {limit} | {'yes' if check.passed else 'no'} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    flat = text.replace("\n", " ").replace("|", "\\|")
    return f"`{flat[:60]}`"


CAUSAL, PEFT_IMPORT = "AutoModelForCausalLM", "from peft import AutoPeftModelForCausalLM"
PEFT_LOADS = 'AutoPeftModelForCausalLM.from_pretrained("FOLDER")  # finds the base by itself'
"""In the usage of targets, which is that of models of text alone."""


def _usage(job: Job, exporter: Exporter) -> str:
    told = {"SCHEME": job.plan.scheme.short_words(), "BASE": _base(job), "NAME": job.run.folder.resolve().name}
    if (loader := auto_class(job.plan.checkpoint.config).__name__) != CAUSAL:
        found = f'PeftModel.from_pretrained({loader}.from_pretrained("{told["BASE"]}"), "FOLDER")'
        told |= {CAUSAL: loader, PEFT_IMPORT: f"from peft import PeftModel\nfrom transformers import {loader}"}
        told |= {PEFT_LOADS: found}
    return re.sub("|".join(map(re.escape, told)), lambda found: told[found[0]], exporter.usage)
