"""Train the bundled demo teacher's tokenizer: byte-level BPE, 4096 entries, `<|endoftext|>` is id 0.

Run after `scripts/fetch_texts.py`, from the repository root:

    python scripts/train_tokenizer.py [--texts .local/demo-texts] [--vocab-size 4096]

Reads `train.txt.zst`, writes `tokenizer.json` beside it and prints characters and tokens of each part. Every byte is
in the vocabulary, so any text can be encoded and decoded without loss.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator
from pathlib import Path

import zstandard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"


def read(path: Path) -> str:
    """A text file, Zstandard-compressed if its name ends in .zst."""
    if path.suffix != ".zst":
        return path.read_text(encoding="utf-8")
    with path.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
        return io.TextIOWrapper(stream, encoding="utf-8").read()


def documents(text: str) -> Iterator[str]:
    """The documents of a text: they are separated by a blank line."""
    return (part.strip("\n") for part in text.split("\n\n") if part.strip())


def train(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE without normalisation; a leading space is never added."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, default=Path(".local/demo-texts"))
    parser.add_argument("--vocab-size", type=int, default=4096)
    options = parser.parse_args()
    text = read(options.texts / "train.txt.zst")
    tokenizer = train(documents(text), options.vocab_size)
    if tokenizer.token_to_id(END_OF_TEXT) != 0 or tokenizer.get_vocab_size() != options.vocab_size:
        raise SystemExit("the trained vocabulary is not the one asked for: is train.txt.zst too small?")
    tokenizer.save(str(options.texts / "tokenizer.json"))
    for name in ("train.txt.zst", "valid.txt.zst", "heldout.txt", "demo-train.txt", "demo-heldout.txt"):
        part = read(options.texts / name)
        tokens = sum(len(encoding.ids) for encoding in tokenizer.encode_batch(list(documents(part))))
        print(f"{name}: {len(part):,} characters, {len(part.encode()):,} bytes, {tokens:,} tokens")


if __name__ == "__main__":
    main()
