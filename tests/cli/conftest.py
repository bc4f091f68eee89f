import pytest

from scir.recipe import dump_recipe
from scir.store import write_text

from commands import made_recipe, save_adapter


@pytest.fixture
def node(tmp_path):
    "A folder like a run's, with a judge's template of its own."
    recipe = made_recipe(
        judge={"template": "Q: {prompt}\nA: {first}\nB: {second}\nA or B?"}, train={"beta": 0.3, "reference": "initial"}
    )
    write_text(tmp_path / "run/recipe.yaml", dump_recipe(recipe))
    save_adapter(tmp_path / "run/seed0/scir/m2/adapter", recipe)
    return tmp_path / "run/seed0/scir/m2"
