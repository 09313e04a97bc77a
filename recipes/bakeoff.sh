#!/usr/bin/env bash
# Trains every arm of recipes/bakeoff.toml with the same tokens, then with the same time, three seeds
# each; scores them, and prints the table of docs/routing-bakeoff.md.
#
#   recipes/bakeoff.sh             hours on two cores; run it again to go on after an interruption:
#                                  what is finished is not run again
#   recipes/bakeoff.sh --write     the same, and writes the table into docs/routing-bakeoff.md
#   recipes/bakeoff.sh --smoke     all arms at toy size on made-up text, in about a minute
#   recipes/bakeoff.sh --arms mixtral switch
#   recipes/bakeoff.sh --recipe recipes/z_loss.toml    other arms, a table of their own
#
# DATA=../shared/data/pretrain   RUNS=runs/bakeoff   BIN=.venv/bin
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${DATA:-../shared/data/pretrain} RUNS=${RUNS:-runs/bakeoff} BIN=${BIN:-.venv/bin}

fail() { echo "bakeoff.sh: $*" >&2; exit 1; }
[ -x "$BIN/python" ] || fail "$BIN/python is missing; run make test once, or set BIN"
case " $* " in
    *" --smoke "*) RUNS=$(mktemp -d) DATA=$RUNS; trap 'rm -rf "$RUNS"' EXIT ;;
    *) [ -d "$DATA" ] || fail "$DATA is missing; set DATA to the folder of the .jsonl.gz files" ;;
esac
PYTHONPATH=$PWD "$BIN/python" recipes/bakeoff.py --runs "$RUNS" --data "$DATA" "$@"
