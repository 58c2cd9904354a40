"""The commands. Each reads a recipe and hands it on; everything heavy is imported inside."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qft.cli_models import models
from qft.quiet import quiet_libraries
from qft.shell import AsJson, Debug, Quiet, consoles, messages, print_json, tell

if TYPE_CHECKING:
    from qft.recipe import LoadedRecipe

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Finetune language models whose weights are held in few bits.",
)
app.add_typer(models, name="models")

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML recipe.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="SECTION.FIELD=VALUE", help="Override a field; paths are relative to here. Repeatable."
    ),
]
MergeInto = Literal["dequantized", "original"]
DOCUMENTS = {
    "report": ("qft.report.document", "Report"),
    "eval": ("qft.report.evaluation", "EvalDocument"),
    "calibration": ("qft.report.calibration", "CalibrationReport"),
    "export": ("qft.report.export", "ExportDocument"),
}
"""What commands write, by its name for `qft schema`: module and class."""
TARGET_HELP = (
    "A recipe, a run, or a model; PATH@VARIANT for base, float32, bfloat16, float16, nf4, fp4, 8bit, merged or (a "
    ".gguf file) llama.cpp."
)


def main() -> None:
    """Entry point of `qft`."""
    app()


def show_version(wanted: bool) -> None:
    if not wanted:
        return
    from qft.machine import find_device, versions

    device = find_device("auto")
    for name, version in versions().items():
        typer.echo(f"{name:<14}{version or 'none'}")
    typer.echo(f"{'gpu':<14}{device.name if device and device.kind == 'cuda' else 'none'}")
    raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the versions that matter.")
    ] = False,
) -> None:
    pass


@app.command()
def check(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False, debug: Debug = False) -> None:
    """Say what a recipe would do, and whether it can, before anything is loaded."""
    with messages(debug):
        from qft.recipe import load

        loaded = load(recipe, overrides or [])
        quiet_libraries()
        from qft.report.plan import render_plan

        tell(planned(loaded), render_plan, as_json=as_json)


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in output_dir.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Finetune as the recipe says, and report memory and throughput."""
    with messages(debug):
        from qft.recipe import load

        loaded = load(recipe, overrides or [])
        require_one_of(resume=resume, overwrite=overwrite)
        quiet_libraries()
        from qft.report.live import choose_view
        from qft.report.terminal import render
        from qft.train import train as run_training

        with choose_view(consoles(as_json), quiet=quiet) as view:
            report = run_training(loaded, view, resume=resume, overwrite=overwrite)
        tell(report, render, as_json=as_json, quiet=quiet)


@app.command()
def calibrate(
    recipe: RecipePath,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Where to write instead of output_dir.", show_default=False)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue behind the last finished block.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in output_dir.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Quantize a trained model for inference, and accept the result or refuse it by what it lost."""
    with messages(debug):
        from qft.recipe import load

        loaded = load(recipe, [*(overrides or []), *([f"output_dir={out}"] if out else [])])
        require_one_of(resume=resume, overwrite=overwrite)
        quiet_libraries()
        from qft.calibrate import calibrate as run_calibration
        from qft.report.acceptance import render_calibration
        from qft.report.live import LineView, QuietView

        view = QuietView() if quiet else LineView(consoles(as_json))
        report = run_calibration(loaded, view, resume=resume, overwrite=overwrite)
        tell(report, render_calibration, as_json=as_json, quiet=quiet)


@app.command("eval")
def evaluate(
    targets: Annotated[list[str], typer.Argument(metavar="TARGET...", help=TARGET_HELP, show_default=False)],
    adapter: Annotated[Path | None, typer.Option(help="Put this adapter on models that bring none.")] = None,
    data: Annotated[str | None, typer.Option(help="Other rows, or a plain text.")] = None,
    reference: Annotated[str | None, typer.Option(help="The target that the others are compared with.")] = None,
    metric: Annotated[list[str] | None, typer.Option(help="A task score beside the recipe's. Repeatable.")] = None,
    harness: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK", help="A task of lm-evaluation-harness, by name or file. Repeatable."),
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens of a window over plain text.")] = 512,
    stride: Annotated[int, typer.Option(min=1, help="Tokens from one window to the next.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that are read at once.")] = 8,
    kl_tokens: Annotated[int, typer.Option(min=1, help="Tokens over which distributions are compared.")] = 8192,
    layers: Annotated[bool, typer.Option("--layers", help="Tell each layer's error against the reference.")] = False,
    out: Annotated[Path | None, typer.Option(help="Where to write; by default into a run's folder.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare models on the same rows and tokens: quality, memory and speed."""
    with messages(debug):
        quiet_libraries()
        from qft.evaluate import EvalOptions, default_out
        from qft.evaluate import evaluate as run_evaluation
        from qft.report.comparison import render_comparison
        from qft.report.live import LineView, QuietView

        options = EvalOptions(
            adapter=adapter,
            data=data,
            window=window,
            stride=stride,
            reference=reference,
            metrics=tuple(metric or ()),
            harness=tuple(harness or ()),
            batch_size=batch_size,
            kl_tokens=kl_tokens,
            layers=layers,
            out=out or default_out(targets),
        )
        view = QuietView() if quiet else LineView(consoles(as_json))
        tell(run_evaluation(targets, options, view), render_comparison, as_json=as_json, quiet=quiet)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="The folder of a finished training.", show_default=False)],
    to: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TARGET",
            help="adapter, merged, bnb-4bit, bnb-8bit, compressed-tensors, gguf or gguf-KIND; by default the recipe's. "
            "Repeatable.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where the artifacts' folders go; by default RUN/export.")] = None,
    merge_into: Annotated[MergeInto | None, typer.Option(help="Base weights to add the adapter to.")] = None,
    gate: Annotated[bool, typer.Option("--gate/--no-gate", help="Prove what was written, or do not.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace artifacts of an earlier export.")] = False,
    environment: Annotated[
        str | None,
        typer.Option(
            "--check-target",
            metavar="ENV",
            help="Export nothing; tell whether `here`, or an environment such as vllm=0.11.0,cuda=8.0, can load it.",
        ),
    ] = None,
    register: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Add what is written to the registry, as this model's next version."),
    ] = None,
    registry: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder of the registry; by default the recipe's, or models.")
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload what passed to this repository of the hub.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository of the hub private.")] = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Hand over a trained model in other forms, each proven to be the one that was trained."""
    with messages(debug):
        quiet_libraries()
        from qft.export import ExportOptions, check_target, refuse_unloadable
        from qft.export import export as run_export
        from qft.report.handover import render_exports, render_loads
        from qft.report.live import LineView, QuietView

        options = ExportOptions(
            tuple(to or ()),
            out,
            merge_into,
            gate,
            overwrite,
            tuple(overrides or ()),
            register=register,
            registry=registry,
            push_to_hub=push_to_hub,
            private=private,
        )
        view = QuietView() if quiet else LineView(consoles(as_json))
        if environment is not None:
            if register or push_to_hub:
                raise typer.BadParameter("--check-target writes nothing: leave out --register and --push-to-hub")
            checks = check_target(run, options, environment, view)
            document = [check.model_dump(mode="json") for check in checks] if as_json else checks
            tell(document, render_loads, as_json=as_json, quiet=quiet)
            refuse_unloadable(checks)
            return
        documents = run_export(run, options, view)
        if as_json:
            print_json([document.model_dump(mode="json") for document in documents])
        elif not quiet:
            consoles(False).print(render_exports(documents))


