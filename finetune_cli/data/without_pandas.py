"""Arrow without pandas, which it imports (a third of a second) as soon as it makes a column of Python values, to see if they are pandas'.

Who converts to or from pandas gets it all the same: Arrow then looks again.
"""

from __future__ import annotations

import importlib.abc
import sys
from typing import Any

import pyarrow as pa


class _Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError("hidden for a moment", name=name)


def go_without_pandas() -> None:
    """Have Arrow look while there is none."""
    if "pandas" in sys.modules:
        return
    hidden = _Hidden()
    sys.meta_path.insert(0, hidden)
    try:
        pa.array([None])
    finally:
        sys.meta_path.remove(hidden)
