"""Other engines at the same shape on the same GPU: what `slimba bench --backend cuda` compares with.

    rows = gpu_peer_speeds(named_spec("mamba2-1.3b"), batches=[1, 8], prompt_len=512, peers=("mamba-ssm",))

Random float16 weights, where a peer is installed. A decode time is the difference between a long and a short
generation, so prompts and preparations do not count; each is the fastest of REPEATS. Run the tests:
`pytest tests/runtime/test_cuda_peers.py`.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable, Sequence
from typing import Any

from slimba.errors import UserError
from slimba.models.configs import to_mamba_ssm_config, to_transformers_config
from slimba.models.spec import ModelSpec

__all__ = ["GPU_PEERS", "gpu_peer_speeds", "installed_peers"]

GPU_PEERS = {"mamba-ssm": "mamba_ssm", "transformers": "transformers"}
SHORT, LONG = 8, 40  # new tokens
SHORT_SLOW, LONG_SLOW = 2, 10  # without a CUDA graph, where a token takes tens of milliseconds
REPEATS = 3


def installed_peers(names: Sequence[str]) -> tuple[str, ...]:
    """Those of the peers that can be imported. UserError for an unknown name."""
    for name in names:
        if name not in GPU_PEERS:
            raise UserError(f"--peers: unknown peer {name!r}, known are {', '.join(GPU_PEERS)}, or none")
    return tuple(n for n in names if importlib.util.find_spec(GPU_PEERS[n]) is not None)


def gpu_peer_speeds(
    spec: ModelSpec, batches: Sequence[int], prompt_len: int, peers: Sequence[str], *, prompts: bool = True
) -> list[dict[str, Any]]:
    """One record for each peer, way of running it and batch: `decode_tokens_per_second`, `prefill_tokens_per_second` or
    None (without `prompts`, for instance); or `missing`, why a peer was not measured."""
    rows: list[dict[str, Any]] = []
    for peer in peers:
        try:
            rows += (_mamba_ssm if peer == "mamba-ssm" else _transformers)(spec, batches, prompt_len if prompts else 0)
        except Exception as e:  # another project's code: whatever it raises must not cost our own figures
            rows.append({"peer": peer, "missing": f"{type(e).__name__}: {str(e)[:200]}"})
    return rows


def _mamba_ssm(spec: ModelSpec, batches: Sequence[int], prompt_len: int) -> list[dict[str, Any]]:
    import torch

    package = importlib.import_module("mamba_ssm")
    config_class = importlib.import_module("mamba_ssm.models.config_mamba").MambaConfig
    fields = config_class.__dataclass_fields__
    config = config_class(**{k: v for k, v in to_mamba_ssm_config(spec).items() if k in fields})
    if not importlib.util.find_spec("causal_conv1d"):
        config.ssm_cfg = {**config.ssm_cfg, "use_mem_eff_path": False}  # needs the compiled convolution
    model = package.MambaLMHeadModel(config, device="cuda", dtype=torch.float16).eval()
    rows = []
    for batch in batches:
        ids = torch.zeros(batch, 1, dtype=torch.int64, device="cuda")
        model._decoding_cache = None  # a graph of another batch would be taken for this one's
        for graph in (True, False) if batch == 1 else (True,):

            def generate(new: int, ids: torch.Tensor = ids, graph: bool = graph) -> None:
                model.generate(input_ids=ids, max_length=1 + new, cg=graph, top_k=1)

            step = _step(generate, *((SHORT, LONG) if graph else (SHORT_SLOW, LONG_SLOW)))
            prompts = torch.zeros(batch, prompt_len, dtype=torch.int64, device="cuda")

            def prefill(prompts: torch.Tensor = prompts) -> None:
                model(prompts, num_last_tokens=1)

            seconds = _fastest(prefill) if graph and 0 < batch * prompt_len <= 1 << 14 else None
            how = "CUDA graph" if graph else "no CUDA graph"
            rows.append(_row("mamba-ssm", package.__version__, how, batch, step, batch * prompt_len, seconds))
    return rows


def _transformers(spec: ModelSpec, batches: Sequence[int], prompt_len: int) -> list[dict[str, Any]]:
    import torch

    package = importlib.import_module("transformers")
    config_class = getattr(package, "Mamba2Config" if spec.architecture == "mamba2" else "MambaConfig")
    model_class = getattr(package, config_class.__name__.replace("Config", "ForCausalLM"))
    given = {k: v for k, v in to_transformers_config(spec).items() if k not in ("architectures", "model_type")}
    with torch.device("cuda"):
        model = model_class(config_class(**given)).half().eval()
    rows = []
    for batch in batches:
        ids = torch.ones(batch, 1, dtype=torch.int64, device="cuda")

        def generate(new: int, ids: torch.Tensor = ids) -> None:
            model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)

        step = _step(generate, SHORT_SLOW, LONG_SLOW)
        rows.append(_row("transformers", package.__version__, "", batch, step, batch * prompt_len, None))
    return rows


def _row(
    peer: str, version: str, how: str, batch: int, step: float, prompt_tokens: int, prefill: float | None
) -> dict[str, Any]:
    return {
        "peer": peer,
        "version": version,
        "how": how,
        "batch": batch,
        "decode_tokens_per_second": batch / step,
        "prefill_tokens_per_second": prompt_tokens / prefill if prefill else None,
    }


def _step(generate: Callable[[int], None], short: int, long: int) -> float:
    """Seconds of one token of all sequences."""
    generate(long)  # warm-up; the longest first, because it decides how much is prepared
    return (_fastest(lambda: generate(long)) - _fastest(lambda: generate(short))) / (long - short)


def _fastest(work: Callable[[], None]) -> float:
    import torch

    times = []
    with torch.inference_mode():
        for _ in range(REPEATS):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            work()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
    return min(times)
