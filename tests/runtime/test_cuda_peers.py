"""Peers of `slimba bench --backend cuda`, with stand-ins for their packages and for the clock; and the plot.

Run: `pytest tests/runtime/test_cuda_peers.py`.
"""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from xml.etree import ElementTree

import pytest

from slimba.errors import UserError
from slimba.models.configs import named_spec
from slimba.runtime.backends import cuda_peers
from slimba.runtime.measure import DecodeRow

torch = pytest.importorskip("torch")


@dataclass
class Config:
    d_model: int = 0
    n_layer: int = 0
    vocab_size: int = 0
    ssm_cfg: dict[str, Any] = field(default_factory=dict)


class Model:
    """Takes a millisecond a token with a graph, ten without."""

    clock = 0.0
    lengths: ClassVar[list[tuple[int, int, bool]]] = []

    def __init__(self, config: Config, device: str, dtype: Any) -> None:
        assert config.d_model == 2048 and config.ssm_cfg["use_mem_eff_path"] is False

    def eval(self) -> Model:
        return self

    def generate(self, input_ids: Any, max_length: int, cg: bool, top_k: int) -> None:
        Model.lengths.append((len(input_ids), max_length, cg))
        Model.clock += 0.5 + (max_length - 1) * (0.001 if cg else 0.01)

    def __call__(self, ids: Any, num_last_tokens: int) -> None:
        Model.clock += 0.25


def test_a_peer_is_measured_by_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("mamba_ssm")
    package.__version__, package.MambaLMHeadModel = "9", Model  # type: ignore[attr-defined]
    module = types.ModuleType("mamba_ssm.models.config_mamba")
    module.MambaConfig = Config  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mamba_ssm", package)
    monkeypatch.setitem(sys.modules, "mamba_ssm.models.config_mamba", module)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, dtype, device: zeros(*shape, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(cuda_peers.time, "perf_counter", lambda: Model.clock)
    rows = cuda_peers.gpu_peer_speeds(named_spec("mamba2-1.3b"), [1, 8], 512, ["mamba-ssm"])
    got = [(r["how"], r["batch"], round(r["decode_tokens_per_second"]), r["prefill_tokens_per_second"]) for r in rows]
    assert got == [
        ("CUDA graph", 1, 1000, 2048.0),
        ("no CUDA graph", 1, 100, None),
        ("CUDA graph", 8, 8000, 16384.0),
    ]
    assert Model.lengths[0] == (1, 1 + cuda_peers.LONG, True)  # the longest first


def test_a_peer_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    rows = cuda_peers.gpu_peer_speeds(named_spec("mamba2-1.3b"), [1], 512, ["mamba-ssm"])
    assert [r["peer"] for r in rows] == ["mamba-ssm"] and "ModuleNotFoundError" in rows[0]["missing"]
    with pytest.raises(UserError, match="unknown peer 'vllm'"):
        cuda_peers.installed_peers(["vllm"])


def test_the_plot_shows_every_line(tmp_path: Path) -> None:
    from slimba.cli.bench_plot import write_plot

    rows = [DecodeRow(b, 10**8, 1e-4, 2e-4, [2e-4], 0.5, b / 2e-4) for b in (1, 8)]
    peer = {"peer": "mamba-ssm", "how": "CUDA graph", "batch": 8, "decode_tokens_per_second": 900.0}
    write_plot(tmp_path / "speed.svg", {"decode": rows, "gpu_peers": [peer, {"peer": "transformers", "missing": "no"}]})
    text = " ".join(ElementTree.parse(tmp_path / "speed.svg").getroot().itertext())
    for name in ("Slimba", "limit of the memory", "mamba-ssm CUDA graph", "tokens/s"):
        assert name in text
    assert "transformers" not in text


def test_what_was_measured_on_a_gpu_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from slimba.cli.bench import _print
    from slimba.runtime.measure import PrefillRow

    monkeypatch.setenv("COLUMNS", "200")
    peer = {
        "peer": "mamba-ssm", "version": "9", "how": "CUDA graph", "batch": 8, "decode_tokens_per_second": 2000.0,
        "prefill_tokens_per_second": None,
    }  # fmt: skip
    record = {
        "model": "mamba2-1.3b as dfssm (random weights)",
        "machine": {"gpu": "H100", "load_average": None},
        "bandwidth": 3e12,
        "difference_to_reference": {"steps": 1e-5, "prompt": 8e-3},
        "products": {"1": "23-bit fixed point", "8": "float16", "prompt": "float16"},
        "numerics": {"activations": "float32", "state": "int8"},
        "peak_gpu_bytes": 4 * 10**8,
        "decode": [DecodeRow(b, 10**8, 1e-4, 2e-4, [2e-4], 0.5, b / 2e-4) for b in (1, 8)],
        "prefill": [PrefillRow(b, 512, 0.01, [0.01], b * 51200.0) for b in (1, 8)],
        "gpu_peers": [peer, {"peer": "transformers", "missing": "no kernels"}],
    }
    _print(record)
    text = capsys.readouterr().out
    for words in ("H100", "state int8", "23-bit fixed point (1), float16 (8)", "8.0e-03", "GPU memory 400 MB", "20.00"):
        assert words in " ".join(text.split())
    assert "transformers was not measured: no kernels" in text
