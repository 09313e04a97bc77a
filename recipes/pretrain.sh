#!/usr/bin/env bash
# Trains the bundled model, and a dense model equal in active parameters on the same tokens, scores
# both on held-out text, and lays the first into tramontane/assets/ with its card. Each goes through
# the stages of recipes/pretrain/, each stage on from the model of the one before.
#
#   recipes/pretrain.sh            hours on two cores; run it again to go on after an interruption
#   recipes/pretrain.sh --smoke    the same line at toy size, in under two minutes; assets stay
#
# DATA=../shared/data/pretrain   RUNS=runs   BIN=.venv/bin
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${DATA:-../shared/data/pretrain} RUNS=${RUNS:-runs} BIN=${BIN:-.venv/bin}
MOE=tramontane-23m DENSE=tramontane-9m-dense
stages=(recipes/pretrain/stage*.toml)

fail() { echo "pretrain.sh: $*" >&2; exit 1; }
[ -x "$BIN/tramontane" ] || fail "$BIN/tramontane is missing; run make test once, or set BIN"
[ -d "$DATA" ] || fail "$DATA is missing; set DATA to the folder of the .jsonl.gz files"

if [ "${1:-}" = --smoke ]; then
    RUNS=$(mktemp -d)
    trap 'rm -rf "$RUNS"' EXIT
    flags=(--source "tinystories=tinystories.jsonl.gz" --seq-len 128 --batch-size 4 --warmup-steps 1
           --vocab-size 1024 --dtype float32 --steps 2 --eval-every 2 --save-every 2
           --sample-every 0)
    scored=(tinystories=tinystories.jsonl.gz) max_tokens=4000
elif [ $# -eq 0 ]; then
    flags=()
    mapfile -t scored < <(sed -n 's/^  "\([a-z_]*=[^:]*\):.*/\1/p' "${stages[0]}")
    max_tokens=100000
else
    fail "unknown argument $1; there is --smoke"
fi

# train PRESET [FLAG ...]: all stages, each begun or taken up where it was interrupted; the flags are
# the first one's. The last run is RUNS/PRESET.
train() {
    local preset=$1 from=("${@:2}") out stage resume
    for stage in "${stages[@]}"; do
        out=$RUNS/$preset-$(basename "$stage" .toml) resume=()
        [ "$stage" = "${stages[-1]}" ] && out=$RUNS/$preset
        if [ ! -d "$out/model" ]; then
            compgen -G "$out/checkpoints/step-*" > /dev/null && resume=(--resume)
            "$BIN/tramontane" train "$stage" --data-dir "$DATA" --model "$preset" --out "$out" \
                --tokens-dir "$RUNS/tokens" "${from[@]}" "${flags[@]}" "${resume[@]}"
        fi
        from=(--init-from "$out/model")
    done
}

score() {
    "$BIN/tramontane" perplexity "$RUNS/$1/model" --data-dir "$DATA" --source "${scored[@]}" \
        --max-tokens "$max_tokens" --json > "$RUNS/$1/scores.json"
}

train "$MOE"
train "$DENSE" --tokenizer "$RUNS/$MOE/model"
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
