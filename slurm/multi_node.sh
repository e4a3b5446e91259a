#!/usr/bin/env bash
# Trains the world model on several nodes, by the module that the workflow uses. The processes of all nodes meet at the first
# one (torchrun's rendezvous) and split the configured batch: the number of GPUs changes the speed alone. From a clone:
#
#   snakemake --profile slurm --until cache_latents results/world_model/model.safetensors
#   sbatch slurm/multi_node.sh $(snakemake --cores 1 --dry-run --printshellcmds results/world_model/model.safetensors |
#       grep -o -- '--config .* --state [^ ]*')
#   snakemake --profile slurm results/tables/policy_ranking.csv
#
# Stopped at its time limit it leaves a checkpoint; the same command continues. Edit what follows for your cluster.
#SBATCH --job-name=world_model
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --mem=200G
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --output=world_model-%j.log
set -euo pipefail

# A lost process: all start again from the checkpoint. Without the variable they would look for each other at the addresses of
# before (pytorch issue 135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export REHEARSAL_GROUP_TIMEOUT=${REHEARSAL_GROUP_TIMEOUT:-1800} NCCL_DEBUG=${NCCL_DEBUG:-WARN}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=${RENDEZVOUS_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
srun torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-1}" --max-restarts=3 \
  --rdzv-backend=c10d --rdzv-endpoint="$first:$port" --rdzv-id="$SLURM_JOB_ID" \
  -m workflow_src.training.world_model "$@"
