#!/usr/bin/env bash
# Trains on this machine, in one process: on all its GPUs or TPU chips, else on its CPU.
#
#   CONFIG=configs/125m.py:h100-8 DATA=data/corpus launch/local.sh [--config.KEY=VALUE ...]
#
# Ctrl-C and SIGTERM save the current step. Rerunning goes on from the newest checkpoint.
# Output is appended to $WORKDIR/logs/local.log.
set -euo pipefail

CONFIG=${CONFIG:-configs/laptop.py}
DATA=${DATA:-data/corpus}
WORKDIR=${WORKDIR:-runs/$(basename "${CONFIG%%.py*}")}

mkdir -p "$WORKDIR/logs"
printf '\n== %s on %s\n' "$(date -u +%FT%TZ)" "$(hostname)" >>"$WORKDIR/logs/local.log"
# exec: signals reach the training itself. tee outlives them, to see its last words.
exec mobilellm train --config "$CONFIG" --workdir "$WORKDIR" --config.data.path="$DATA" \
    --num_processes 1 "$@" > >(trap '' INT TERM; exec tee -a "$WORKDIR/logs/local.log") 2>&1
