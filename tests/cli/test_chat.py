"""chat: the state is kept between turns, commands, Ctrl-C within an answer. `pytest tests/cli/test_chat.py`."""

from __future__ import annotations

import io
import signal
from pathlib import Path

import numpy as np
import pytest

from helpers.bigram import BigramEngine
from helpers.tiny import tiny_checkpoint, tiny_directory, tiny_tokenizer
from slimba.cli import chat as module
from slimba.cli.chat import Conversation
from slimba.cli.main import main
from slimba.data.tokenizer import Tokenizer
from slimba.runtime.api import LoadedModel


@pytest.fixture
def model(tmp_path: Path) -> LoadedModel:
    file = tiny_tokenizer(tmp_path / "tokenizer.json")
    table = np.random.default_rng(0).standard_normal((304, 304))
    return LoadedModel(BigramEngine(table), tiny_checkpoint(tokenizer=file), Tokenizer.from_file(file))


def test_the_model_reads_every_token_once(model: LoadedModel) -> None:
    tokenizer, talk = model.need_tokenizer(), Conversation(model)
    transcript: list[int] = []
    for turn, text in enumerate(["the sea\n", "and the ship\n", "again\n"]):
        transcript += tokenizer.encode(text)
        before = len(talk.state.seen[0])
        assert "".join(talk.say(text, max_new_tokens=9, temperature=1.0, seed=turn))
        read = talk.state.seen[0] + talk.pending
        assert read[: len(transcript)] == transcript and 0 < len(read) - len(transcript) <= 9
        assert len(talk.state.seen[0]) > before
        transcript = read


def test_reset_forgets(model: LoadedModel) -> None:
    talk = Conversation(model)
    first = "".join(talk.say("the sea\n", max_new_tokens=9, temperature=1.0))
    "".join(talk.say("more\n", max_new_tokens=9, temperature=1.0))
    talk.reset()
    assert "".join(talk.say("the sea\n", max_new_tokens=9, temperature=1.0)) == first


def test_a_stopped_answer_leaves_a_usable_state(model: LoadedModel) -> None:
    encode, talk = model.need_tokenizer().encode, Conversation(model)
    answer = talk.say("the sea\n", max_new_tokens=50, temperature=1.0, seed=3)
    next(answer)
    answer.close()
    read = talk.state.seen[0] + talk.pending
    assert len(talk.pending) == 1 and read[: len(encode("the sea\n"))] == encode("the sea\n")
    assert len(read) < len(encode("the sea\n")) + 50
    "".join(talk.say("go on\n", max_new_tokens=3))
    assert talk.state.seen[0][: len(read) + 2] == read + encode("go on\n")[:2]


def test_ctrl_c_stops_an_answer_and_not_the_talk(model: LoadedModel, capsys: pytest.CaptureFixture[str]) -> None:
    def pieces():
        yield "one "
        signal.raise_signal(signal.SIGINT)
        yield "two"
        yield "never"

    before = signal.getsignal(signal.SIGINT)
    module._answer(pieces())
    assert capsys.readouterr().out == "one two ...\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("slimba._core")
    tiny_directory(tmp_path / "tiny")
    monkeypatch.setattr("sys.stdin", io.StringIO("the sea\n\n/reset\nthe sea\n/what\n/exit\nnot read\n"))
    assert main(["chat", str(tmp_path / "tiny"), "--max-new-tokens", "6", "--temperature", "0", "--threads", "1"]) == 0
    out = capsys.readouterr()
    answers = [a for a in out.out.split("> ") if a.strip()]
    assert len(answers) == 2 and answers[0] == answers[1]
    assert "unknown command /what" in out.err and "plain continuation" in out.err
    monkeypatch.setattr("sys.stdin", io.StringIO("the sea\n"))
    assert main(["chat", str(tmp_path / "tiny"), "--max-new-tokens", "6"]) == 0, "end of input ends the talk"
