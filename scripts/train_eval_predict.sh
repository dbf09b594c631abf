#!/usr/bin/env bash
# The whole way in a script: train, score on a file, label new texts. Without arguments it does so on the shipped reviews.
#
#   scripts/train_eval_predict.sh                                   # +exp=sentiment
#   scripts/train_eval_predict.sh data.train=my.csv model.path=bert-base-cased
#   TEST=new.csv INPUT=inbox.txt OUTPUT=labels.jsonl scripts/train_eval_predict.sh data.train=my.csv
set -euo pipefail

[ $# -gt 0 ] || set -- +exp=sentiment

# Any exit code but 0 ends the script here: 2 is the input, 3 a missed expectation, 75 preempted (README, "Exit codes").
RUN=$(ftune train "$@")

ftune eval "$RUN" ${TEST:+"data.test=$TEST"} >"$RUN/scores.json"

if [ -n "${INPUT:-}" ]; then
  ftune predict "$RUN" "input=$INPUT" "output=${OUTPUT:-$RUN/labels.jsonl}"
else
  printf '%s\n' "Not once did it let me down." "Nothing says luxury like a mouse in the minibar." | ftune predict "$RUN" >"$RUN/labels.jsonl"
fi

echo "$RUN"
