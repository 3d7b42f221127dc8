#!/usr/bin/env bash
# Gradescope runs this once, as root, when it builds the image: Python and the CPU build of PyTorch.
set -euo pipefail
root=${AUTOGRADER_ROOT:-/autograder}

export DEBIAN_FRONTEND=noninteractive
apt-get update
apt-get install -y python3 python3-venv
python3 -m venv "$root/venv"  # newer Ubuntus refuse pip outside of one
"$root/venv/bin/pip" install --no-cache-dir "torch>=2.6" --index-url https://download.pytorch.org/whl/cpu
"$root/venv/bin/pip" install --no-cache-dir numpy
