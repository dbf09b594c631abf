#!/usr/bin/env bash
# A check for CI, in seconds and without network: train a tiny model, state what it must reach, score it again, label from a pipe.
# A result below the expectation ends with exit 3, and so does this script.
set -euo pipefail

WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

RUN=$(ftune train +exp=smoke "run.root=$WORK/runs" offline=true expect.accuracy='>=0.36' expect.loss='<=1.2')

trained=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["test"]["accuracy"]["value"])' "$RUN/metrics.json")
scored=$(ftune eval "$RUN" offline=true "run.root=$WORK/runs" | python -c 'import json, sys; print(json.load(sys.stdin)["test"]["accuracy"]["value"])')
[ "$trained" = "$scored" ] || { echo "train said accuracy $trained, eval says $scored" >&2; exit 6; }

lines=$(printf 'Lovely soup.\nThe chair broke.\n' | ftune predict "$RUN" offline=true | wc -l)
[ "$lines" -eq 2 ] || { echo "two texts gave $lines predictions" >&2; exit 1; }

echo "smoke: accuracy $trained, eval the same, 2 predictions" >&2
