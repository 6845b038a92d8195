"""Write what a full pass of distillation reached for the bundled teacher, for `slimba demo` to show.

    slimba eval demo-teacher --text src/slimba/assets/demo-text/heldout.txt --window 512 \
        --json benchmarks/results/demo-teacher.json
    slimba eval benchmarks/models/demo-teacher-1bit --text src/slimba/assets/demo-text/heldout.txt --window 512 \
        --json benchmarks/results/demo-teacher-1bit.json
    python benchmarks/demo_full_pass.py

The model itself was made on a GPU from the texts of docs/demo-teacher.md:

    slimba compress demo-teacher benchmarks/models/demo-teacher-1bit --data .local/demo-texts/train.txt.zst \
        --set window=512 --set batch=8 --device cuda
"""

from __future__ import annotations

import json
from pathlib import Path

from slimba.checkpoints.inventory import inventory_of
from slimba.checkpoints.reader import open_checkpoint

HERE = Path(__file__).parent
MODEL = HERE / "models" / "demo-teacher-1bit"
TARGET = HERE.parent / "src" / "slimba" / "assets" / "demo-text" / "full-pass.json"


def main() -> None:
    teacher, student = (
        json.loads((HERE / "results" / f"{name}.json").read_text()) for name in ("demo-teacher", "demo-teacher-1bit")
    )
    checkpoint = open_checkpoint(MODEL)
    sizes = inventory_of(checkpoint)
    run = checkpoint.provenance
    record = {
        "perplexity": student["perplexity"],
        "teacher_perplexity": teacher["perplexity"],
        "file_bytes": sizes.file_bytes,
        "bits_per_projection_weight": sizes.bits_per_projection_weight,
        "tokens": run["tokens"],
        "seconds": run["seconds"],
        "device": run["device"],
        "measured_by": "benchmarks/demo_full_pass.py",
    }
    TARGET.write_text(json.dumps(record, indent=2) + "\n")
    print(TARGET.name, record)


if __name__ == "__main__":
    main()