@app.command()
def chat(
    target: Annotated[str, typer.Argument(metavar="TARGET", help=TARGET_HELP, show_default=False)],
    adapter: Annotated[Path | None, typer.Option(help="Put this adapter on a model that brings none.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Answer this alone, instead of a conversation.")] = None,
    system: Annotated[str | None, typer.Option(help="What the system says before the conversation.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token; above, one is drawn.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(help="Draw from the most likely tokens of this share.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of what is drawn.")] = 0,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Talk to a model: in the terminal, from a pipe (each line is a turn), or one answer to --prompt."""
    with messages(debug, interrupted="interrupted"):
        if as_json and prompt is None:
            raise typer.BadParameter("--json prints one answer; give --prompt TEXT")
        quiet_libraries()
        from qft.chat import ChatOptions, open_session

        options = ChatOptions(system, max_new_tokens, temperature, top_p, seed)
        session = open_session(target, adapter, options, prompt, lambda text: typer.echo(text, err=True))
        if prompt is None:
            session.run()
        elif as_json:
            print_json(session.answer_json(prompt))
        else:
            session.say(prompt)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run folder.", show_default=False)],
    svg: Annotated[Path | None, typer.Option(help="Write the tables as an SVG picture.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show the report of a finished run again."""
    with messages(debug):
        from io import StringIO

        from rich.console import Console

        from qft.files import write_text
        from qft.report.document import read_report
        from qft.report.terminal import render

        document = read_report(run)
        if as_json:
            print_json(document.model_dump(mode="json"))
        elif svg:
            console = Console(record=True, width=100, file=StringIO(), force_terminal=True)
            console.print(render(document))
            write_text(svg, console.export_svg(title=f"qft report {run.name}"))
        else:
            consoles(False).print(render(document))


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe to write.", show_default=False)],
    model: Annotated[str, typer.Option(help="Hub id, folder, .gguf file or package:NAME/FILE.")],
    data: Annotated[Path, typer.Option(help="The training rows.")],
    debug: Debug = False,
) -> None:
    """Write a commented starter recipe."""
    with messages(debug):
        from qft.recipe.starter import write_starter

        write_starter(path, model, data)
        typer.echo(f"{path} written; next: qft check {path}")


@app.command()
def schema(
    of: Annotated[
        str, typer.Argument(metavar="[recipe|report|eval|calibration|export]", help="Which document.")
    ] = "recipe",
) -> None:
    """Print the JSON Schema of a recipe (for editors) or of a document, such as report.json."""
    if of == "recipe":
        from qft.recipe import json_schema

        print_json(json_schema())
    elif of in DOCUMENTS:
        from importlib import import_module

        module, name = DOCUMENTS[of]
        own = getattr(import_module(module), name).model_json_schema()
        print_json({"$schema": "https://json-schema.org/draft/2020-12/schema", **own})
    else:
        raise typer.BadParameter(f"{of} is none of recipe, {', '.join(DOCUMENTS)}")


def require_one_of(*, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise typer.BadParameter("--resume continues a run and --overwrite replaces it; give one of the two")


def planned(loaded: LoadedRecipe) -> dict[str, Any]:
    """Facts of the training, and under `calibration` those of the calibration; of what the recipe has sections for."""
    from qft.calibrate import find_plan
    from qft.harness import asked_tasks, check_tasks
    from qft.plan import make_plan

    check_tasks(asked_tasks(loaded))
    calibrates = loaded.recipe.calibrate is not None
    facts: dict[str, Any] = {}
    if not calibrates or any(loaded.has(section) for section in ("train", "adapter", "quant")):
        facts = make_plan(loaded).facts()
    return facts | ({"calibration": find_plan(loaded)[0].facts()} if calibrates else {})
