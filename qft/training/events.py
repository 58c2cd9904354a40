"""TensorBoard's events, beside a training that does not end by them."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.integrations import TensorBoardCallback

from qft.disk import refusal
from qft.progress import View

_others = threading.excepthook


class Events(TensorBoardCallback):
    """Writes into `folder` until that fails, which is said once. At the start it raises OSError: no work is lost."""

    def __init__(self, folder: Path, view: View) -> None:
        super().__init__()
        self.folder, self.view = folder, view
        self.logging_dir, self.lost = str(folder), False
        threading.excepthook = _heard

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        self._unless_lost(super().on_log, *args, **kwargs)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._unless_lost(super().on_train_end, *args, **kwargs)

    def _unless_lost(self, work: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        if self.lost:
            return
        try:
            work(*args, **kwargs)
        except OSError as error:
            self.lost, self.tb_writer = True, None
            self.view.note(f"{refusal(error, self.folder)}. TensorBoard's events end here, and the training goes on")


def _heard(found: Any) -> None:
    """The thread that writes events tells of its failure twice: Python prints it, and the next event is refused."""
    if not (issubclass(found.exc_type, OSError) and type(found.thread).__name__ == "_AsyncWriterThread"):
        _others(found)
