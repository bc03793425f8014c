"""What importing the package does for the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

KEPT = {"LRU_CACHE_CAPACITY": "128", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "512"}

MULTIPLY = """
import imglish
import torch

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

torch.set_num_threads(1)
rows, weight = torch.randn(1000, 64, dtype=torch.bfloat16), torch.randn(64, 64, dtype=torch.bfloat16)
for count in range(1, 651):
    rows[:count] @ weight
before = resident()
for count in range(651, 951):
    rows[:count] @ weight
print(resident() - before)
"""


def run(code: str, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in KEPT}
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident memory from /proc")
def test_sizes_of_products_that_do_not_come_back_do_not_fill_the_memory() -> None:
    """300 further row counts cost 200 MB where compiled code of all is kept, 12 MB here."""
    assert float(run(MULTIPLY)) < 80


def test_the_users_own_setting_is_kept() -> None:
    code = f"import os, imglish; print(*(os.environ[name] for name in {list(KEPT)}))"
    assert run(code).split() == list(KEPT.values())
    assert run(code, LRU_CACHE_CAPACITY="7").split() == ["7", "512"]
