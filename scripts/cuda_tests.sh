#!/usr/bin/env bash
# The tests of equality on a GPU: packed = padded, a batch in parts = the whole batch, a resumed run = an uninterrupted one, no update
# waits for the device. Needs the extra `test`; further arguments go to pytest.
#   bash scripts/cuda_tests.sh              on the first CUDA device
#   DEVICE=cpu bash scripts/cuda_tests.sh   the same tests without one
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
device="${DEVICE:-cuda}"
python="${PYTHON:-python}"
if [ "$device" = cuda ]; then
  "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "torch finds no CUDA device here" >&2; exit 5; }
  "$python" -c 'import torch; print("on", torch.cuda.get_device_name(), "with torch", torch.__version__)' >&2
fi
exec "$python" -m pytest -q -m device --device "$device" "$@"
