"""Memory and speed of `qft calibrate` on random weights: what one block at a time needs.

python benchmarks/calibration.py                                       a small Llama, whatever device there is
python benchmarks/calibration.py --size 8b --samples 128 --length 512  a Llama of 8 billion parameters
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from modes import SIZES, make_inputs

SCHEMES: dict[str, dict[str, object]] = {
    "rtn-w4a16": {"preset": "w4a16", "engine": "rtn"},
    "autoround-w4a16": {"preset": "w4a16"},
    "autoround-w4a16-tuned": {"preset": "w4a16", "iters": 50},
    "w8a8-static": {"preset": "w8a8-static"},
    "nf4": {"engine": "bitsandbytes", "data_type": "nf4"},
    "fp8": {"preset": "fp8"},
}
SHOWN = ("engine", "scheme", "peak_bytes", "peak_host_bytes", "tokens_per_second", "wall_seconds", "bytes_before")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=["rtn-w4a16", "autoround-w4a16"])
    options = parser.parse_args()
    options.batch, options.steps = options.samples + 16, 1
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder), options)
        for name in options.schemes:
            print(json.dumps({"arm": name, **calibrate(name, Path(folder), options)}), flush=True)


def calibrate(name: str, folder: Path, options: argparse.Namespace) -> dict[str, object]:
    own = {"samples": options.samples, "max_length": options.length, "verify_samples": 8, **SCHEMES[name]}
    if own["engine" if "engine" in own else "preset"] not in ("w4a16", "w8a8-static"):
        del own["samples"]  # these look at no windows
    recipe = {
        "model": {"path": str(folder / "model")},
        "data": {"train": str(folder / "rows.jsonl"), "format": "text", "max_length": options.length},
        "calibrate": own,
        "output_dir": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "qft", "calibrate", str(folder / "recipe.yaml"), "--overwrite", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return {"exit_code": done.returncode}
    report = json.loads(done.stdout)
    return {field: report[field] for field in SHOWN} | {"bytes_after": report["bytes_after"]}


if __name__ == "__main__":
    main()
