"""`slimba`: the verbs, and what happens when one fails.

Exit codes: 0 done; 2 the input is wrong, one line `error: ...` on stderr says what to do; 1 a defect of ours, a short
message; 130 interrupted. `--debug`, anywhere on the line, shows the traceback of every failure. No verb imports
anything heavy before it runs, so `--help` is instant.

Run the tests: `pytest tests/cli`.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from slimba import __version__
from slimba.errors import UserError

__all__ = ["app", "main"]

INTERRUPTED = 130
EXTRAS = {"torch": "train", "yaml": "train", "pyarrow": "eval", "lm_eval": "eval"}  # module -> extra that brings it

app = typer.Typer(
    name="slimba",
    help="Make state-space language models small and run them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"slimba {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass


def _register(verb: str, home: str) -> None:
    app.command(verb)(getattr(importlib.import_module(f"slimba.cli.{verb}"), home))


for verb in ("demo", "generate", "chat", "eval", "compress", "pretrain", "convert", "inspect", "report", "bench"):
    _register(verb, "evaluate" if verb == "eval" else verb)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's) and return its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    with warnings.catch_warnings():
        warnings.showwarning = _one_line_warning
        return _run([a for a in args if a != "--debug"], debug)


def _run(args: list[str], debug: bool) -> int:
    try:
        result = app(args=args, prog_name="slimba", standalone_mode=False)
        sys.stdout.flush()  # here, where a closed pipe is caught
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", INTERRUPTED, debug)
    except UserError as e:
        return _fail(f"error: {e}", 2, debug)
    except BrokenPipeError:  # the reader of our output has gone, as in `slimba ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except MemoryError:
        return _fail("error: this does not fit the machine's memory; use a smaller model, batch or window", 2, debug)
    except Exception as e:
        if isinstance(e, ModuleNotFoundError) and e.name in EXTRAS:
            return _fail(f'error: this needs {e.name}; pip install "slimba[{EXTRAS[e.name]}]"', 2, debug)
        if hasattr(e, "format_message"):  # typer's usage errors, wherever its version keeps their class
            return _usage_error(e, debug)
        return _fail(f"error: this is a defect of slimba: {_name(e)} (run with --debug for the traceback)", 1, debug)
    if result == INTERRUPTED:  # typer turns Ctrl-C into this
        return _fail("interrupted", INTERRUPTED, debug)
    return result if isinstance(result, int) else 0


def _usage_error(e: Any, debug: bool) -> int:
    """Missing verb: the help that typer made; anything else: one line that names the verb's help."""
    message = e.format_message()
    if type(e).__name__ == "NoArgsIsHelpError":
        typer.echo(message)
        return 0
    where = e.ctx.command_path if getattr(e, "ctx", None) else "slimba"
    return _fail(f"error: {' '.join(message.split())} (see {where} --help)", 2, debug)


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(" ".join(message.splitlines()), file=sys.stderr)
    return code


def _name(e: Exception) -> str:
    text = " ".join(str(e).split())
    return f"{type(e).__name__}: {text}" if text else type(e).__name__


def _one_line_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)
