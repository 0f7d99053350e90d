"""The benchmark that kills real runs, in its short form."""

import json
import os
import subprocess
import sys

import pytest

from core.paths import REPOSITORY


@pytest.mark.skipif(not hasattr(os, "fork"), reason="it kills forked processes")
def test_killed_and_damaged_runs_end_as_undisturbed_ones(tmp_path):
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "torture.py"), "--quick"]
    result = tmp_path / "result.json"
    done = subprocess.run(
        [*command, "--result", str(result)],
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONUTF8": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(result.read_text(encoding="utf-8"))
    assert figures["failures"] == []
    assert (
        figures["sigkill at random times"]["equal"]
        == figures["sigkill at random times"]["runs"]
        == 3
    )
    assert figures["damaged states"]["fell back to the state before"] == 20
