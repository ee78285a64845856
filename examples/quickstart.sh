#!/usr/bin/env bash
# From nothing to an evaluated encoder on two CPU cores: the path that your own data would take.
#
#   images + documents -> tokenizer -> corpus -> pre-training on two processes -> probes of the frozen encoder
#
# Everything is written below runs/quickstart (or the folder given as first argument).
set -euo pipefail
cd "$(dirname "$0")/.."
run=${1:-runs/quickstart}
export OMP_NUM_THREADS=1
rm -rf "$run"
mkdir -p "$run"

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

say "1/5  Handwritten digits in interleaved documents (MMC4 layout): $run/digits"
python examples/digits/make_corpus.py --output "$run/digits"

say "2/5  Tokenizer: $run/tokenizer.model"
python tools/train_tokenizer.py --input "$run"/digits/data/*.zip --output "$run/tokenizer.model" --vocab-size 1024

say "3/5  Preprocessing into an indexed corpus: $run/corpus"
python tools/preprocess_data.py --input "$run"/digits/data/*.zip --image-root "$run/digits/images" \
    --tokenizer-model "$run/tokenizer.model" --output "$run/corpus" --num-workers 2

say "4/5  Pre-training on two processes (data parallel); no label is used"
torchrun --nproc-per-node 2 pretrain_lcl.py --preset tiny --data-path "$run/corpus" \
    --save "$run/checkpoints" --log-dir "$run/logs"

say "5/5  What the frozen encoder has learned: held-out digits, never seen in a document"
python tools/probe.py "$run/checkpoints" --labels "$run/digits/labels.csv" --image-root "$run/digits/images" \
    --output "$run/probe.json"

checkpoint=$(ls -d "$run"/checkpoints/step-* | tail -n 1)
say "Done. Written:"
printf '  %-14s %s\n' \
    "checkpoint" "$checkpoint" \
    "TensorBoard" "$run/logs/tensorboard    (tensorboard --logdir $run/logs)" \
    "curves" "$run/logs/curves.html    (open in a browser)" \
    "metrics" "$run/logs/metrics.jsonl" \
    "probes" "$run/probe.json"
