"""What is done with a recipe: `qft init`, `check`, `train` and `calibrate`; and `qft schema`."""

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from qft.cli.shell import AsJson, Debug, Overrides, Quiet, choose_lines, consoles, messages, print_json, tell
from qft.machine.environment import prepare_libraries

if TYPE_CHECKING:
    from qft.documents.plan import CalibrationCheck, PlanDocument

ON_PAGE = 5
"""Rows of each source that a page shows, if --show says nothing else."""
RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML recipe.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in output_dir.")]
DOCUMENT = (
    "recipe, report, eval, calibration, export, plan, calibration-plan, calibration-record, manifest, training-state, "
    "checkpoint, registry, history or abilities."
)


def require_one_of(*, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise typer.BadParameter("--resume continues a run and --overwrite replaces it; give one of the two")


def gpu_bytes(text: str | None, option: str = "--gpu") -> int | None:
    """What --gpu says, or another option."""
    from qft.recipe.memory import size_in_bytes

    size = size_in_bytes(text) if text is not None else None
    if text is not None and not size:
        raise typer.BadParameter(f"{option} {text} is no size of a GPU's memory; say 24GiB")
    return size


def init(
    path: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe to write.", show_default=False)],
    model: Annotated[
        str | None, typer.Option(help="Hub id, folder, .gguf file or package:NAME/FILE.", show_default=False)
    ] = None,
    data: Annotated[Path | None, typer.Option(help="The training rows.", show_default=False)] = None,
    other: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="YAML",
            help="A configuration of Axolotl, LLaMA-Factory, TRL (trl sft) or torchtune to translate.",
            show_default=False,
        ),
    ] = None,
    allow_unsupported: Annotated[
        bool, typer.Option("--allow-unsupported", help="With --from: leave out what qft does not support.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Write a commented starter recipe for a model and rows, or one that is made of another tool's configuration."""
    with messages(debug):
        if other is not None:
            if model or data:
                raise typer.BadParameter(
                    "--from takes model and rows from the configuration: give no --model or --data"
                )
            _translate(other, path, allow_unsupported)
        elif model is None or data is None:
            raise typer.BadParameter("give --model and --data, or --from with the configuration of another tool")
        else:
            from qft.recipe.starter import write_starter

            write_starter(path, model, data)
        typer.echo(f"{path} written; next: qft check {quote(str(path))}")


def _translate(other: Path, path: Path, allow_unsupported: bool) -> None:
    """Write the recipe, and show what became of each key; first of all where that is refused."""
    from qft.arrive import translate
    from qft.arrive.written import write_translated
    from qft.views.terminal.arrive import render_translation

    made = translate(other)
    tell(made, render_translation, as_json=False)
    write_translated(path, made, allow_unsupported)


def check(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE|MODEL", help="A YAML recipe, or a model.", show_default=False)
    ],
    overrides: Overrides = None,
    show: Annotated[int, typer.Option("--show", min=0, help="Rows of each source to print, token by token.")] = 0,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu", metavar="SIZE", help="Memory of a GPU that is not here, as in 24GiB.", show_default=False
        ),
    ] = None,
    gpus: Annotated[
        str | None,
        typer.Option(
            "--gpus", metavar="NxSIZE", help="Several GPUs that are not here, as in 8x80GiB.", show_default=False
        ),
    ] = None,
    nodes: Annotated[
        int | None, typer.Option("--nodes", min=1, help="Machines with so many of them each.", show_default=False)
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write a page of the rows as they are learnt.", show_default=False),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say what a recipe would do, and whether it can, before anything is loaded; or what can be done with a MODEL, by
    what model.path takes."""
    with messages(debug):
        if recipe.suffix.lower() not in (".yaml", ".yml") and not _is_plain_file(recipe):
            _require_alone(overrides, show, gpu or gpus or nodes or html)
            _tell_abilities(str(recipe), as_json)
            return
        from qft.recipe import load

        loaded = load(recipe, overrides or [])
        size, many = _asked_gpus(gpu, gpus, nodes)
        prepare_libraries()
        from qft.commands.check import planned
        from qft.views.terminal.plan import render_plan

        document = planned(loaded, show or (ON_PAGE if html else 0), size, many)
        if html:
            _write_page(document, html, recipe.name)
        tell(document.model_copy(update={} if show else {"shown": []}), render_plan, as_json=as_json)


def _write_page(document: "PlanDocument | CalibrationCheck", path: Path, recipe: str) -> None:
    from qft.documents.plan import PlanDocument
    from qft.files import write_text
    from qft.views.html.rows import rows_page

    if not isinstance(document, PlanDocument):
        raise typer.BadParameter("--html shows the rows of a training, and the recipe only calibrates: leave it out")
    write_text(path, rows_page(document.data, document.shown, recipe))
    typer.echo(f"{path} written", err=True)


def _asked_gpus(gpu: str | None, gpus: str | None, nodes: int | None) -> tuple[int | None, tuple[int, int] | None]:
    """Bytes of a GPU that is not here; and how many of a node, and nodes, if there are several."""
    if gpus is None:
        if nodes:
            raise typer.BadParameter("--nodes says how many machines have --gpus 8x80GiB each; give both")
        return gpu_bytes(gpu), None
    if gpu:
        raise typer.BadParameter("--gpu is one GPU and --gpus several; give one of the two")
    count, _, size = gpus.partition("x")
    if not count.isdecimal() or not int(count):
        raise typer.BadParameter(f"--gpus {gpus} is no number of GPUs and the memory of each; say 8x80GiB")
    return gpu_bytes(size, "--gpus"), (int(count), nodes or 1)


def _is_plain_file(path: Path) -> bool:
    """Whether it is read as a recipe though it is not called so."""
    return path.is_file() and path.suffix != ".gguf"


def _require_alone(overrides: list[str] | None, show: int, gpu: object) -> None:
    if overrides or show or gpu:
        raise typer.BadParameter(
            "a model alone takes no --set, --show, --html, --gpu or --gpus: write a recipe that names it"
        )


def _tell_abilities(model: str, as_json: bool) -> None:
    prepare_libraries()
    from qft.commands.abilities import abilities
    from qft.views.terminal.abilities import render_abilities

    tell(abilities(model), render_abilities, as_json=as_json)


def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint.")] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Finetune as the recipe says, and report memory and throughput."""
    with messages(debug):
        from qft.recipe import load

        loaded = load(recipe, overrides or [])
        require_one_of(resume=resume, overwrite=overwrite)
        prepare_libraries()
        from qft.commands.launching import launched

        launched(loaded, resume=resume)
        from qft.commands.train import train as run_training
        from qft.views.live import choose_view
        from qft.views.terminal.training import render

        with choose_view(consoles(as_json), quiet=quiet) as view:
            report = run_training(loaded, view, resume=resume, overwrite=overwrite)
        tell(report, render, as_json=as_json, quiet=quiet)


def calibrate(
    recipe: RecipePath,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Where to write instead of output_dir.", show_default=False)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue behind the last finished block.")] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Quantize a trained model for inference, and accept the result or refuse it by what it lost."""
    with messages(debug):
        from qft.recipe import load

        loaded = load(recipe, [*(overrides or []), *([f"output_dir={out}"] if out else [])])
        require_one_of(resume=resume, overwrite=overwrite)
        prepare_libraries()
        from qft.commands.calibrate import calibrate as run_calibration
        from qft.views.terminal.calibration import render_calibration

        view = choose_lines(as_json, quiet)
        report = run_calibration(loaded, view, resume=resume, overwrite=overwrite)
        tell(report, render_calibration, as_json=as_json, quiet=quiet)


def schema(of: Annotated[str, typer.Argument(metavar="[DOCUMENT]", help=DOCUMENT)] = "recipe") -> None:
    """Print the JSON Schema of a recipe (for editors) or of a document, such as report.json."""
    with messages(debug=False):
        from qft.documents import DOCUMENTS

        if of == "recipe":
            from qft.recipe import json_schema

            print_json(json_schema())
        elif of in DOCUMENTS:
            dialect = "https://json-schema.org/draft/2020-12/schema"
            print_json({"$schema": dialect, **DOCUMENTS[of].model_json_schema()})
        else:
            raise typer.BadParameter(f"{of} is none of recipe, {', '.join(DOCUMENTS)}")
