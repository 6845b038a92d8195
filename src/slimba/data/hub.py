"""Text from the Hugging Face library `datasets`, streamed: hub data sets, local folders, saved data sets.

    datasets:roneneldan/TinyStories                           the split `train`, the column `text`
    datasets:HuggingFaceFW/fineweb-edu,config=sample-10BT     one of its configurations
    datasets:./corpus,split=validation,column=content         a folder of .parquet, .jsonl, .txt or of `save_to_disk`

Rows come in the data set's own order; `revision=` fixes a version of the hub's. Tests: tests/data/test_hub.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimba.errors import UserError

__all__ = ["DatasetSource", "dataset_texts", "is_dataset", "local_files"]

PREFIX = "datasets:"


def is_dataset(source: str) -> bool:
    """Whether `source` names a data set and not a file."""
    return source.startswith(PREFIX)


@dataclass(frozen=True, slots=True)
class DatasetSource:
    """A source's parts. `name` is a hub id or a local directory."""

    name: str
    config: str | None = None
    split: str = "train"
    column: str = "text"
    revision: str | None = None

    @classmethod
    def parse(cls, source: str) -> DatasetSource:
        """From `datasets:NAME,key=value,...`. UserError for anything else."""
        name, *pairs = source.removeprefix(PREFIX).split(",")
        values: dict[str, str] = {}
        for pair in pairs:
            key, _, value = pair.partition("=")
            if key not in ("config", "split", "column", "revision") or not value:
                raise UserError(f"{source}: {pair!r} is none of config=, split=, column= and revision=")
            values[key] = value
        if not name:
            raise UserError(f"{source} names no data set; write datasets:NAME or datasets:./folder")
        return cls(name, **values)


def local_files(source: str) -> list[tuple[str, int, int]]:
    """(name, bytes, date in ns) of every file of a data set that is a local folder; of one of the hub nothing."""
    folder = Path(DatasetSource.parse(source).name)
    files = sorted(p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else []
    return [(str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]


def dataset_texts(source: str) -> Iterator[str]:
    """The text of every row. UserError: `datasets` not installed, no such data set, split or column, a lost network."""
    parts = DatasetSource.parse(source)
    try:
        import datasets  # noqa: F401
    except ImportError:
        raise UserError(f'{source}: needs the library `datasets`; pip install "slimba[datasets]"') from None
    try:
        for row in _open(parts):
            if parts.column not in row:
                names = ", ".join(row)
                raise UserError(f"{source} has no column {parts.column!r}, its columns are {names}; add ,column=NAME")
            text = row[parts.column]
            if not isinstance(text, str | None):
                raise UserError(f"{source}: column {parts.column!r} holds {type(text).__name__}, not text")
            yield text or ""
    except UserError:
        raise
    except Exception as e:  # the library passes on what its many readers and the network raise
        raise UserError(f"{source} cannot be read ({' '.join(str(e).split())[:300]})") from None


def _open(parts: DatasetSource) -> Iterable[dict[str, Any]]:
    """The rows of the split."""
    import datasets

    folder = Path(parts.name)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        saved = datasets.load_from_disk(str(folder))
        rows = saved[parts.split] if isinstance(saved, datasets.DatasetDict) else saved
    else:
        rows = datasets.load_dataset(
            parts.name, parts.config, split=parts.split, revision=parts.revision, streaming=True
        )
    return rows  # type: ignore[no-any-return]
