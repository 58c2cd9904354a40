"""train.chunked_loss: the loss from few logits at a time is the loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qft.documents.training import Report
from qft.memory import chunked_loss
from tests.support.runs import adapter, run

RecipeFile = Callable[..., Path]
TRAIN = {"max_steps": 4, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "report_to": []}
PLAIN: dict[str, Any] = {"quant": None, "model": {"device": "cpu", "dtype": "float32"}}


@pytest.mark.parametrize(
    "settings",
    [{}, {"label_smoothing_factor": 0.1}, {"gradient_checkpointing": True, "neftune_noise_alpha": 5.0}],
    ids=str,
)
def test_a_run_learns_the_same(
    recipe_file: RecipeFile, chat_file: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    calls: list[int] = []
    real = chunked_loss.Chunked.__call__

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self.rows)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(chunked_loss.Chunked, "__call__", called)
    fused = not settings
    if not fused:
        monkeypatch.setattr("qft.training.session.fuse_loss", lambda *_, **__: False)
    monkeypatch.setattr("qft.plan.memory.LOGITS", 4 * 264 * 24)  # of 24 tokens

    def trained(chunked: bool) -> tuple[Report, dict[str, torch.Tensor]]:
        folder = f"run-{chunked}"
        path = recipe_file(
            f"{folder}.yaml",
            train=TRAIN | settings | {"chunked_loss": chunked},
            data={"eval": str(chat_file)},
            output_dir=str(chat_file.parent / folder),
            **PLAIN,
        )
        return run(path), adapter(chat_file.parent / folder)

    (one, learnt), (other, expected) = trained(chunked=True), trained(chunked=False)
    assert set(calls) == (set() if fused else {24, 8}), "8 are of the comparison at the start"
    assert one.settings
    assert one.settings.fused_loss is fused
    assert [row[1] for row in one.loss.history] == pytest.approx([row[1] for row in other.loss.history], rel=1e-5)
    assert one.eval.after
    assert other.eval.after
    assert one.eval.after.loss == pytest.approx(other.eval.after.loss, rel=1e-5)
    for name, tensor in expected.items():
        torch.testing.assert_close(learnt[name], tensor, rtol=1e-3, atol=1e-5)
