#!/usr/bin/env bash
# From a checkpoint to every format, each one run by its own runtime and compared with JAX:
#
#   launch/convert.sh runs/125m exports/125m [CONTEXT_LENGTH]
#
# needs: pip install -e '.[torch,executorch,gguf,litert]'. Rerunning makes what is still missing.
# A format that cannot hold the model (shared_kv first_visit, say) is left out and named at the end.
set -euo pipefail
trap 'exit 130' INT TERM

if [[ $# -lt 2 || $# -gt 3 ]]; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
CHECKPOINT=$1
OUTPUT=$2
CONTEXT=(${3:+--context_length "$3"})
failed=()

for target in hf:float32 hf:bfloat16 hf_compact:float32 pte:float32 gguf:float32 gguf:float16 \
    gguf:q8_0 gguf:q4_0 litertlm:float32 litertlm:int8; do
    format=${target%:*} dtype=${target#*:}
    folder=$OUTPUT/${format}_$dtype
    printf '\n\033[1m== %s, %s\033[0m\n' "$format" "$dtype"
    if [[ -f $folder/report.json ]]; then
        echo "$folder is there"
        continue
    fi
    mobilellm convert --to "$format" --dtype "$dtype" --checkpoint "$CHECKPOINT" \
        --output "$folder" ${CONTEXT[@]+"${CONTEXT[@]}"} || failed+=("$format $dtype")
done

printf '\n\033[1m== done\033[0m\n'
du -sh "$OUTPUT"/*/
echo "figures of each: $OUTPUT/*/report.md"
if [[ ${#failed[@]} -gt 0 ]]; then
    echo "not made: $(IFS=,; echo "${failed[*]}")" >&2
    exit 1
fi
