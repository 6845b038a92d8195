"""`slimba bench MODEL`, or `--shape NAME --format F`: decode and prefill speed as a share of the machine's limit.

Every run measures the machine's memory bandwidth (with the same threads) and compares the fast kernels with the naive
ones, on a GPU with the torch reference, on the same model; it prints no speed when they disagree. Run the tests:
`pytest tests/cli/test_bench.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimba.cli.options import Activations, JsonFile, NoVerify, StateDtype, Threads
from slimba.errors import UserError

if TYPE_CHECKING:
    from slimba.checkpoints.checkpoint import Checkpoint


def bench(
    model: Annotated[str | None, typer.Argument(help="A directory, a hub id, or a bundled name.")] = None,
    shape: Annotated[
        str | None, typer.Option("--shape", help="Instead of MODEL: random weights of a shape, such as mamba2-1.3b.")
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="With --shape: dfssm, dfssm-published, w8a8, w4a8, w4a16, float16, bfloat16, float32, int8, int4.",
        ),
    ] = None,
    batch: Annotated[str, typer.Option("--batch", help="Batch sizes, separated by commas.")] = "1",
    prompt_len: Annotated[int, typer.Option("--prompt-len", min=1, help="Tokens of the prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Tokens to decode.")] = 64,
    threads: Threads = None,
    backend: Annotated[str, typer.Option("--backend", help="cpu or cuda.")] = "cpu",
    state_dtype: StateDtype = None,
    activations: Activations = None,
    llama_cpp: Annotated[
        str, typer.Option(help="GGUF types that llama.cpp runs beside, where llama-cpp-python is installed; or none.")
    ] = "TQ2_0,Q1_0,Q4_0,Q8_0",
    peers: Annotated[
        str, typer.Option(help="With --backend cuda: mamba-ssm and transformers run beside, where installed; or none.")
    ] = "mamba-ssm,transformers",
    plot: Annotated[Path | None, typer.Option(help="Write decode speed by batch to this SVG file.")] = None,
    no_verify: NoVerify = False,
    json_file: JsonFile = None,
) -> None:
    """Measure decode and prefill speed, memory and the share of the limit."""
    from slimba.cli.options import write_json

    if (model is None) == (shape is None):
        raise UserError("give either a MODEL or --shape NAME --format F")
    if (shape is None) != (format is None):
        raise UserError("--shape and --format go together; a MODEL has its own formats")
    if backend not in ("cpu", "cuda"):
        raise UserError(f"--backend is {backend!r}; bench measures cpu or cuda")
    batches = _batches(batch)
    from slimba.runtime.load import resolve_activations, resolve_state_dtype

    ggml_types = _peers(llama_cpp)
    if plot and plot.suffix != ".svg":
        raise UserError(f"--plot writes an SVG file; name it {plot.with_suffix('.svg')}")
    checkpoint = _open(model, shape, format, verify=not no_verify)
    numerics = {
        "activations": resolve_activations(activations, checkpoint),
        "state": resolve_state_dtype(state_dtype, checkpoint),
    }
    if backend == "cuda":
        from slimba.runtime.backends.cuda_peers import gpu_peer_speeds, installed_peers
        from slimba.runtime.backends.cuda_speed import gpu_record

        names = () if peers == "none" else installed_peers(peers.split(","))
        record = gpu_record(checkpoint, batches, prompt_len, new_tokens, numerics)
        if names:
            record["gpu_peers"] = gpu_peer_speeds(checkpoint.spec, batches, prompt_len, names)
    else:
        record = _measure(checkpoint, batches, prompt_len, new_tokens, threads, numerics)
        if ggml_types:
            record |= _measure_peers(checkpoint, record["machine"]["threads"], prompt_len, new_tokens, ggml_types)
    record = {"model": model or f"{shape} as {format} (random weights)"} | record
    _print(record)
    if json_file:
        write_json(json_file, record)
    if plot:
        from slimba.cli.bench_plot import write_plot

        write_plot(plot, record)


def _batches(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise UserError(f"--batch is {text!r}; give sizes from 1 up, separated by commas, such as 1,8")
    return sizes


def _peers(types: str) -> tuple[str, ...]:
    """The GGUF types to compare with: none where llama-cpp-python is missing."""
    from slimba.runtime.peers import GGML_TYPES, has_llama_cpp

    names = () if types == "none" else tuple(types.split(","))
    for name in names:
        if name not in GGML_TYPES:
            raise UserError(f"--llama-cpp: unknown GGUF type {name!r}, known are {', '.join(GGML_TYPES)}, or none")
    return names if has_llama_cpp() else ()


def _measure_peers(
    checkpoint: Checkpoint, threads: int, prompt_len: int, new_tokens: int, types: tuple[str, ...]
) -> dict[str, Any]:
    """llama.cpp at the same shape, or why not."""
    from rich.console import Console

    from slimba.runtime.peers import llama_cpp_speeds

    with Console(stderr=True).status(f"llama.cpp, {', '.join(types)}"):
        try:
            return {"llama_cpp": llama_cpp_speeds(checkpoint.spec, threads, prompt_len, new_tokens, types)}
        except UserError as e:
            return {"llama_cpp": [], "llama_cpp_missing": str(e)}


def _open(model: str | None, shape: str | None, format: str | None, *, verify: bool) -> Checkpoint:
    if model is not None:
        from slimba.checkpoints.reader import open_checkpoint

        return open_checkpoint(model, verify=verify)
    from slimba.models.configs import named_spec
    from slimba.runtime.measure import random_model

    return random_model(named_spec(str(shape)), str(format))


def _measure(
    checkpoint: Checkpoint,
    batches: list[int],
    prompt_len: int,
    new_tokens: int,
    threads: int | None,
    numerics: dict[str, str],
) -> dict[str, Any]:
    """Everything that is printed, as a JSON-ready record (times in seconds, sizes in bytes)."""
    from rich.console import Console

    from slimba.runtime import measure
    from slimba.runtime.backends.cpu import CpuEngine

    state_dtype, activations = numerics["state"], numerics["activations"]
    with Console(stderr=True).status("memory bandwidth") as status:
        engine = CpuEngine(checkpoint, threads=threads, state_dtype=state_dtype, activations=activations)
        machine = measure.machine(engine.threads)
        bandwidths = [measure.bandwidth(engine.threads)]
        status.update("fast kernels against naive ones")
        difference = measure.check(checkpoint, engine.threads, state_dtype, activations)
        moved = measure.traffic(checkpoint, state_dtype)
        decode, prefill = [], []
        for size in batches:
            status.update(f"decode, batch {size}")
            decode.append(measure.decode_speed(engine, moved, bandwidths[0], size, new_tokens))
            bandwidths.append(measure.bandwidth(engine.threads))
            status.update(f"prefill, batch {size}")
            prefill.append(measure.prefill_speed(engine, size, prompt_len))
    limit = max(bandwidths)  # on a machine shared with others it changes; the share is never of less than was seen
    return {
        "machine": machine,
        "bandwidth": limit,
        "bandwidths": bandwidths,
        "difference_to_naive_kernels": difference,
        "weight_bytes": checkpoint.nbytes(),
        "resident_bytes": measure.resident_bytes(),
        "numerics": numerics,
        "decode": [row.against(limit) for row in decode],
        "prefill": prefill,
    }


def _where(record: dict[str, Any]) -> str:
    """The machine, what was computed, and how well it agreed."""
    machine, limit = record["machine"], f"{record['bandwidth'] / 1e9:.1f} GB/s"
    state = f"state {record['numerics']['state']}"
    if "gpu" in machine:
        agreed = ", ".join(f"{name} {value:.1e}" for name, value in record["difference_to_reference"].items())
        products = ", ".join(f"{how} ({what})" for what, how in record["products"].items())
        return (
            f"{machine['gpu']}, {state}, products by batch in {products}, {limit}; "
            f"the reference agrees to {agreed} of the largest logit"
        )
    agreed = f"naive kernels agree to {record['difference_to_naive_kernels']:.1e}"
    state = f"activations {record['numerics']['activations']}, {state}"
    return f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']} kernels, {state}, {limit}; {agreed}"


def _print(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    machine, console = record["machine"], Console()
    console.print(f"{record['model']}: {_where(record)}")
    table = Table(title="decode: a step is one token for every sequence")
    for name in ("batch", "MB a step", "floor ms", "measured ms", "share of the limit", "tokens/s"):
        table.add_column(name, justify="right")
    for row in record["decode"]:
        table.add_row(
            str(row.batch), f"{row.bytes / 1e6:.1f}", f"{row.floor * 1e3:.3f}", f"{row.time * 1e3:.3f}",
            f"{100 * row.share:.0f} %", f"{row.tokens_per_second:.1f}",
        )  # fmt: skip
    console.print(table)
    table = Table(title="prefill: from the prompt to its first new token")
    for name in ("batch", "prompt tokens", "first token after ms", "prompt tokens/s"):
        table.add_column(name, justify="right")
    for row in record["prefill"]:
        table.add_row(
            str(row.batch), str(row.prompt_len), f"{row.time_to_first_token * 1e3:.1f}", f"{row.tokens_per_second:.1f}"
        )
    console.print(table)
    if "peak_gpu_bytes" in record:
        console.print(f"GPU memory {record['peak_gpu_bytes'] / 1e6:.0f} MB at most, beyond the CUDA context")
    if record.get("resident_bytes"):
        resident, weights = (record[key] / 1e6 for key in ("resident_bytes", "weight_bytes"))
        console.print(f"resident memory {resident:.0f} MB, of which weights {weights:.0f} MB")
    _print_peers(record)
    _print_gpu_peers(record)
    seen = record.get("bandwidths", [1.0])
    if max(seen) > 1.1 * min(seen):
        console.print(
            f"the memory's bandwidth changed meanwhile, from {min(seen) / 1e9:.1f} to {max(seen) / 1e9:.1f} GB/s: "
            "the share is of the highest, and too low where decoding had less"
        )
    load = machine["load_average"]
    if load and load[0] > 0.5:
        console.print(f"other work was running (load average {load[0]} before the start): the figures are too low")


def _print_peers(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console, rows = Console(), record.get("llama_cpp", [])
    if "llama_cpp_missing" in record:
        console.print(f"llama.cpp was not measured: {record['llama_cpp_missing']}")
    if not rows:
        return
    ones = [row.tokens_per_second for row in record["decode"] if row.batch == 1]
    prompts = [row.tokens_per_second for row in record["prefill"] if row.batch == 1]
    table = Table(title=f"llama.cpp (llama-cpp-python {rows[0]['version']}), random weights of the same shape, batch 1")
    for name in ("type", "MB", "decode tokens/s", "ours / theirs", "prompt tokens/s", "ours / theirs"):
        table.add_column(name, justify="right")
    for row in rows:
        decode, prefill = row["decode_tokens_per_second"], row["prefill_tokens_per_second"]
        table.add_row(
            row["type"], f"{row['bytes'] / 1e6:.1f}",
            f"{decode:.1f}", f"{ones[0] / decode:.2f}" if ones else "",
            f"{prefill:.1f}", f"{prompts[0] / prefill:.2f}" if prompts else "",
        )  # fmt: skip
    console.print(table)


def _print_gpu_peers(record: dict[str, Any]) -> None:
    """What else ran on this GPU. Ratios are of one run, whose own results were compared with the reference first."""
    from rich.console import Console
    from rich.table import Table

    console, rows = Console(), record.get("gpu_peers", [])
    for row in rows:
        if "missing" in row:
            console.print(f"{row['peer']} was not measured: {row['missing']}")
    rows = [row for row in rows if "missing" not in row]
    if not rows:
        return
    ours = {row.batch: row.tokens_per_second for row in record["decode"]}
    prompts = {row.batch: row.tokens_per_second for row in record["prefill"]}
    table = Table(title="peers, random float16 weights of the same shape")
    for name in ("peer", "batch", "decode tokens/s", "ours / theirs", "prompt tokens/s", "ours / theirs"):
        table.add_column(name, justify="right")
    for row in rows:
        decode, prefill = row["decode_tokens_per_second"], row["prefill_tokens_per_second"]
        table.add_row(
            f"{row['peer']} {row['version']} {row['how']}".strip(), str(row["batch"]), f"{decode:.1f}",
            f"{ours[row['batch']] / decode:.2f}", f"{prefill:.1f}" if prefill else "",
            f"{prompts[row['batch']] / prefill:.2f}" if prefill else "",
        )  # fmt: skip
    console.print(table)
