"""Int8 activations of the CUDA engine on trained models, layer by layer: on this processor, and `gpu` on a GPU.

Run: `pytest tests/runtime/test_cuda_trained.py`. Whole models: `benchmarks/cuda_check.py --only trained`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kernels.cuda_host import host_gpu
from runtime.trained_layers import ALLOWED, FEWEST, compare_layers
from slimba.checkpoints.checkpoint import Checkpoint
from slimba.checkpoints.reader import open_checkpoint
from slimba.data.tokenizer import Tokenizer

torch = pytest.importorskip("torch")

ROOT = Path(__file__).parents[2]
TEXTS = ROOT / "src/slimba/assets/demo-text"


def trained(kind: str, folder: Path) -> tuple[Checkpoint, np.ndarray]:
    """A model of benchmarks/models, or the bundled teacher by quamba2; and ids of a text it was not trained on."""
    import slimba

    path = ROOT / "benchmarks/models" / kind
    if kind in ("w8a8", "w4a8"):
        path = folder / kind
        data = [TEXTS / "train.txt"]
        slimba.compress("demo-teacher", path, method="quamba2", data=data, mode=kind, windows=2, check_windows=0,
                        window=128, device="cpu")  # fmt: skip
    elif not path.exists():
        pytest.skip(f"no {path}")
    text = (TEXTS / "heldout.txt").read_text(encoding="utf-8")[:4000]
    return open_checkpoint(path), np.array(Tokenizer.from_file(path / "tokenizer.json").encode(text), np.int32)


def engines(gpu: Any, activations: str = "int8") -> Any:
    from slimba.runtime.backends.cuda import CudaEngine

    return lambda layer, exact: CudaEngine(layer, activations=activations, gpu=gpu, exact=exact)


@pytest.mark.parametrize("kind", ["demo-teacher-1bit", "w8a8", "w4a8"])
def test_a_layer_rounds_as_the_reference_does(kind: str, tmp_path: Path) -> None:
    checkpoint, ids = trained(kind, tmp_path)
    (found,) = compare_layers(checkpoint, ids[:FEWEST], engines(host_gpu(blocks=12)), layers=[5])
    assert found.right, found


def test_an_engine_that_does_not_round_is_seen(tmp_path: Path) -> None:
    checkpoint, ids = trained("demo-teacher-1bit", tmp_path)
    (found,) = compare_layers(checkpoint, ids[:FEWEST], engines(host_gpu(blocks=12), "float32"), layers=[2])
    assert all(abs(getattr(found, name) - 1) < 0.1 for name in ALLOWED) and not found.right


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["mamba2-25m-1bit", "w8a8", "w4a8"])
def test_every_layer_on_a_gpu(kind: str, tmp_path: Path) -> None:
    from slimba.runtime.backends.cuda_device import open_gpu

    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    checkpoint, ids = trained(kind, tmp_path)
    wrong = [f for f in compare_layers(checkpoint, ids[:256], engines(open_gpu()), device="cuda") if not f.right]
    assert not wrong, wrong
