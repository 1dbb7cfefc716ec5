#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Measures the figures of README.md and docs/measured.md and writes them to benchmarks/results/. Takes about half an hour
# on two cores; leave the machine alone meanwhile. Names given as arguments select some of them.
set -euo pipefail
cd "$(dirname "$0")/.."
out=benchmarks/results
mkdir -p "$out"

measure() {
  local name=$1
  shift
  [[ -z ${selected:-} || " $selected " == *" $name "* ]] || return 0
  echo "== $name"
  .venv/bin/python -m fastdense bench --json "$out/$name.json" "$@"
}

selected=$*
measure densenet121 --steps 9 --plot "$out/densenet121.png"
measure densenet201 --model densenet201 --batch 4 --steps 5
measure densenet121-compile --steps 5 --memory-batches 0 --variants plain,plain-channels-last,compile,balanced
measure densenet121-bfloat16 --dtype bfloat16 --steps 9 --memory-batches 0 \
  --variants plain,plain-channels-last,balanced,min
measure densenet121-eval --mode eval --steps 15 --memory-batches 0 --variants plain,plain-channels-last,balanced
measure cifar-bc100 --model densenet_cifar --depth 100 --growth-rate 12 --batch 64 --steps 5 --memory-batches 0
measure depth --sweep depth --depths 40,70,100,130 --batch 32 --plot "$out/depth.png"
measure dpn92 --model dpn92 --batch 4 --steps 7 --memory-batches 2,6 --memory balanced,min,reversible
measure dpn92-compile --model dpn92 --batch 4 --steps 5 --memory-batches 0 \
  --variants plain,plain-channels-last,compile,balanced
measure dpn92-bfloat16 --model dpn92 --batch 4 --dtype bfloat16 --steps 5 --memory-batches 0 \
  --variants plain,plain-channels-last,balanced,min
measure dpn68 --model dpn68 --batch 8 --steps 5 --memory-batches 0 --variants plain,plain-channels-last,balanced
measure dpn92-eval --model dpn92 --mode eval --batch 4 --steps 9 --memory-batches 0 \
  --variants plain,plain-channels-last,balanced,frozen
