#!/usr/bin/env bash
# Where there are package registries: make gpu-parcel/, what a GPU machine without a network needs. See prepare.py.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${PYTHON:-$here/../../.venv/bin/python}"
[ -x "$(command -v "$python")" ] || { echo "prepare.sh: $python is missing; run make test once, or name one: PYTHON=python3 $0" >&2; exit 1; }
exec env TOKENIZERS_PARALLELISM=true "$python" "$here/prepare.py" "$@"
