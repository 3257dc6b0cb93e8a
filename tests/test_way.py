"""The run directory belongs to one process at a time."""

import subprocess
import sys

import pytest

from abyssal.stages.way import alone


def test_a_second_process_is_refused_and_the_next_one_is_not(tmp_path):
    other = f"from pathlib import Path\nfrom abyssal.stages.way import alone\nwith alone(Path({str(tmp_path)!r})): pass"
    with alone(tmp_path):
        with pytest.raises(ValueError, match="another process is walking"), alone(tmp_path):
            pass
        refused = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True)
        assert refused.returncode != 0 and "another process is walking" in refused.stderr
    assert subprocess.run([sys.executable, "-c", other]).returncode == 0
