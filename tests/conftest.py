"""A tiny random model on disk, an adapter that is not the identity, and a handful of pairs."""

import csv, json, os, signal, sys, types

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest, torch

from scir.model.weights import load_base, load_tokenizer, new_adapter, save_tiny
from scir.recipe import parse_recipe
from scir.method.rewards import text_pair
from helpers import ROOT, SMOLLM2, TEXTS, scir

# a shell ignores Ctrl-C for a job in the background, and the commands under test would too
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("tiny"))
    return parse_recipe(
        {
            "model": {"name": str(folder), "dtype": "float32"},
            "lora": {"r": 4, "alpha": 8},
            "judge": {"template": "Q: {prompt}\nA: {first}\nB: {second}\nA or B?"},
            "sampling": {"candidates": 3, "max_new_tokens": 8, "temperature": 1.0, "top_p": 1.0, "batch_size": 4},
        }
    )


@pytest.fixture(scope="session")
def tokenizer(recipe):
    return load_tokenizer(recipe.model)


@pytest.fixture(scope="session")
def make_policy(recipe):
    "A fresh model with an adapter; `scale` is the size of its random B matrices, 0 leaves them zero."

    def make(scale=0.05, seed=0, model=recipe.model, lora=recipe.lora):
        policy, g = new_adapter(load_base(model), lora, seed), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in policy.named_parameters():
                if "lora_B" in name:
                    p.copy_(scale * torch.randn(p.shape, generator=g))
        return policy

    return make


@pytest.fixture(scope="session")
def policy(make_policy):
    return make_policy().eval()


@pytest.fixture
def pairs(tokenizer):
    return [
        text_pair(tokenizer, f"p{i}", *t, target=float(i % 2), extra={"prompt_id": f"p{i}"})
        for i, t in enumerate(TEXTS)
    ]


@pytest.fixture(scope="session", params=["tiny", "smollm2"])
def any_tokenizer(request, tokenizer):
    if request.param == "tiny":
        return tokenizer
    if not (SMOLLM2 / "tokenizer.json").exists():
        pytest.skip("data/models/smollm2-135m-instruct is not there")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(SMOLLM2)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    "recipes/tiny.yaml, run once from outside."
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    done = scir("run", "recipes/tiny.yaml", "--out", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


@pytest.fixture
def at_root(monkeypatch):
    "In the root of the checkout, where recipes find the tiny model."
    monkeypatch.chdir(ROOT)
    save_tiny()


@pytest.fixture
def file(tmp_path):
    "Writes rows, or a text as it is, and gives the path."

    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(r) + "\n" for r in rows))
        return str(path)

    return write


@pytest.fixture(scope="session")
def alpaca(tmp_path_factory):
    "alpaca_eval, its hub file replaced by a local one; it asks setuptools for pkg_resources, which setuptools no longer has."
    sys.modules.setdefault("pkg_resources", types.ModuleType("pkg_resources"))
    package = pytest.importorskip("alpaca_eval")
    from alpaca_eval.metrics import glm_winrate

    file = tmp_path_factory.mktemp("alpaca") / "df_gamed.csv"
    with open(file, "w", newline="") as f:
        csv.writer(f).writerows([["model", "index", "instruction_difficulty"]] + [["m", i, 0.0] for i in range(1000)])
    glm_winrate.hf_hub_download = lambda **_: str(file)
    return package
