"""Every model type that transformers can make tiny, through qft: the table of docs/models-supported.md.

    python benchmarks/sweep.py [KIND ...] [--json FILE] [--write]
    python benchmarks/sweep.py --read FILE --write

Each is made of random weights, trained in nf4 with LoRA for four steps, merged, exported and put before the gate, in a
process of its own. --json keeps what came of it, --read takes what an earlier run kept, and --write replaces the table
in docs/models-supported.md. The exit code is 1 if any type ended in what is no message, failed after its check, or came
out with other names or shapes than it had.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import transformers  # noqa: E402

from qft.machine.environment import prepare_libraries  # noqa: E402
from tests.support.sweep import Swept, swept  # noqa: E402
from tests.support.tiny import image_types, text_types  # noqa: E402

TABLE, MARK = ROOT / "docs" / "models-supported.md", "<!-- made by benchmarks/sweep.py --write -->\n"
LIMIT = 240
"""Seconds that one type may take."""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("kinds", nargs="*", default=list(dict.fromkeys([*text_types(), *image_types()])))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--read", type=Path)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    prepare_libraries()
    transformers.logging.set_verbosity_error()
    found = [Swept(**each) for each in json.loads(arguments.read.read_text())] if arguments.read else []
    for kind in [] if arguments.read else arguments.kinds:
        found.append(apart(kind))
        print(words(found[-1]), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps([asdict(each) for each in found], indent=1))
    if arguments.write:
        before, _, _ = TABLE.read_text().partition(MARK)
        TABLE.write_text(before + MARK + "\n" + table(found))
    return not all(each.is_sound for each in found)


def apart(kind: str) -> Swept:
    """In a process of its own, which may crash or never end."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(kind, there))
    process.start()
    there.close()
    try:
        result: Any = here.recv() if here.poll(LIMIT) else f"did not end within {LIMIT} s"
    except EOFError:
        process.join()
        result = f"the process ended with {process.exitcode}"
    process.kill()
    process.join()
    return result if isinstance(result, Swept) else Swept(kind, failed=result)


def _work(kind: str, there: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        there.send(swept(kind, Path(folder)))


def table(found: list[Swept]) -> str:
    """In Markdown: what was tried, and below it what transformers could not make."""
    rows = [
        f"| `{each.kind}` | {each.architecture} | {share(each)} | {outcome(each)} |" for each in found if not each.made
    ]
    unmade = ", ".join(f"`{each.kind}`" for each in found if each.made)
    counts = f"{len(rows)} types; transformers {transformers.__version__}."
    head = "| type | class | in 4 bits | outcome |\n| --- | --- | --- | --- |\n"
    return (
        f"{counts}\n\n{head}"
        + "\n".join(rows)
        + f"\n\nNot made tiny, or not able to learn from text alone: {unmade}.\n"
    )


def share(found: Swept) -> str:
    return "" if found.share is None else f"{found.share:.0%}{', allowed' if found.partial else ''}"


def words(found: Swept) -> str:
    return f"{found.kind:28} {share(found):13} {outcome(found)}"


def outcome(found: Swept) -> str:
    told = {
        "not made": found.made,
        "FAILED": found.failed,
        "refused": found.refused,
        "DIFFERS": ", ".join(found.differences[:6]) if found.differences else None,
        "not merged": found.unmerged,
    }
    unforeseen = f"; memory on a GPU: {found.unforeseen}" if found.unforeseen else ""
    return next((f"{name}: {text}" for name, text in told.items() if text), f"handed over{unforeseen}")


if __name__ == "__main__":
    sys.exit(main())
