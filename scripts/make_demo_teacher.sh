#!/usr/bin/env bash
# Rebuild the bundled teacher from public packages: texts, tokenizer, training, full pass of distillation, figures.
#
#     bash scripts/make_demo_teacher.sh            # all of it; needs a GPU for about three minutes
#     DEVICE=cpu bash scripts/make_demo_teacher.sh # the same on a CPU: several hours
#
# Debian or Ubuntu (apt-get, dpkg). Run it in the repository's root with slimba[train] installed. The texts and the
# tokenizer come out byte for byte; the weights depend on the device's arithmetic.
set -euo pipefail
device=${DEVICE:-cuda}
texts=.local/demo-texts
assets=src/slimba/assets

python scripts/fetch_texts.py
python scripts/train_tokenizer.py
slimba pretrain "$assets/demo-teacher" --data "$texts/train.txt.zst" --tokenizer "$texts/tokenizer.json" \
    --device "$device" --overwrite
mkdir -p "$assets/demo-text"
cp "$texts/demo-train.txt" "$assets/demo-text/train.txt"
cp "$texts/demo-heldout.txt" "$assets/demo-text/heldout.txt"

# what a full pass reaches, shown by `slimba demo` beside its own minutes
slimba compress demo-teacher benchmarks/models/demo-teacher-1bit --data "$texts/train.txt.zst" \
    --set window=512 --set batch=8 --device "$device" --overwrite
slimba eval demo-teacher --text "$assets/demo-text/heldout.txt" --window 512 --backend cpu \
    --json benchmarks/results/demo-teacher.json
slimba eval benchmarks/models/demo-teacher-1bit --text "$assets/demo-text/heldout.txt" --window 512 --backend cpu \
    --json benchmarks/results/demo-teacher-1bit.json
python benchmarks/demo_full_pass.py
