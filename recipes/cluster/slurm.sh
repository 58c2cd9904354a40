#!/bin/bash
# A training on two nodes of eight GPUs under Slurm: one task a GPU, which needs no other launcher. Ten minutes before the
# time is over (or when the job is preempted) every task is told, the step under way is finished, a checkpoint is written,
# and the job goes back into the queue.
#
# Needs: qft on all nodes, and an output_dir that they share. The recipe says distributed.nodes: 2.
#
#     sbatch recipes/cluster/slurm.sh recipe.yaml /shared/runs/mine
#
#SBATCH --job-name=qft
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@600
#SBATCH --open-mode=append
set -u
recipe=$1
export run=$2
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
export MASTER_PORT=29400

# An earlier part of the run has left a checkpoint, or not.
export resume=
for _ in "$run"/checkpoints/checkpoint-*/qft_checkpoint.json; do [ -e "$_" ] && resume=--resume; done

srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
    export LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    exec qft train "$0" --set output_dir="$run" ${resume:---overwrite}
' "$recipe"
code=$?

# EX_TEMPFAIL: --resume goes on.
[ "$code" -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"
exit "$code"
