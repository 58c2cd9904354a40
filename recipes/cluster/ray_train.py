"""A training on sixteen GPUs by Ray Train, which places workers, says who is who, and starts all again if one ends.

Needs: qft on all nodes, and an output_dir that they share. The recipe says distributed.nodes as Ray places them.

    python recipes/cluster/ray_train.py recipe.yaml /shared/runs/mine
"""

import os
import subprocess
import sys
from pathlib import Path

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def train(config: dict[str, str]) -> None:
    """In each worker. Ray has set the variables of torchrun, and holds the port that they name."""
    variables = os.environ | {"MASTER_PORT": str(int(os.environ["MASTER_PORT"]) + 1)}
    saved = any(Path(config["run"]).glob("checkpoints/checkpoint-*/qft_checkpoint.json"))
    command = ["qft", "train", config["recipe"], "--set", f"output_dir={config['run']}"]
    subprocess.run([*command, "--resume" if saved else "--overwrite"], env=variables, check=True)  # noqa: S603


if __name__ == "__main__":
    TorchTrainer(
        train,
        train_loop_config={"recipe": sys.argv[1], "run": sys.argv[2]},
        scaling_config=ScalingConfig(num_workers=16, use_gpu=True, resources_per_worker={"CPU": 8, "GPU": 1}),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=3)),
    ).fit()
