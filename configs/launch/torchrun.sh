#!/usr/bin/env bash
# One run over several nodes, or over the GPUs of one: start this on every node (or see slurm.sbatch)
#   NODES=2 NODE_RANK=0 HEAD=node0 GPUS=8 bash configs/launch/torchrun.sh fit -c configs/dpo.yaml -c configs/overlays/fsdp.yaml
# NODES: nodes; NODE_RANK: number of this one, from 0; HEAD and PORT: where node 0 listens; GPUS: processes a node
set -euo pipefail
# When stopped, torchrun waits this long for a run to save (its own default is 30 seconds).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}"
exec torchrun --nnodes "${NODES:-1}" --node-rank "${NODE_RANK:-0}" --nproc-per-node "${GPUS:-1}" \
    --master-addr "${HEAD:-localhost}" --master-port "${PORT:-29400}" --no-python \
    lit-dpo "$@" --trainer.num_nodes "${NODES:-1}" --trainer.devices "${GPUS:-1}"
