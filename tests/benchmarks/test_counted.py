"""Counted bytes: equal to the file where the format exists, worked by hand where it does not.

Run: `pytest tests/benchmarks/test_counted.py`.
"""

from pathlib import Path

import pytest
from counted import FORMS, codes, counted_size, grouped, levels_lora

from helpers.tiny import tiny_checkpoint, tiny_spec
from slimba.checkpoints.inventory import inventory_of
from slimba.checkpoints.packed import write_packed
from slimba.formats import LowRank, MatrixLayout, Segment


@pytest.mark.parametrize("preset", ["dfssm", "dfssm-published", "int8", "int4"])
def test_an_existing_format_is_counted_as_its_file(preset: str, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(preset=preset)
    path = write_packed(checkpoint, tmp_path / "m")
    size, inventory = counted_size(checkpoint.spec, checkpoint.layouts), inventory_of(checkpoint)
    assert size.file_bytes == inventory.file_bytes == (path / "model.safetensors").stat().st_size
    assert size.projection_bytes == inventory.projection_bytes
    assert size.bits_per_projection_weight == inventory.bits_per_projection_weight


def test_codes_by_hand() -> None:
    assert codes(3, 64, 2) == ("uint8", (3, 8))
    assert codes(3, 512, 3) == ("uint8", (3, 102))  # 811.5 bits
    assert codes(3, 512, 17) == ("uint8", (3, 262))  # 2092.7 bits
    assert codes(3, 1000, 4) == ("uint8", (3, 250))


def test_forms_by_hand() -> None:
    spec = tiny_spec(n_layer=1)
    shapes = [s for n, s in spec.matrices().items() if ".mixer." in n]
    layouts = {n: MatrixLayout.plain(*s, "int8") for n, s in spec.matrices().items()}
    weights = sum(r * c for r, c in shapes)
    for form, of in (
        (grouped(4), lambda r, c: r * (c // 4) + 2 * r * 1),
        (FORMS["ternary"], lambda r, c: r * -(-c * 1.5849625 // 8) + 2 * r),
        (FORMS["fbi"], lambda r, c: r * (c // 8) + 2 * c),
        (levels_lora(16, 2), lambda r, c: r * (c // 2) + 2 * r + 2 * r + 2 * r + 2 * c + 4),
        (levels_lora(16, 0), lambda r, c: r * (c // 2) + 2 * r),
    ):
        size = counted_size(spec, layouts, form)
        assert size.projection_bytes == sum(of(r, c) for r, c in shapes) and size.projection_weights == weights
        assert size.file_bytes > size.projection_bytes + spec.vocab_size * spec.d_model


def test_sign_layouts_and_the_same_form_agree() -> None:
    """The stated form of signs with a correction is the packed format's, but for padding to 64 columns."""
    spec = tiny_spec(d_model=64, d_inner=128, headdim=32)
    layouts = {}
    for name, (rows, cols) in spec.matrices().items():
        sign = MatrixLayout(cols, (Segment(rows, "sign"),), LowRank(4, 0, rows))
        layouts[name] = sign if ".mixer." in name else MatrixLayout.plain(rows, cols, "int8")
    packed, stated = counted_size(spec, layouts), counted_size(spec, layouts, levels_lora(2, 4))
    assert packed.projection_bytes == stated.projection_bytes
