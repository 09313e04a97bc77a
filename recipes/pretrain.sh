#!/usr/bin/env bash
# Trains the bundled model, and a dense model equal in active parameters on the same tokens, scores
# both on held-out text, and lays the first into tramontane/assets/ with its card.
#
#   recipes/pretrain.sh            hours on two cores; run it again to go on after an interruption
#   recipes/pretrain.sh --smoke    the same line at toy size, in under two minutes; assets stay
#
# DATA=../shared/data/pretrain   RUNS=runs   STEPS=12000   BIN=.venv/bin
#
# INIT_FROM=tramontane/assets goes on from a model instead of random weights, for STEPS more, with
# other documents first (SEED=2). The dense model then sees as many tokens as both stages together.
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${DATA:-../shared/data/pretrain} RUNS=${RUNS:-runs} STEPS=${STEPS:-12000} BIN=${BIN:-.venv/bin}
INIT_FROM=${INIT_FROM:-} SEED=${SEED:-1}
MOE=tramontane-23m DENSE=tramontane-9m-dense

fail() { echo "pretrain.sh: $*" >&2; exit 1; }
[ -x "$BIN/tramontane" ] || fail "$BIN/tramontane is missing; run make test once, or set BIN"
[ -d "$DATA" ] || fail "$DATA is missing; set DATA to the folder of the .jsonl.gz files"

if [ "${1:-}" = --smoke ]; then
    RUNS=$(mktemp -d) STEPS=20
    trap 'rm -rf "$RUNS"' EXIT
    flags=(--source "tinystories=tinystories.jsonl.gz" --seq-len 128 --batch-size 4 --warmup-steps 5
           --vocab-size 1024 --dtype float32 --eval-every 10 --save-every 10 --sample-every 0)
    scored=(tinystories=tinystories.jsonl.gz) max_tokens=4000
elif [ $# -eq 0 ]; then
    flags=()
    mapfile -t scored < <(sed -n 's/^  "\([a-z_]*=[^:]*\):.*/\1/p' recipes/pretrain.toml)
    max_tokens=100000
else
    fail "unknown argument $1; there is --smoke"
fi

# train NAME PRESET STEPS [FLAG ...]: start, or go on where it was interrupted
train() {
    local out=$RUNS/$1 resume=()
    [ -d "$out/model" ] && return
    compgen -G "$out/checkpoints/step-*" > /dev/null && resume=(--resume)
    "$BIN/tramontane" train recipes/pretrain.toml --data-dir "$DATA" --model "$2" --out "$out" \
        --steps "$3" "${flags[@]}" "${resume[@]}" "${@:4}"
}

# How many steps see as many tokens as the stages of the model in NAME together.
count_steps() {
    "$BIN/python" - "$RUNS/$1/model/training.json" << 'END'
import json, sys
stages = json.load(open(sys.argv[1]))["stages"]
print(-(-sum(stage["tokens"] for stage in stages) // stages[-1]["tokens_per_step"]))
END
}

score() {
    "$BIN/tramontane" perplexity "$RUNS/$1/model" --data-dir "$DATA" --source "${scored[@]}" \
        --max-tokens "$max_tokens" --json > "$RUNS/$1/scores.json"
}

train "$MOE" "$MOE" "$STEPS" --seed "$SEED" ${INIT_FROM:+--init-from "$INIT_FROM"}
train "$DENSE" "$DENSE" "$(count_steps "$MOE")" --tokenizer "$RUNS/$MOE/tokenizer"
score "$MOE"
score "$DENSE"
"$BIN/python" recipes/write_card.py "$RUNS/$MOE" "$RUNS/$DENSE" > "$RUNS/$MOE/model/README.md"
if [ "${1:-}" = --smoke ]; then
    echo "Once upon a time" | "$BIN/tramontane" run "$RUNS/$MOE/model" --max-tokens 20
    echo "smoke run done"
else
    # Whole or not at all: a model that is running keeps the file it has mapped.
    rm -rf tramontane/.assets-new && cp -r "$RUNS/$MOE/model" tramontane/.assets-new
    rm -rf tramontane/assets && mv tramontane/.assets-new tramontane/assets
    echo "the bundled model is in tramontane/assets/"
fi
