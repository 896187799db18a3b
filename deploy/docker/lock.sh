#!/bin/sh
# Writes the lock files anew: every distribution with its version and the digests of its files. Needs uv.
set -eu
cd "$(dirname "$0")"
for name in build node training; do
    uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-emit-index-url \
        --constraint ../../constraints.txt --custom-compile-command deploy/docker/lock.sh \
        --output-file "$name.lock" "$name.in"
done
# PyTorch and what it takes along for a GPU are the builder's choice: see the Dockerfile.
awk '/^[a-z]/ { left_out = /^(torch==|triton==|nvidia-|cuda-)/ } !left_out' training.lock > training.lock.new
mv training.lock.new training.lock
