"""`qft eval --url`: a server's answers to held-out rows, its speed, and what it tells of its log probabilities."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from qft.commands.asked import EvalOptions, with_metrics
from qft.commands.measured import Measured, result
from qft.commands.results import require_replaceable, write_results
from qft.data.asked import Question, questions
from qft.data.encoded import EncodedRows
from qft.data.sources import open_source, place
from qft.data.template import IGNORED
from qft.documents.evaluation import EvalDocument, ServedBy
from qft.errors import DataError, RecipeError, ServerError
from qft.machine.device import versions
from qft.measure.evalset import TEXT_SUFFIXES, EvalSet, eval_set
from qft.measure.likelihood import Likelihood, Passage
from qft.measure.scores import Answer
from qft.model.target import Target, parse_target
from qft.progress import View
from qft.recipe import Recipe, Source
from qft.recipe.load import from_values
from qft.run.lock import locked
from qft.serving.client import SILENT_SECONDS, Server, Written
from qft.serving.load import LEVELS, TOKENS, at_once, loads

DEFAULT = ("exact_match",)
"""Scores where nobody names any: nothing else is sure to be measured."""
NEEDS_THE_MODEL = "looks into a model, and a server tells text alone; evaluate the model itself"
REFUSED = {
    "adapter": "is put on a model that qft loads; the server has its own",
    "reference": "compares distributions, and a server tells text alone; evaluate the two apart",
    "layers": NEEDS_THE_MODEL,
    "advise": NEEDS_THE_MODEL,
    "harness": "needs log probabilities of any text, and a server tells text alone; evaluate the model itself",
}
"""Options that mean nothing there."""


@dataclass(frozen=True)
class Engine:
    """Whatever answers."""

    name: str
    """Of the target in the document."""
    place: str
    """Where it runs, for people."""
    opened: Callable[[], AbstractContextManager[tuple[Server, ServedBy]]]
    """Has it answer while the context lasts."""


@dataclass(frozen=True)
class _Asked:
    """What the server is asked."""

    recipe: Recipe
    questions: Sequence[Question]
    sources: Mapping[int, tuple[str, str]]
    """Path and unit of each."""
    evalset: EvalSet | None
    """As tokens of the run's or recipe's tokenizer; None where no target names one."""

    def place(self, source: int, row: int) -> str:
        return place(*self.sources[source], row)


def evaluate_server(names: Sequence[str], options: EvalOptions, view: View) -> EvalDocument:
    """Ask the server at options.engine.url the rows of the one target of `names`, which is not loaded, or those of
    options.data. Raises QftError; ServerError for what the server does not answer."""
    return evaluate_engine(names, options, view, lambda: _at_address(options))


def evaluate_engine(names: Sequence[str], options: EvalOptions, view: View, find: Callable[[], Engine]) -> EvalDocument:
    """The same of the engine that `find` tells."""
    _require_sense(names, options)
    if options.out is None:
        return _evaluated(names, options, view, find())
    with locked(options.out, "qft eval"):
        return _evaluated(names, options, view, find())


def _at_address(options: EvalOptions) -> Engine:
    assert options.engine.url is not None
    server = Server.of(options.engine.url, options.engine.timeout or SILENT_SECONDS)
    model = server.find_model(options.engine.model)
    served = ServedBy(engine="server", url=server.url, model=model)
    return Engine(f"{model}@{urlsplit(server.url).netloc}", server.url, lambda: nullcontext((server, served)))


def _evaluated(names: Sequence[str], options: EvalOptions, view: View, engine: Engine) -> EvalDocument:
    started = time.perf_counter()
    if options.out:
        require_replaceable(options.out, [engine.name], options.data)
    view.note("Reading the rows")
    asked = _asked(names, options, view)
    with engine.opened() as (server, served):
        assert served.model is not None
        view.note(f"Asking {served.model} at {server.url}")
        work = _Work(server, served.model, asked, options, view)
        answers = work.answers()
        served = served.model_copy(update={"loads": work.loads()})
        likelihood = work.likelihood()
    measured = Measured(engine.name, likelihood, answers, None, {"served_by": served})
    document = EvalDocument(
        data=asked.evalset.sources if asked.evalset else [path for path, _ in asked.sources.values()],
        rows=len(answers),
        window=None,
        stride=None,
        reference=None,
        device=engine.place,
        seed=asked.recipe.seed,
        versions=versions(),
        targets=[result(measured, measured, asked.recipe, asked.evalset, None)],
        wall_seconds=time.perf_counter() - started,
    )
    if options.out:
        write_results(options.out, document, {engine.name: answers}, asked.place)
    return document


def _require_sense(names: Sequence[str], options: EvalOptions) -> None:
    problems = [f"--{name}: {text}" for name, text in REFUSED.items() if getattr(options, name)]
    if len(names) > 1:
        problems.append(f"--url: of one TARGET the rows are asked, and {len(names)} are named")
    if not names and options.data is None:
        problems.append("name a run or a recipe whose held-out rows are asked, or give --data FILE")
    if options.data and Path(options.data).suffix.lower() in TEXT_SUFFIXES:
        problems.append(f"--data {options.data}: plain text has no answers to score; give rows")
    if problems:
        raise RecipeError(problems)


def _asked(names: Sequence[str], options: EvalOptions, view: View) -> _Asked:
    if names:
        return _of_target(names[0], options, view)
    assert options.data is not None
    path = str(Path(options.data).resolve()) if Path(options.data).exists() else options.data
    recipe = from_values({"model": {"path": "server"}, "data": {"train": path}, "output_dir": "."}).recipe
    recipe = _with_scores(recipe, options)
    found, left_out = questions(recipe.data, {0: None}, {0: recipe.data.train[0]}, chat=True)
    _tell(left_out, view)
    unit = open_source(recipe.data.train[0]).unit
    return _Asked(recipe, found, {0: (path, unit)}, None)


def _of_target(name: str, options: EvalOptions, view: View) -> _Asked:
    target = parse_target(name, adapter=None, data=options.data)
    if target.variant:
        raise RecipeError(f"{name}: with --url nothing is loaded; name it without @{target.variant}")
    if options.data is None and not target.has_recipe:
        raise RecipeError(f"{name}: a model has no rows of its own; give --data FILE, or name a run")
    plan = target.plan()
    recipe = _with_scores(target.loaded.recipe, options)
    data = plan.rows_for(recipe.data)
    evalset = eval_set(
        recipe.having(data=data),
        plan.tokenizer,
        data=options.data,
        kept=target.rows,
        window=options.window,
        stride=options.stride,
        holds_rows_out=target.has_recipe,
    )
    assert evalset.answered is not None
    sources = dict(enumerate((*data.train, *data.eval)))
    if options.data:
        sources = {n: Source(path=path) for n, (path, _) in evalset.answered.places.items()}
    else:
        _require_same_rows(target, sources, evalset.answered)
    chosen = _chosen(evalset.answered)
    found, left_out = questions(data, chosen, sources, chat=plan.tokenizer.chat_template is not None)
    _tell(left_out, view)
    return _Asked(recipe, found[: recipe.eval.samples], evalset.answered.places, evalset)


def _chosen(answered: EncodedRows) -> dict[int, list[int]]:
    """Rows that have an answer, by their source."""
    chosen: dict[int, list[int]] = {}
    for row in answered.rows.select_columns(["source", "row", "answer_start"]):
        if row["answer_start"] > 0:
            chosen.setdefault(row["source"], []).append(row["row"])
    return chosen


def _require_same_rows(target: Target, sources: Mapping[int, Source], answered: EncodedRows) -> None:
    """A run keeps its rows as tokens, and their messages are read anew. Raises DataError if the file is another now."""
    known = (target.manifest and target.manifest.data) or {}
    for path in (sources[number].path for number in answered.places):
        if known.get(path) and open_source(Source(path=path)).digest != known[path]:
            raise DataError(f"{path}: is not what {target.name} was trained with; put it back, or give --data FILE")


def _with_scores(recipe: Recipe, options: EvalOptions) -> Recipe:
    more = options.metrics or (() if recipe.eval.metrics else DEFAULT)
    return with_metrics(recipe, more)


def _tell(left_out: Sequence[str], view: View) -> None:
    if left_out:
        view.note(f"{len(left_out)} rows are left out, as {left_out[0]}")


@dataclass(frozen=True)
class _Work:
    server: Server
    model: str
    asked: _Asked
    options: EvalOptions
    view: View

    def answers(self) -> list[Answer]:
        """Of each question, --batch-size at once; greedy."""
        settings, found = self.asked.recipe.eval, self.asked.questions
        ask = partial(self._ask, most=settings.max_new_tokens)
        written = at_once(ask, range(len(found)), self.options.batch_size)
        if empty := sum(one.reasoned and not one.text.strip() for one in written):
            text = (
                f"{empty} answers are a reasoning that was cut; raise eval.max_new_tokens ({settings.max_new_tokens})"
            )
            self.view.note(f"  {text}")
        return [
            Answer(one.source, one.row, one.text, one.expected, said.text)
            for one, said in zip(found, written, strict=True)
        ]

    def loads(self) -> list[Any]:
        """Answers of TOKENS tokens each where the server writes on behind its end; else as long as they are."""
        levels = LEVELS if self.options.engine.concurrency is None else self.options.engine.concurrency
        if not levels:
            return []
        self.view.note(f"  measuring its speed, {', '.join(map(str, levels))} at once")
        more = self._writes_on()
        ask = partial(self._ask, most=TOKENS, more=more)
        count = len(self.asked.questions)
        return list(loads(lambda number: ask(number % count), levels))

    def likelihood(self) -> Likelihood | None:
        """Of the rows' own tokens, one row after another; None where the server does not tell it, or no target says
        what they are."""
        if self.asked.evalset is None:
            self.view.note("  no perplexity: name the run as TARGET, whose tokens are asked for")
            return None
        passages = self.asked.evalset.passages
        try:
            first = self._read(passages[0])
        except ServerError as error:
            if error.status is None:
                raise
            text = f"the server tells no log probabilities of token ids (it answered {error.status})"
            self.view.note(f"  no perplexity: {text}")
            return None
        if first is None:
            self.view.note("  no perplexity: the server tells no log probabilities of what it reads")
            return None
        rest = [self._read(passage) for passage in passages[1:]]
        if None in rest:
            raise ServerError(f"{self.server.url}: tells the log probabilities of some rows, and not of others")
        nll = np.array([first, *rest], dtype=np.float64)
        return Likelihood(nll, np.array([passage.scored for passage in passages], dtype=np.int64))

    def _read(self, passage: Passage) -> float | None:
        """The negative log likelihood of a row's learnt tokens in nats, where the server tells it: by `echo`."""
        ids = list(passage.input_ids)
        body = {"model": self.model, "prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
        answer = self.server.post("/completions", body)
        told = (answer.get("choices") or [{}])[0].get("logprobs")
        values = told.get("token_logprobs") if isinstance(told, dict) else None
        if not isinstance(values, list) or len(values) not in (len(ids), len(ids) + 1):
            return None
        learnt = [at for at, label in enumerate(passage.labels) if at and label != IGNORED]
        if not all(isinstance(values[at], int | float) for at in learnt):
            return None
        return -float(sum(values[at] for at in learnt))

    def _ask(self, number: int, most: int, more: Mapping[str, Any] | None = None) -> Written:
        question = self.asked.questions[number].body
        path = "/chat/completions" if "messages" in question else "/completions"
        body = {"model": self.model, **question, "max_tokens": most, "temperature": 0, **(more or {})}
        return self.server.ask(path, body)

    def _writes_on(self) -> dict[str, Any]:
        """What has the server write behind an answer's end; nothing, if it does not take that."""
        more = {"ignore_eos": True}
        try:
            self._ask(0, TOKENS, more)
        except ServerError as error:
            if error.status not in (400, 422):
                raise
            return {}
        return more
