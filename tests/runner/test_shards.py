"Two processes that keep a model's layers in parts (FSDP2) do what one does with the whole: the same rows, gradients that differ by rounding only."

import json, os, subprocess, sys

import pytest, torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from scir.cli import app
from scir.recipe import RecipeError, parse_recipe
from scir.runner.processes import check_shards, join_process_group
from scir.store import read_rows, sharded

from helpers import ENVIRONMENT, ROOT, difference, together


SCRIPT = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from helpers import TEXTS
from scir.model.engines import open_engine
from scir.model.weights import for_scoring, for_training, load_base, load_tokenizer, new_adapter
from scir.stages.optimise import pair_loss
from scir.runner.processes import join_process_group
from scir.recipe import parse_recipe
from scir.method.rewards import text_pair
from scir.stages.sample import sample
from scir.method.scores import score, set_reference
from scir.store import Prompt, all_gather, rank, unfinished, write_rows
from scir.method.trainer import PairTrainer, arguments, save_adapter
from scir.stages.warm_start import warm_start_loss
folder, shard = Path(sys.argv[1]), "--shard" in sys.argv
join_process_group(shard)
spec = lambda how: parse_recipe({"model": {"name": sys.argv[2], "dtype": "float32", "gradient_checkpointing": how}, "lora": {"r": 4, "alpha": 8}, "judge": {"batch_tokens": 300},
                                 "sampling": {"candidates": 3, "max_new_tokens": 12, "temperature": 1.0, "top_p": 1.0, "batch_size": 2}})
def policy(recipe):
    model, g = new_adapter(load_base(recipe.model), recipe.lora, 0), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name: p.copy_(.05 * torch.randn(p.shape, generator=g))
    return model

