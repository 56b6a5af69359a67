#!/usr/bin/env bash
# The quickstart's model as a file for phones: written, run by ExecuTorch, compared with JAX.
set -euo pipefail
trap 'exit 130' INT TERM

RUN=runs/quickstart
OUTPUT=exports/quickstart_pte

if [[ ! -d $RUN/checkpoints ]]; then
    echo "error: $RUN has no checkpoint: run 'make quickstart' first" >&2
    exit 2
fi
mobilellm convert --to pte --checkpoint "$RUN" --output "$OUTPUT"
echo
echo "For the app: $OUTPUT/model.pte and $OUTPUT/tokenizer.json; docs/phone.md says how."
