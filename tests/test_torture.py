"""The benchmark that kills real runs, in its short form."""

import json
import os
import subprocess
import sys

import pytest

from core.paths import REPOSITORY


@pytest.mark.skipif(not hasattr(os, "fork"), reason="it kills forked processes")
def test_killed_and_damaged_runs_end_as_undisturbed_ones(tmp_path):
    result = tmp_path / "result.json"
    torture = str(REPOSITORY / "benchmarks" / "torture.py")
    done = subprocess.run(
        [sys.executable, torture, "--quick", "--result", str(result)],
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONUTF8": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(result.read_text(encoding="utf-8"))
    assert figures["failures"] == []
    for name in ("sigkill at random times", "sigkill at the calls of a save"):
        runs = figures[name].get("runs", figures[name].get("points"))
        assert figures[name]["equal"] == runs > 0
    assert figures["damaged states"]["fell back to the state before"] == 20