found = {}
for how in (False, True):
    recipe = spec(how)
    tokenizer, model = load_tokenizer(recipe.model), for_training(policy(recipe), recipe.model)
    rows = [text_pair(tokenizer, str(i), *t, reference_logps=(-20., -20.), target=float(i % 2), extra={"prompt_id": str(i)}) for i, t in enumerate(TEXTS)]
    arm = recipe.arm("scir").model_copy(update={"agreement_gate": False})
    trainer = PairTrainer(None, recipe, tokenizer, model=model, train_dataset=rows, args=arguments(folder / "checkpoints", 0, steps=1, batch_size=8, learning_rate=1e-3))
    trainer.create_optimizer_and_scheduler(1)
    trainer.current_gradient_accumulation_steps = 1
    wrapped = trainer.accelerator.prepare(trainer.model)
    for kind, trainer.loss_of in (("optimise", lambda view: pair_loss(view, arm)), ("warm start", lambda view: warm_start_loss(view, recipe.warm_start))):
        for n in (8, 5, 1):
            trainer.training_step(wrapped, {"pairs": rows[:n]})
            found |= {f"{how} {kind} {n} {k}": p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
            model.zero_grad()
    parts = [p for p in model.parameters() if isinstance(p, DTensor)]
    held = all_gather((sum(p.to_local().numel() for p in parts), sum(p.numel() for p in parts)))
    if not rank(): print(f"parts {held}", flush=True)
if not rank():
    save_file(found, folder / "gradients.safetensors")
    save_adapter(model, folder / "adapter")
all_gather(None)
judge = for_scoring(recipe.model, folder / "adapter", folder / "adapter")
set_reference(judge, rows, 250)
whole = score(judge, tokenizer, rows, recipe, folder / "scores.jsonl")
if not rank(): write_rows(unfinished(folder / "again.jsonl"), whole[:3])  # of a try that was killed
all_gather(None)
assert len(score(judge, tokenizer, rows, recipe, folder / "again.jsonl")) == len(rows)
prompts = [Prompt(id=str(i), prompt=t[0]) for i, t in enumerate(TEXTS[:7])]
with open_engine(recipe, tokenizer, folder / "adapter") as engine: sample(engine, tokenizer, prompts, recipe.sampling, folder / "responses.jsonl", 1)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "What one process makes, and two that share the layers; their words."
    from scir.model.weights import save_tiny

    home = tmp_path_factory.mktemp("shards")
    model, script = save_tiny(home / "tiny"), home / "script.py"
    script.write_text(SCRIPT)
    for name in ("one", "two"):
        (home / name).mkdir()
    alone = subprocess.run(
        [sys.executable, script, home / "one", model], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert alone.returncode == 0, alone.stderr[-3000:]
    both = together(script, home / "two", model, "--shard")
    assert both.returncode == 0, both.stderr[-3000:]
    return home / "one", home / "two", both.stdout


def test_gradients_are_those_of_the_whole_model(made):
    "Of both trainings, with activations kept and made again, with batches that are odd or smaller than the number of processes."
    one, two = (load_file(f / "gradients.safetensors") for f in made[:2])
    assert (
        one.keys() == two.keys()
        and len({k.rpartition(" ")[0] for k in one}) == 12
        and max(v.abs().max() for v in one.values()) > 1
    )
    assert max((one[k] - two[k]).abs().max() for k in one) < 1e-6 * max(v.abs().max() for v in one.values())


def test_each_process_keeps_half_of_the_layers(made):
    said = [line.removeprefix("parts ") for line in made[2].splitlines() if line.startswith("parts")]
    assert said == ["[(36992, 73984), (36992, 73984)]"] * 2


def test_rows_are_those_of_the_whole_model(made):
    "Also where one process has a batch or a response less than the other, and after a kill."
    one, two, _ = made
    assert (one / "responses.jsonl").read_bytes() == (two / "responses.jsonl").read_bytes() and len(
        read_rows(one / "responses.jsonl")
    ) == 21
    for f in ("scores.jsonl", "again.jsonl"):
        assert difference(*(read_rows(folder / f) for folder in (one, two))) < 1e-4
    assert not list(two.glob("*.partial*"))


FAULT = """
import os
if os.environ.get("RANK") == "1":
    from scir.method.trainer import PairTrainer, torch
    usual = PairTrainer.compute_loss
    def compute_loss(self, *args, **kw):
        if self.state.global_step == 2: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return usual(self, *args, **kw)
    PairTrainer.compute_loss = compute_loss
"""


def test_a_run_goes_on_where_one_process_failed(tmp_path, tiny_run):
    "The other one ends too, what is said and noted is what happened, and the run comes out as that of one process."
    (tmp_path / "sitecustomize.py").write_text(FAULT)
    run, command = (
        tmp_path / "tiny",
        [
            "timeout",
            "600",
            "scir",
            "run",
            "recipes/tiny.yaml",
            "--set",
            "iterations=1",
            "--set",
            "arms=[scir]",
            "--out",
            tmp_path / "tiny",
            "--processes",
            "2",
            "--shard",
        ],
    )

    def scir(env):
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)

    failed = scir(ENVIRONMENT | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ENVIRONMENT['PYTHONPATH']}"})
    noted = json.loads((run / "manifest.json").read_text())["failed"]["sft:seed0/sft"]["reason"]
    assert (
        failed.returncode == 1
        and noted.startswith("MemoryError: out of memory with 4 pairs at step 3")
        and "lower batch_size" in noted
    )
    assert (
        failed.stderr.endswith(f"\nscir: {noted.partition(': ')[2]}\n")
        and failed.stderr.count("scir: ") == 1
        and "Traceback" not in failed.stderr
    )
    done = scir(ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming from" in done.stdout
    for node in ("m1", "scir/m2"):
        one, two = (load_file(r / "seed0" / node / "adapter/adapter_model.safetensors") for r in (tiny_run, run))
        assert max((one[k] - two[k]).abs().max() for k in one) < 5e-5, node  # steps of up to 1e-2
    for f in ("m1/responses.jsonl", "scir/m2/preferences.jsonl", "scir/m2/evaluation/responses.jsonl"):
        assert (tiny_run / "seed0" / f).read_bytes() == (run / "seed0" / f).read_bytes(), f
    for f in ("m1/scores.jsonl", "scir/m2/evaluation/held-out.jsonl"):
        assert difference(*(read_rows(r / "seed0" / f) for r in (tiny_run, run))) < 1e-3, f


def test_a_launcher_that_says_fsdp2_is_understood_and_fsdp1_refused(monkeypatch):
    "accelerate must not do it too, so its variable is gone."
    import accelerate

    monkeypatch.setattr("scir.runner.processes.exit_with", lambda owner: None)
    monkeypatch.setattr(accelerate, "PartialState", lambda **kw: None)
    for k, v in {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "ACCELERATE_USE_FSDP": "true",
        "SCIR_SHARD": "",
        "FSDP_VERSION": "1",
    }.items():
        monkeypatch.setenv(k, v)
    with pytest.raises(RuntimeError, match="FSDP1 is not supported.*--fsdp_version 2"):
        join_process_group()
    for k, v in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}.items():
        monkeypatch.setenv(k, v)
    join_process_group()
    assert sharded() and "ACCELERATE_USE_FSDP" not in os.environ
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not sharded()


@pytest.mark.parametrize(
    "setting, match",
    [
        ({"quantize": "nf4"}, "4-bit weights are not sharded"),
        ({"gradient_checkpointing": "sequences"}, "set it to true"),
    ],
)
def test_what_cannot_be_sharded_is_refused(setting, match):
    with pytest.raises(RecipeError, match=match):
        check_shards(parse_recipe({"model": {"name": "tiny-random"} | setting, "train": {"replay": 0}}))


def test_an_older_torch_is_refused(monkeypatch):
    "Its `fully_shard` knows no `ignored_params`."
    check_shards(tiny := parse_recipe({"model": {"name": "tiny-random"}, "train": {"replay": 0}}))
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.6.0+cu124"))
    with pytest.raises(RecipeError, match=r"needs torch 2.7 or newer, and 2.6.0\+cu124 is installed"):
        check_shards(tiny)


def test_the_command_says_among_whom(monkeypatch):
    monkeypatch.chdir(ROOT)
    alone = CliRunner().invoke(app, ["run", "recipes/tiny.yaml", "--shard"])
    assert alone.exit_code == 2 and "--processes" in alone.stderr
    monkeypatch.setattr(sys, "argv", ["scir", "run", "recipes/tiny.yaml", "--processes", "2", "--shard", "--dry-run"])
    lines = CliRunner().invoke(app, sys.argv[1:]).stdout.splitlines()[-2:]
    assert (
        all(line.endswith("--nproc_per_node 2 --no-python scir run recipes/tiny.yaml --shard") for line in lines)
        and "--nnodes 2" in lines[1]
    )
