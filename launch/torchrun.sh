#!/usr/bin/env bash
# Trains on this node as one of NNODES, and starts again where it stopped after a failure or a restart:
#     NNODES=2 HEAD=node1:29400 IS_HEAD=1 NPROC_PER_NODE=8 bash launch/torchrun.sh --config X.yaml section.key=value ...
# IS_HEAD=0 on the other nodes. NNODES=1:4 goes on with the nodes that are left, and takes in those that come back.
# The environment with distseg must be active; paths are relative to the working directory.
# LOCAL_ADDR is this node's address where its name does not lead to it, MIXED_PRECISION no, bf16 (default) or fp16.
set -euo pipefail
. "$(dirname "$0")/nccl.env"

nnodes=${NNODES:-1}
rendezvous=(--rdzv_backend c10d --rdzv_endpoint "${HEAD:-localhost:0}" --rdzv_id "${JOB_ID:-distseg}")
if [ -n "${HEAD:-}" ]; then
    # Who hosts is said: guessing it from names costs two minutes and fails (torch 2.14). A node is given up after 6 s.
    rendezvous+=(--rdzv_conf "is_host=${IS_HEAD:?1 on the node of HEAD, 0 on the others},join_timeout=120,last_call_timeout=5,keep_alive_interval=2,keep_alive_max_attempt=3")
fi
export ACCELERATE_MIXED_PRECISION=${MIXED_PRECISION:-bf16}
# The agent hands these signals on, so that training saves, and kills what is left SHUTDOWN_S later (torch: 30).
exec torchrun --nnodes "$nnodes" --nproc_per_node "${NPROC_PER_NODE:-gpu}" "${rendezvous[@]}" \
    ${LOCAL_ADDR:+--local_addr "$LOCAL_ADDR"} --max-restarts "${MAX_RESTARTS:-3}" --monitor-interval 1 \
    --shutdown-timeout "${SHUTDOWN_S:-100}" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 -m distseg.train "$@" --resume
