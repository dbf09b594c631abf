"""How does ftune scale with rows, with their length and with processes?

    python scripts/bench/scaling.py data           10^3 to 10^6 rows; --largest: to 10^7. Writes scripts/results/scaling_data.json
    python scripts/bench/scaling.py length         sequences of 16 to 512 tokens at equal tokens, padded and packed
    python scripts/bench/scaling.py processes      device.processes=1,2,... as many as there are cores, weak and strong
    python scripts/bench/scaling.py data --smoke   seconds, on few rows: shows that it works, measures nothing

``--help`` behind one of the three says more.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import processes
import scaling_data
import scaling_length
import scaling_processes

PARTS: dict[str, Callable[[Sequence[str]], None]] = {
    "data": scaling_data.main,
    "length": scaling_length.main,
    "processes": scaling_processes.main,
}


def main(typed: Sequence[str] | None = None) -> None:
    part, *rest = [*(sys.argv[1:] if typed is None else typed), ""]
    if part not in PARTS:
        print(__doc__)
        sys.exit(0 if part in ("-h", "--help") else 2)
    PARTS[part](rest[:-1])


if __name__ == "__main__":
    processes.begin(main, {**scaling_data.JOBS, **scaling_length.JOBS})
