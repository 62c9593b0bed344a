#!/usr/bin/env bash
# The GPU programme on a bare machine: joins the parts of a parcel, installs what they bring and this checkout, runs the steps.
#
#   scripts/gpu/run.sh [--parts FOLDER...] [--data DATA] [--results RESULTS] [--small] [--only STEP...] [more of programme.py]
#
# It can be called again as parts arrive: steps that are complete are passed over. `--small` tries all steps on a CPU. Nothing
# is fetched from a network. PYTHON names the interpreter that has torch (default: the first of python, python3 that has it).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
data=$root/gpu-parcel/data
parts=() rest=()
while (($#)); do
    case $1 in
        --parts) shift; while (($#)) && [[ $1 != --* ]]; do parts+=("$(realpath -- "$1")"); shift; done ;;
        --data) data=$(realpath -m -- "${2:?--data needs a folder}"); shift 2 ;;
        -h | --help) sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit ;;
        *) rest+=("$1"); shift ;;
    esac
done

if [[ -z ${PYTHON:-} ]]; then
    for PYTHON in python python3 none; do
        "$PYTHON" -c 'import torch' 2>/dev/null && break
    done
    [[ $PYTHON != none ]] || { echo "no Python with torch on the path; name one: PYTHON=/path/to/python $0" >&2; exit 1; }
fi
export PIP_BREAK_SYSTEM_PACKAGES=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
install=("$PYTHON" -m pip install --quiet --no-index --no-deps)

if ((${#parts[@]})); then
    mkdir -p "$data"
    "$PYTHON" "$root/scripts/gpu/parcel.py" join "${parts[@]}" "$data" || echo "the parts cannot all be joined; going on with what is there" >&2
fi
# one wheel at a time: one that does not fit this machine must not keep the others out; a small run changes nothing here
for wheel in "$data"/wheels/*.whl; do
    [[ -e $wheel && " ${rest[*]-} " != *" --small "* ]] || continue
    "${install[@]}" "$wheel" || echo "$(basename "$wheel") cannot be installed; going on without it" >&2
done
# the checkout itself, unless it is what this Python imports already
installed='import sys, pathlib, dijiang; sys.exit(pathlib.Path(dijiang.__file__).resolve().parents[1] != pathlib.Path(sys.argv[1]))'
if ! "$PYTHON" -P -c "$installed" "$root" 2>/dev/null && ! "${install[@]}" --no-build-isolation --editable "$root" 2>/dev/null; then
    echo "pip cannot install the checkout; linking it into $data/site" >&2
    "$PYTHON" "$root/scripts/link_checkout.py" "$data/site"
    export PYTHONPATH=$data/site${PYTHONPATH:+:$PYTHONPATH}
fi

exec "$PYTHON" "$root/scripts/gpu/programme.py" --data "$data" ${rest[@]+"${rest[@]}"}
