"""The parts of `cuda_check.py --only quick` on this processor; on a GPU they are run by themselves.

Run: `pytest -m "slow or not slow" tests/benchmarks/test_cuda_parts.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from kernels.cuda_host import host_gpu

pytest.importorskip("torch")
cuda_parts = pytest.importorskip("cuda_parts")

KERNELS = Path(__file__).parents[2] / "src/slimba/kernels/cuda"
NO_KERNELS = {"common.cuh"}  # files that hold nothing to be run


def test_every_file_of_kernels_is_in_a_part() -> None:
    files = {f.name for f in KERNELS.glob("*.cu*")} - NO_KERNELS
    assert {name for part in cuda_parts.PARTS.values() for name in part.kernels.split()} == files


@pytest.mark.slow
@pytest.mark.parametrize("name", cuda_parts.PARTS)
def test_part(name: str) -> None:
    gpu = host_gpu(blocks=12, bakes=True, warpgroups=True)
    found = cuda_parts.mixers(gpu, heads=8) if name == "mixer" else cuda_parts.PARTS[name].compare(gpu)
    assert "not for this GPU" not in found
    print(name, found)
