"""The command line: help, exit codes, one clear line for every kind of bad input. `pytest tests/cli`."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.tiny import TEXT, tiny_directory, tiny_tokenizer
from slimba import __version__
from slimba.cli import main as main_module
from slimba.cli.main import main
from slimba.cli.options import write_json
from slimba.errors import UserError

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("slimba._core"), reason="the C++ core is not built")
VERBS = ("demo", "generate", "chat", "eval", "compress", "pretrain", "convert", "inspect", "bench")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and texts: `tiny`, `bare` (no tokenizer), `text.txt`, `empty.txt`, `tokenizer.json`."""
    home = tmp_path_factory.mktemp("cli")
    tiny_directory(home / "tiny", preset="dfssm")
    tiny_directory(home / "twin", preset="float32")
    tiny_directory(home / "bare", with_tokenizer=False)
    tiny_tokenizer(home / "tokenizer.json")
    (home / "text.txt").write_text(TEXT * 2, encoding="utf-8")
    (home / "empty.txt").write_text("")
    (home / "short.txt").write_text("one word")
    return home


@pytest.fixture
def run(home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Run a command line inside `home`: (exit code, stdout, stderr)."""
    monkeypatch.chdir(home)

    def call(line: str, *more: str) -> tuple[int, str, str]:
        code = main([*line.split(), *more])
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def test_help_and_version(run) -> None:
    code, out, _ = run("--help")
    assert code == 0 and all(verb in out for verb in VERBS)
    assert run("--version") == (0, f"slimba {__version__}\n", "")
    for verb in VERBS:
        code, out, err = run(f"{verb} --help")
        assert code == 0 and "Usage" in out and not err
    assert "Usage" in "".join(run("")[1:])


def test_help_is_light(home: Path) -> None:
    code = """
import sys
from slimba.cli.main import main
for line in (["--help"], ["eval", "--help"], ["compress", "--help"]):
    assert main(line) == 0
heavy = {"torch", "numpy", "tokenizers", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_generate(run, home: Path) -> None:
    line = "generate tiny --prompt sea --max-new-tokens 12 --temperature 1 --seed 4 --threads 1"
    code, out, err = run(line)
    assert code == 0 and out.strip() and "tokens/s" in err and "backend cpu" in err
    again = run(line + " --no-stream --json out.json")
    assert again[:2] == (0, out), "streamed or not, the same text"
    record = json.loads((home / "out.json").read_text())
    assert record["text"] + "\n" == out and record["settings"]["seed"] == 4 and record["backend"] == "cpu"
    stop = record["text"][3:5]
    code, out, err = run(line, "--stop", stop)
    assert out == record["text"][: record["text"].index(stop)] + "\n" and "(stop)" in err
    assert run("generate bare --tokenizer tokenizer.json --prompt sea --max-new-tokens 2")[0] == 0


def test_generate_reads_a_prompt_from_stdin(run, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    named = run("generate tiny --max-new-tokens 5 --prompt", "the sea")
    monkeypatch.setattr("sys.stdin", io.StringIO("the sea"))
    assert run("generate tiny --max-new-tokens 5 --prompt -")[:2] == named[:2]


def test_eval(run, home: Path) -> None:
    code, out, _ = run("eval tiny --text text.txt --window 32 --json out.json --threads 1")
    record = json.loads((home / "out.json").read_text())
    assert code == 0 and f"perplexity {record['perplexity']:.2f}" in out and "id 0 before each" in out
    assert record["window"] == record["stride"] == 32 and record["tokens"] % 32 == 0 and record["backend"] == "cpu"
    code, out, _ = run("eval tiny --text text.txt --window 32 --stride 8 --batch 3 --bos-id -1 --max-tokens 100")
    assert code == 0 and "stride 8" in out and "nothing before each" in out and "first 100 tokens" in out
    code, out, _ = run("eval tiny --text text.txt --text text.txt --window 32 --against twin --json out.json")
    record = json.loads((home / "out.json").read_text())
    assert code == 0 and record["ratio"] > 0 and record["kl"] > 0 and 0 <= record["agreement"] <= 1
    assert record["student"]["tokens"] == record["teacher"]["tokens"]


BAD = {
    "no such verb": ("paint tiny", "No such command 'paint'"),
    "no such option": ("generate tiny --prompt a --loud", "--loud"),
    "missing option": ("generate tiny", "--prompt"),
    "option of the wrong kind": ("generate tiny --prompt a --seed x", "--seed"),
    "no such model": ("generate nowhere --prompt a", "nowhere"),
    "unknown backend": ("generate tiny --prompt a --backend tpu", "known are auto, cpu, cuda, reference"),
    "backend without its GPU": ("eval tiny --text text.txt --backend cuda", "--backend cpu"),
    "unknown state type": ("generate tiny --prompt a --state-dtype fp4", "known are fp32, bf16, int8"),
    "threads": ("generate tiny --prompt a --threads 0", "--threads"),
    "sampling setting": ("generate tiny --prompt a --top-p 1.5", "top_p"),
    "negative seed": ("generate tiny --prompt a --seed -1", "seed"),
    "empty stop string": ("generate tiny --prompt a --stop=", "empty stop string"),
    "generate without tokenizer": ("generate bare --prompt a", "--tokenizer"),
    "chat without tokenizer": ("chat bare", "--tokenizer"),
    "eval without tokenizer": ("eval bare --text text.txt", "--tokenizer"),
    "damaged tokenizer": ("generate tiny --prompt a --tokenizer text.txt", "text.txt is not"),
    "eval of nothing": ("eval tiny", "--text"),
    "empty text": ("eval tiny --text empty.txt", "empty.txt holds no text"),
    "missing text": ("eval tiny --text none.txt", "none.txt"),
    "window longer than the text": ("eval tiny --text short.txt --window 64", "a window of 64 needs 65; give --window"),
    "stride beyond the window": ("eval tiny --text text.txt --window 8 --stride 9", "--stride is 9"),
    "unknown way to split": ("eval tiny --text text.txt --split-documents page", "page"),
    "bos id outside": ("eval tiny --text text.txt --bos-id 999", "--bos-id 999"),
    "no batch": ("eval tiny --text text.txt --window 8 --batch 0", "--batch"),
    "against with stride": ("eval tiny --text text.txt --window 8 --stride 4 --against tiny", "--against"),
    "figures into nowhere": ("eval tiny --text text.txt --window 32 --json text.txt/x.json", "x.json"),
    "unknown method": ("compress twin out --method magic --data text.txt", "unknown method 'magic'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(run, case: str) -> None:
    line, message = BAD[case]
    code, _, err = run(line)
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_debug_shows_the_traceback(run) -> None:
    for line in ("--debug generate nowhere --prompt a", "generate nowhere --prompt a --debug"):
        code, _, err = run(line)
        assert code == 2 and "Traceback" in err and err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("bad\nthing"), 2, "error: bad thing\n"),
        (RuntimeError("odd"), 1, "RuntimeError: odd (run with --debug"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (MemoryError(), 2, "memory"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 2, 'pip install "slimba[train]"'),
        (ModuleNotFoundError("No module named 'slimba.x'", name="slimba.x"), 1, "defect"),
        (BrokenPipeError(), 0, ""),
    ],
)
def test_exit_codes(run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, text: str) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(main_module, "app", fail)
    monkeypatch.setattr(os, "dup2", lambda *_: None)  # keep this process's stdout
    got, _, err = run("generate")
    assert got == code and text in err and err.count("\n") <= 1


def test_closed_pipe_and_ctrl_c_end_quietly(home: Path) -> None:
    head = subprocess.run(
        f"{sys.executable} -m slimba --help | head -1", shell=True, cwd=home, capture_output=True, text=True
    )
    assert head.stdout and not head.stderr
    process = subprocess.Popen(
        [sys.executable, "-m", "slimba", "chat", "tiny"],
        cwd=home,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a job in the background ignores Ctrl-C and hands that down
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    assert "plain continuation" in process.stderr.readline()
    time.sleep(0.2)  # into input()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and err.strip() == "interrupted"


def test_module_and_script_agree(home: Path) -> None:
    out = subprocess.run([sys.executable, "-m", "slimba", "--version"], capture_output=True, text=True, check=True)
    assert out.stdout == f"slimba {__version__}\n"


def test_write_json_is_whole_or_absent(tmp_path: Path) -> None:
    import numpy as np

    file = tmp_path / "a" / "b.json"
    write_json(file, {"n": np.float32(0.5), "p": Path("x"), "a": np.arange(2)})
    assert json.loads(file.read_text()) == {"n": 0.5, "p": "x", "a": [0, 1]}
    assert [p.name for p in file.parent.iterdir()] == ["b.json"]
