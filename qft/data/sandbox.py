"""A budget for chat templates: a model's template is a program that somebody else wrote, and it can loop or grow.

transformers renders templates in jinja2's sandbox, which keeps them from doing harm and not from going on for ever.
`limit_templates` puts Sandbox in the place of that environment, so that every rendering of this process has the budget,
whoever asks for it; what is rendered stays the same, to the byte.
"""

import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from itertools import islice
from types import FrameType
from typing import Any, NoReturn

from jinja2 import Template, nodes, pass_context
from jinja2.filters import do_round
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

from qft.errors import DataError

SECONDS = 10.0
"""Of one rendering. Where the thread is not the main one, no signal reaches it: there the steps are the limit."""
STEPS = 10_000_000
"""Turns of loops and calls in one rendering."""
TEXT = 64 * 2**20
"""Characters of what is rendered, and of any text that is repeated on the way."""
ITEMS = 1_000_000
"""Of a list that is repeated."""
BITS = 2**16
"""Of a whole number."""
MEMORY = 512 * 2**20
"""Bytes that one rendering may add to the process, where the system can limit it."""


class TemplateLimit(DataError):
    """A template that takes more than its budget."""


class LimitedTemplate(Template):
    """A compiled template, each rendering of which has a budget."""

    environment: "Sandbox"

    def render(self, *args: Any, **kwargs: Any) -> str:
        self.environment.steps = 0
        with _budget():
            return super().render(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Iterator[str]:
        self.environment.steps = length = 0
        with _budget():
            for piece in super().generate(*args, **kwargs):
                length += len(piece)
                _require_text(length)
                yield piece


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, with operators, loops and calls that are counted or measured before they are carried out."""

    template_class = LimitedTemplate
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps = 0
        self.filters |= {"round": _round, "qft_step": _step}

    def compile(self, *args: Any, **kwargs: Any) -> Any:
        started = time.monotonic()
        with _budget():  # filters of constants are applied here, and whatever they raise is ignored
            compiled = super().compile(*args, **kwargs)
        return compiled if time.monotonic() - started < SECONDS else _out_of_time()

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        for loop in list(source.find_all(nodes.For)):
            step = nodes.Filter(nodes.Const(None), "qft_step", [], [], None, None, lineno=loop.lineno)
            loop.body.insert(0, nodes.ExprStmt(step, lineno=loop.lineno))
        source.set_environment(self)
        return super()._generate(source, *args, **kwargs)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        __self.step()
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            _check_product(left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _require_bits(left.bit_length() * right)
        return super().call_binop(context, operator, left, right)

    def step(self) -> None:
        """Count one. Raises TemplateLimit behind the last."""
        self.steps += 1
        if self.steps > STEPS:
            raise TemplateLimit(f"the chat template takes more than {STEPS:,} steps of its loops for one conversation")

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """The pieces of a text, counted as they come."""
        rest, made, length = iter(pieces), [], 0
        while some := list(islice(rest, 1000)):
            made.append("".join(some))
            length += len(made[-1])
            _require_text(length)
        return "".join(made)


def limit_templates() -> None:
    """From now on, what transformers renders has a budget."""
    chat_template_utils.ImmutableSandboxedEnvironment = Sandbox
    chat_template_utils._compile_jinja_template.cache_clear()


@pass_context
def _step(context: Context, value: None) -> None:
    environment = context.environment
    assert isinstance(environment, Sandbox)
    environment.step()


def _round(value: float, precision: int = 0, method: Any = "common") -> float:
    """jinja2's filter, which takes the power of ten first."""
    _require_bits(4 * abs(precision))
    return do_round(value, precision, method)


def _check_product(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _require_bits(left.bit_length() + right.bit_length())
    for value, count in ((left, right), (right, left)):
        if isinstance(count, int) and isinstance(value, str):
            _require_text(len(value) * count)
        elif isinstance(count, int) and isinstance(value, list | tuple) and len(value) * count > ITEMS:
            raise TemplateLimit(f"the chat template makes a list of more than {ITEMS:,} items")


def _require_bits(bits: int) -> None:
    if bits > BITS:
        raise TemplateLimit(f"the chat template computes a number of more than {BITS:,} bits")


def _require_text(length: int) -> None:
    if length > TEXT:
        raise TemplateLimit(f"the chat template writes more than {TEXT:,} characters for one conversation")


@contextmanager
def _budget() -> Iterator[None]:
    """Time and memory for what is done within. Raises TemplateLimit when they are used up."""
    with _less_memory(), _alarm():
        try:
            yield
        except MemoryError:
            raise TemplateLimit(f"the chat template takes more than {MEMORY >> 20:,} MiB of memory") from None


@contextmanager
def _alarm() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, _out_of_time)
    # Again after each second more, should the first be lost in a finalizer.
    seconds, interval = signal.setitimer(signal.ITIMER_REAL, SECONDS, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, seconds, interval)
        signal.signal(signal.SIGALRM, before)


def _out_of_time(number: int = 0, frame: FrameType | None = None) -> NoReturn:
    raise TemplateLimit(f"the chat template takes more than {SECONDS:g} s for one conversation")


@cache
def _statm(pid: int) -> int:
    """What tells how much the process maps, open: it is asked twice a row. Each process has its own."""
    return os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)


@contextmanager
def _less_memory() -> Iterator[None]:
    """A limit on what the process maps; none where the system does not tell how much that is (Linux does)."""
    try:
        import resource

        pages = int(os.pread(_statm(os.getpid()), 20, 0).split()[0])
    except (ImportError, OSError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + MEMORY
    unlimited = soft == resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_AS, (most if unlimited else min(soft, most), hard))
    try:
        yield
    finally:
        with suppress(ValueError):
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
