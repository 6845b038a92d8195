"""Recipes: packaged defaults load, every key is documented, bad keys and types are named."""

from importlib.resources import files
from itertools import pairwise

import pytest

from slimba.errors import UserError
from slimba.methods.dfssm.recipe import DfssmRecipe
from slimba.training.recipes import load_recipe, parse_overrides


def dfssm(**overrides):
    return load_recipe(DfssmRecipe, "dfssm.yaml", None, overrides)


def test_every_key_of_every_recipe_has_a_comment_above_it():
    for name in ("dfssm.yaml", "pretrain.yaml"):
        lines = files("slimba.recipes").joinpath(name).read_text("utf-8").splitlines()
        for above, line in pairwise(lines):
            if ":" in line and not line.startswith("#"):
                assert above.startswith("#"), f"{name}: {line}"


def test_overrides_win_over_file_and_file_over_default(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("method: dfssm\nrank: 8\nwindow: 64\n")
    recipe = load_recipe(DfssmRecipe, "dfssm.yaml", path, parse_overrides(["rank=4", "lr_latent=1e-3"]))
    assert (recipe.rank, recipe.window, recipe.lr_latent) == (4, 64, 1e-3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"rnak": 3}, "unknown setting 'rnak'"),
        ({"rank": "many"}, "rank"),
        ({"rank": -1}, "rank must be"),
        ({"rank": True}, "rank"),
        ({"embedding": "int3"}, "int4, int8, float16"),
        ({"int8_rows": "dt"}, "must be a list"),
        ({"decay": "steps"}, "linear"),
        ({"freeze_from": 2.0}, "fractions"),
    ],
)
def test_bad_settings_are_named(overrides, message):
    with pytest.raises(UserError, match=message):
        dfssm(**overrides)


def test_recipe_of_another_method_and_broken_yaml(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("method: quamba2\n")
    with pytest.raises(UserError, match="quamba2"):
        load_recipe(DfssmRecipe, "dfssm.yaml", path, {})
    path.write_text("rank: [1\n")
    with pytest.raises(UserError, match="not valid YAML"):
        load_recipe(DfssmRecipe, "dfssm.yaml", path, {})
    with pytest.raises(UserError, match="is not a file"):
        load_recipe(DfssmRecipe, "dfssm.yaml", tmp_path / "none.yaml", {})
    with pytest.raises(UserError, match="key=value"):
        parse_overrides(["rank"])
