"""Host memory and time of merging a LoRA r=16 into an nf4 base of random weights: `qft export --to merged --no-gate`.

python benchmarks/merge.py              a small Llama
python benchmarks/merge.py --size 8b    a Llama of 8 billion parameters; training it first takes 20 GiB of memory
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from modes import SIZES, make_inputs, recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--folder", metavar="FOLDER", help="where the weights go for a while, three times 16 GB for 8b")
    options = parser.parse_args()
    options.batch, options.steps, options.length, options.checkpointing = 1, 1, 32, False
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        # In a process of its own: the weights that it leaves would stand in the way of the training's.
        child = os.fork()
        if not child:
            make_inputs(folder, options)
            os._exit(0)
        os.waitpid(child, 0)
        (folder / "recipe.yaml").write_text(json.dumps(recipe("nf4", folder, options)))
        qft("train", folder / "recipe.yaml", "--quiet")
        print(json.dumps(qft("export", folder / "nf4", "--to", "merged", "--no-gate", "--quiet")))


def qft(*arguments: object) -> dict[str, float]:
    """Run it; seconds, and the most bytes that it held in memory."""
    started = time.perf_counter()
    running = subprocess.Popen([sys.executable, "-m", "qft", *map(str, arguments)])
    _, status, usage = os.wait4(running.pid, 0)
    if status:
        sys.exit(f"qft {arguments[0]} failed")
    return {"seconds": time.perf_counter() - started, "peak_host_bytes": usage.ru_maxrss * 1024}


if __name__ == "__main__":
    main()
