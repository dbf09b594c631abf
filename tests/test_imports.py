"""What is left out of the imports is there for whoever asks for it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
from ran import ROOT

PROGRAM = """
import sys
from finetune_cli.models.imports import auto_class
import transformers
auto_class("AutoModelForSequenceClassification", transformers.BertConfig())
assert "transformers.models.bert.modeling_bert" in sys.modules
from finetune_cli import data
import pyarrow as pa
pa.array(["a", None])
assert not {"scipy.optimize", "pandas"} & set(sys.modules), "imported all the same"
from transformers.loss import loss_for_object_detection as losses
if "scipy" in sys.argv:
    assert [list(side) for side in losses.linear_sum_assignment([[2, 1], [1, 2]])] == [[0, 1], [1, 0]]
    losses.HungarianMatcher()
if "pandas" in sys.argv:
    import pandas as pd
    assert pa.table({"a": [1]}).to_pandas().equals(pd.DataFrame({"a": [1]}))
    assert pa.array(pd.Series([1, 2])).to_pylist() == [1, 2]
    assert pa.Table.from_pandas(pd.DataFrame({"x": [1]})).column("x").to_pylist() == [1]
"""


@pytest.mark.slow
def test_scipy_and_pandas_come_only_when_they_are_asked_for() -> None:
    here = [name for name in ("scipy", "pandas") if find_spec(name)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *here], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
