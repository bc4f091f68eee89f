"""The recipe: its arms, its nodes, and what is said of one that is wrong."""

import subprocess, sys

import pytest

from scir.recipe import (
    ARMS,
    Recipe,
    RecipeError,
    all_nodes,
    dump_recipe,
    field_names,
    load_recipe,
    node_name,
    node_parts,
    override,
    parent_node,
    parse_recipe,
)

from helpers import ROOT, single_line


def test_an_arm_may_stop_early():
    from scir.runner.plan import prerequisites, plan

    recipe = parse_recipe(
        {"iterations": 3, "arms": ["sft", "srlm", "scir", "cream"], "stop_after": {"srlm": 1, "cream": 9}}
    )
    assert [recipe.rounds(a) for a in recipe.arms] == [0, 1, 3, 3]
    nodes = [n for n in all_nodes(recipe) if "srlm" in n or "scir" in n]
    assert nodes == ["seed0/srlm/m2", "seed0/scir/m2", "seed0/scir/m3", "seed0/scir/m4"]
    steps = plan(recipe)
    assert {s.node for s in steps if s.stage == "evaluate"} == set(all_nodes(recipe)) and not [
        s for s in steps if s.stage in ("sample", "judge", "label") and "srlm" in s.node
    ]
    assert set(prerequisites(recipe)[steps[-1]]) == {s for s in steps[:-1] if s.stage != "consistency"}, (
        "nothing is done that nobody reads"
    )
    with pytest.raises(RecipeError, match="stop_after"):
        parse_recipe({"stop_after": {"scir": 0}})
    with pytest.raises(RecipeError, match="stop_after"):
        parse_recipe({"stop_after": {"magic": 1}})


@pytest.mark.parametrize(
    "raw, nearest",
    [
        ({"train": {"lamda_consistancy": 1}}, "train.lambda_consistency"),
        ({"iteration": 2}, "iterations"),
        ({"sampling": {"temprature": 1}}, "sampling.temperature"),
        ({"model": {"quantise": "nf4"}}, "model.quantize"),
        ({"trian": {"beta": 1}}, "train"),
    ],
)
def test_unknown_field_names_the_nearest(raw, nearest):
    with pytest.raises(RecipeError, match=f"is not a field; the nearest is {nearest}") as e:
        parse_recipe(raw)
    assert single_line(e)


@pytest.mark.parametrize(
    "raw, name",
    [
        ({"train": {"beta": "soft"}}, "train.beta"),
        ({"train": {"beta": -1}}, "train.beta"),
        ({"seeds": 3}, "seeds"),
        ({"seeds": []}, "seeds"),
        ({"train": 5}, "train"),
        ({"arms": ["scir", "magic"]}, "arms.1"),
        ({"judge": {"verdicts": ["A"]}}, "judge.verdicts"),
        ({"judge": {"verdicts": [True, False]}}, "judge.verdicts.0"),
        ({"name": "../up"}, "name"),
        ({"rewards": ["implicit"]}, "rewards"),
        ({"sampling": {"candidates": 1}}, "sampling.candidates"),
        ({"model": {"quantize": "int3"}}, "model.quantize"),
    ],
)
def test_ill_typed_value_names_the_field(raw, name):
    with pytest.raises(RecipeError, match=rf"recipe: {name}[.0-9]* = "):
        parse_recipe(raw)


def test_all_faults_are_told_at_once():
    with pytest.raises(RecipeError) as e:
        parse_recipe({"train": {"beta": "x"}, "sampling": {"top_p": 2}})
    assert len(str(e.value).splitlines()) == 2


def test_override(file):
    raw = {"train": {"beta": 0.1}}
    done = override(override(raw, "train.beta=0.5"), "sampling.candidates=3")
    assert done == {"train": {"beta": 0.5}, "sampling": {"candidates": 3}} and raw == {"train": {"beta": 0.1}}
    recipe = load_recipe(
        file("name: x\ntrain: {beta: 0.1}", "x.yaml"), ("train.beta=5e-1", "arms=[scir]", "model.quantize=null")
    )
    assert recipe.train.beta == 0.5 and recipe.arms == ("scir",) and recipe.model.quantize is None


@pytest.mark.parametrize("setting", ["train.beta", "train.bta=1", "train.beta=[1", "name.x=1", "seeds.x=1"])
def test_bad_override_is_a_recipe_error(file, setting):
    with pytest.raises(RecipeError):
        load_recipe(file("name: x\nseeds: [0]\ntrain: {beta: 0.1}", "x.yaml"), (setting,))


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2", "", "just words", "\tname: x"])
def test_not_a_recipe(file, text):
    with pytest.raises(RecipeError, match="x.yaml") as e:
        load_recipe(file(text, "x.yaml"))
    assert single_line(e)


def test_missing_recipe():
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe("nowhere.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipe_loads_and_round_trips(path, file):
    recipe = load_recipe(path)
    assert recipe.name == path.stem and load_recipe(file(dump_recipe(recipe), "again.yaml")) == recipe


def test_every_field_says_what_it_is():
    for name, info in field_names().items():
        assert info.description and info.json_schema_extra["provenance"] in "PSD", name


def test_arms_change_valid_fields_only():
    for arm, change in ARMS.items():
        assert set(change or ()) <= set(type(Recipe().train).model_fields) and type(Recipe().train).model_validate(
            Recipe().arm(arm).model_dump()
        )


@pytest.mark.parametrize(
    "node, parts, parent",
    [
        ("seed0/m1", (0, None, 1), "seed0/m0"),
        ("seed3/scir/m2", (3, "scir", 2), "seed3/m1"),
        ("seed3/scir/m3", (3, "scir", 3), "seed3/scir/m2"),
    ],
)
def test_node_names(node, parts, parent):
    assert node_parts(node) == parts and node_name(parts[0], parts[2], parts[1]) == node and parent_node(node) == parent


@pytest.mark.parametrize("node", ["", "m1", "seedx/m1", "seed0/scir"])
def test_malformed_node(node):
    with pytest.raises(ValueError, match="seed0/m1"):
        node_parts(node)


@pytest.mark.parametrize("module", ["scir", "scir.recipe", "scir.cli"])
def test_import_does_not_wait_for_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
