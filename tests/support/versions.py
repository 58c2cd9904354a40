"""Artifacts to be registered, and the runs that they come from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

PASSED = {"passed": True, "engine": "transformers", "checks": [{"name": "kl", "value": 0.01, "passed": True}]}

RECIPE = "adapter:\n  r: {r}\n  target_modules: [q_proj]\nseed: 0\n"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def artifact(folder: Path, content: str = "weights") -> Path:
    (folder / "inner").mkdir(parents=True)
    (folder / "model.safetensors").write_text(content)
    (folder / "inner" / "config.json").write_text("{}")
    return folder


def exported(folder: Path, run: Path, base: dict[str, Any], rank: int) -> tuple[Path, Path]:
    """An artifact with its export.json, and the run that it comes from."""
    out = artifact(folder, f"rank {rank}")
    hashes = {
        "model.safetensors": digest(out / "model.safetensors"),
        "inner/config.json": digest(out / "inner/config.json"),
    }
    document = {"target": "merged", "path": str(out), "bytes": 9, "sha256": hashes, "base": base, "gate": PASSED}
    (out / "export.json").write_text(json.dumps(document))
    run.mkdir()
    (run / "recipe.yaml").write_text(RECIPE.format(r=rank))
    (run / "manifest.json").write_text(json.dumps({"base": base, "data": {"rows.jsonl": f"{rank}" * 64}}))
    after = {"loss": 1 / rank, "perplexity": 2.0, "scores": {"exact_match": 0.5}}
    (run / "report.json").write_text(json.dumps({"kind": "train", "eval": {"after": after}}))
    return out, run
