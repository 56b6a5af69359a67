#!/usr/bin/env bash
# From text to a trained, layer-shared model in minutes on two CPU cores; nothing is downloaded.
# The text is Python's own standard library. Rerunning goes on where it stopped.
set -euo pipefail
trap 'exit 130' INT TERM # training itself answers a Ctrl-C with status 0

LIBRARY=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
DATA=data/quickstart
RUN=runs/quickstart

say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }

say "1/5 tokens: train a tokenizer on the text and pack it"
mobilellm prepare --input "$LIBRARY"/*.py --vocab_size 2048 --sequence_length 256 \
    --valid_fraction 0.05 --output "$DATA"

say "2/5 training: 6 blocks, each run twice"
mobilellm train --config configs/quickstart.py --workdir "$RUN" --config.data.path="$DATA"

say "3/5 evaluation on the held-out files"
mobilellm evaluate --checkpoint "$RUN" --data "$DATA"

say "4/5 what it writes"
mobilellm generate --checkpoint "$RUN" --prompt "def main(" --max_tokens 100 --temperature 0.7 --top_p 0.9

say "5/5 a Hugging Face folder"
# Not run by transformers here, which is not installed; `make phone` runs what it converts.
mobilellm convert --to hf --no-verify --checkpoint "$RUN" --output exports/quickstart

say "done"
echo "loss curve   $RUN/loss.png"
echo "checkpoints  $RUN/checkpoints"
echo "metrics      $RUN/metrics.jsonl; for TensorBoard (pip install tensorboard) $RUN/tensorboard"
echo "model        exports/quickstart"
echo "next         make phone: the same model in ExecuTorch, the runtime of phone apps"
