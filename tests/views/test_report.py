"""What the report and the live views show."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
from rich.console import Console

from qft.data.audit import histogram
from qft.disk import require_free_space
from qft.documents.memory import Leak
from qft.documents.training import Checkpointing, Evaluation
from qft.files import _put_in_place, atomic_folder, write_json, write_text
from qft.progress import Step, View
from qft.training.advice import advise
from qft.training.clock import PhaseClock
from qft.training.summary import spikes
from qft.views.live import LineView, LiveView, choose_view
from qft.views.terminal.training import render
from qft.views.words import si, size, sparkline
from tests.support.reports import GIB, PHASE, report

LEAK = Leak(suspect="growing list", bytes_per_100_steps=GIB, evidence="a list of 8")
IDLE = {"train": PHASE.model_copy(update={"gpu_fragmentation_bytes": 9 * GIB})}
CHECKPOINTING = Checkpointing(saved_bytes=12 * GIB, cost_share=0.31)


def advice(**changes: object) -> str:
    return "\n".join(advise(report(**changes)))


def test_nothing_to_say_is_said_about_a_good_run() -> None:
    assert advice() == ""


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"checkpointing": CHECKPOINTING}, "31% longer and saved 12.0 GiB; 15.0 GiB were free: try it off"),
        ({"checkpointing": CHECKPOINTING, "memory__peak_gpu_reserved_bytes": 70 * GIB}, "it is needed"),
        ({"memory__peak_gpu_reserved_bytes": 10 * GIB}, "70 GiB of 80 were free"),
        ({"memory__peak_gpu_reserved_bytes": 79 * GIB}, "Only 1.0 GiB were free"),
        ({"memory__leak": LEAK}, "Memory grew by 1.0 GiB in 100 steps, growing list: a list of 8."),
        (
            {"settings__logits_bytes": 20 * GIB, "settings__chunked_loss": True},
            "(4,096 tokens) take 20.0 GiB in float32, and the loss as much again, of a "
            "peak of 60.0 GiB: a smaller per_device_train_batch_size",
        ),
        (
            {
                "settings__logits_bytes": 20 * GIB,
                "settings__chunked_loss": True,
                "settings__per_device_train_batch_size": 1,
            },
            "a lower data.max_length takes",
        ),
        (
            {"settings__logits_bytes": 20 * GIB},
            "peak of 60.0 GiB: train.chunked_loss: true, where the model allows it, takes",
        ),
        ({"memory__phases": IDLE}, "held 9.0 GiB of 65.0 GiB that no tensor used at its peak: try group_by_length"),
        ({"memory__phases": IDLE, "memory__gpu_allocator": None}, "try PYTORCH_ALLOC_CONF=expandable_segments:True"),
        ({"settings__dataloader_pin_memory": False, "phases__data": 0.05}, "5% of the time went to batches, copied"),
        ({"settings__tf32_unused": True}, "95% of the time went to products in float32, without the TensorFloat-32"),
        ({"phases__data": 0.25}, "raise dataloader_num_workers (0 now)"),
        ({"phases__data": 0.25}, "25% of the time went to preparing batches"),
        ({"throughput__padding_share": 0.4}, "40% of the computed tokens were padding"),
        ({"throughput__step_seconds_p95": 4.0}, "4.0 times the median"),
        ({"eval__before": None, "eval__after": None}, "No rows were held out"),
        ({"eval__before": Evaluation(step=0, loss=1.0, perplexity=2.7, tokens=1, rows=1)}, "rose from 1.000 to 1.500"),
        (
            {"eval__history": [Evaluation(step=5, loss=1.2, perplexity=3.3, tokens=1, rows=1)]},
            "lowest at step 5 (1.200)",
        ),
        ({"loss__spikes": 4}, "4 of 30 steps spiked"),
        ({"skipped_steps": 2}, "2 updates were skipped"),
    ],
)
def test_advice_names_its_figure(changes: dict[str, object], sentence: str) -> None:
    assert sentence in advice(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"settings__logits_bytes": 15 * GIB},
        {"settings__logits_bytes": 20 * GIB, "memory__peak_gpu_bytes": 0},  # of a CPU, where nothing tells their share
        {"memory__phases": {}},
        {"settings__dataloader_pin_memory": False},
        {"settings__dataloader_pin_memory": False, "phases__data": 0.05, "memory__peak_gpu_bytes": 0},
        {"phases__data": 0.1},
        {"settings": None},
    ],
)
def test_advice_is_silent_below_its_threshold(changes: dict[str, object]) -> None:
    assert advice(**changes) == ""


def test_the_terminal_tells_of_phases_and_of_a_leak() -> None:
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(render(report(memory__leak=LEAK)))
    text = console.export_text()
    for figure in (
        "train 60.0 GiB (process 4.0 GiB)",
        "5.0 GiB reserved",
        "growing list: a list of 8",
        "expandable_seg",
    ):
        assert figure in text


def test_the_report_fits_in_80_columns() -> None:
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(render(report(advice=["Something to try."])))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    for figure in ("6,000 tokens/s", "60.0 GiB", "5.30 bits", "Something to try.", "2.0000", "1.5000"):
        assert figure in text


def test_figures_are_short() -> None:
    assert [size(n) for n in (0, 1023, 1024, 1.5 * GIB, 2**41)] == ["0 B", "1023 B", "1.0 KiB", "1.5 GiB", "2.0 TiB"]
    assert [si(n) for n in (12, 9999, 12_345, 4_884_480, 8.03e9)] == ["12", "9,999", "12.3k", "4.9M", "8.0B"]


def test_a_sparkline_has_a_bar_a_group_and_no_place_for_nan() -> None:
    assert sparkline([1, 2, 3, float("nan"), 8], 4) == "▁▂▃█"
    assert len(sparkline([float(i) for i in range(1000)], 24)) == 24
    assert sparkline([], 10) == ""


def step(number: int, **changes: object) -> Step:
    values = {"loss": 1 / number, "learning_rate": 1e-4, "grad_norm": 1.0, "tokens": 100, "padded_tokens": 100}
    rest = {"supervised_tokens": 50, "rows": 2, "seconds": 0.5, "memory": GIB, "peak_memory": 2 * GIB}
    return Step(step=number, **values | rest | changes)  # type: ignore[arg-type]


def test_the_view_fits_where_the_output_goes() -> None:
    assert isinstance(choose_view(Console(file=io.StringIO()), quiet=False), LineView)
    assert isinstance(choose_view(Console(force_terminal=True, file=io.StringIO()), quiet=False), LiveView)
    assert type(choose_view(Console(force_terminal=True, file=io.StringIO()), quiet=True)) is View


def test_the_live_view_shows_progress_speed_memory_and_the_curve() -> None:
    console = Console(force_terminal=True, width=100, file=io.StringIO())
    with LiveView(console) as view:
        view.note("Loading")
        view.begin(4, 0)
        for number in (1, 2, 3):
            view.step(step(number))
        view.step(step(4, skipped=True))
        view.note("step 4: held-out loss 0.5000, perplexity 1.65, exact match 50.0%")
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("Loading", "4/4", "200 tokens/s", "1.0 GiB, peak 2.0 GiB", "█", "skipped", "exact match 50.0%"):
        assert part in text


def test_lines_are_few_and_the_last_step_is_among_them() -> None:
    console = Console(width=200, file=io.StringIO())
    view = LineView(console, every=3600)
    view.begin(3, 0)
    for number in (1, 2, 3):
        view.step(step(number))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.split()[1] for line in lines] == ["1/3", "3/3"]
    assert "200 tokens/s" in lines[0]


def test_the_time_left_is_a_mean_over_recent_steps_and_the_first_does_not_spoil_it() -> None:
    console = Console(width=200, file=io.StringIO())
    view = LineView(console, every=0)
    view.begin(100, 0)
    for number in range(1, 31):
        view.step(step(number, seconds={1: 60.0, 30: 11.0}.get(number, 1.0)))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    left = [float(line.rpartition("peak 2.0 GiB)")[2].split()[0]) for line in lines]
    assert left[0] == 99 * 60  # nothing else is known yet
    assert left[1:29] == [100 - number for number in range(2, 30)]
    assert left[29] == 70 * 1.5  # one slow step among twenty
    assert "9 tokens/s" in lines[29]


def test_spikes_are_counted_against_the_usual_change() -> None:
    smooth = [5 - 0.1 * i for i in range(20)]
    assert spikes(smooth) == 0
    assert spikes([*smooth[:10], 9.0, *smooth[10:]]) == 1


def test_lengths_are_counted_in_equal_bins() -> None:
    assert histogram([1, 10, 11, 20, 95, 100], bins=10) == [
        (10, 2), (20, 2), (30, 0), (40, 0), (50, 0), (60, 0), (70, 0), (80, 0), (90, 0), (100, 2),
    ]  # fmt: skip
    assert histogram([3]) == [(1, 0), (2, 0), (3, 1)]


def test_the_clock_counts_each_phase_and_not_what_is_between() -> None:
    clock = PhaseClock(on_gpu=False)
    started = time.perf_counter()
    for phase, seconds in (("data", 0.0), ("forward", 0.02), ("", 0.05), ("backward", 0.04), ("", 0.0)):
        clock.enter(phase)
        time.sleep(seconds)
    clock.settle()
    assert clock.seconds["forward"] >= 0.02
    assert clock.seconds["backward"] >= 0.04
    assert sum(clock.seconds.values()) <= time.perf_counter() - started - 0.05
    assert sum(clock.shares().values()) == pytest.approx(1)


def test_files_are_whole_or_absent(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("files")
    write_text(folder / "a.txt", "old")
    with pytest.raises(ValueError, match="JSON"):
        write_json(folder / "a.txt", {"loss": float("nan")})
    assert (folder / "a.txt").read_text() == "old"

    def write_half(temporary: Path) -> None:
        write_json(temporary / "half", {})
        (temporary / "nowhere" / "half").touch()

    with pytest.raises(FileNotFoundError), atomic_folder(folder / "result") as temporary:
        write_half(temporary)
    assert [path.name for path in folder.iterdir()] == ["a.txt"]
    with atomic_folder(folder / "result") as temporary:
        (temporary / "whole").touch()
    assert [path.name for path in (folder / "result").iterdir()] == ["whole"]
    with atomic_folder(folder / "result") as temporary:
        (temporary / "newer").touch()
    assert [path.name for path in (folder / "result").iterdir()] == ["newer"]
    with pytest.raises(FileNotFoundError):
        _put_in_place(folder / "never written", folder / "result")
    assert [path.name for path in (folder / "result").iterdir()] == ["newer"]
    assert {path.name for path in folder.iterdir()} == {"a.txt", "result"}


def test_a_full_disk_is_told_before_the_work(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(Exception, match=r"its checkpoints needs .* GiB and the disk has"):
        require_free_space(tmp_path_factory.mktemp("disk") / "not-there-yet", 2**60, "its checkpoints")
