"""What `scir doctor` finds, on this machine and on machines that are made up."""

import json, os, shutil, subprocess, sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from scir import cli, doctor
from scir.cli import app, examine
from scir.doctor import (
    Finding,
    ask,
    constrained,
    cores,
    disk,
    fault_counts,
    lines,
    memory,
    no_gpu,
    package,
    packages,
    python,
    text_encoding,
)
from scir.model.weights import model_folder
from scir.recipe import ModelSpec, load_recipe, parse_recipe
from scir.runner import checks
from scir.runner.checks import (
    adapter_bytes,
    context,
    data,
    data_found,
    fits,
    four_bits,
    hub_token,
    kernel,
    model_found,
    models,
    open_recipe,
    optimizer,
    precision,
    room_on_disk,
    row_bytes,
    threads,
    verdicts,
)
from scir.store import write_rows

from helpers import ROOT, SCIR


pytestmark = pytest.mark.usefixtures("at_root")


def group(folder, **files):
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


# the machine ----------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected", [("max 100000", None), ("100000 100000", 1), ("50000 100000", 1), ("99900000 100000", None)]
)
def test_cores_of_a_container(tmp_path, text, expected):
    assert cores(group(tmp_path, cpu_max=text)) == (expected or len(os.sched_getaffinity(0)))


def test_memory_of_a_container(tmp_path):
    import psutil

    assert (
        memory(group(tmp_path, memory_max="max"))[1]
        == memory(tmp_path / "no such folder")[1]
        == psutil.virtual_memory().total
    )
    assert memory(group(tmp_path, memory_max="1000000", memory_current="400000")) == (600000, 1000000)
    assert memory(group(tmp_path, memory_max="1000000", memory_current="1100000"))[0] == 0


@pytest.mark.parametrize(
    "args, state, fix",
    [
        ((None, None, "", None), "ok", ""),
        (("550", None, "", None), "warn", "pip install torch"),
        (("550", "12.8", "", ""), "warn", "unset CUDA_VISIBLE_DEVICES"),
        (("550", "12.8", "driver too old", None), "warn", "nvidia-smi"),
    ],
)
def test_why_there_is_no_gpu(args, state, fix):
    found = no_gpu(*args)
    assert found.state == state and fix in found.fix and args[2] in found.finding


@pytest.mark.parametrize(
    "args, fix",
    [
        ((8, 2, 0.0, {}), "export OMP_NUM_THREADS=2"),
        ((2, 2, 1.5, {"OMP_WAIT_POLICY": "ACTIVE"}), "unset OMP_WAIT_POLICY GOMP_SPINCOUNT"),
        ((2, 2, 1.5, {"OMP_WAIT_POLICY": "passive"}), ""),
        ((2, 2, 0.5, {}), ""),
        ((1, 2, 9.0, {}), ""),
    ],
)
def test_threads(args, fix):
    found = threads(*args)
    assert found.fix == fix and found.state == ("warn" if fix else "ok")


@pytest.mark.parametrize(
    "dtype, fast, state, words",
    [
        ("auto", True, "ok", "bfloat16"),
        ("auto", False, "ok", "float32"),
        ("float32", True, "ok", "bfloat16 would be faster"),
        ("float32", False, "ok", "as the recipe says"),
        ("bfloat16", False, "warn", "slower"),
        ("bfloat16", True, "ok", "as the recipe says"),
    ],
)
def test_precision_is_what_the_model_gets(monkeypatch, dtype, fast, state, words):
    import torch
    from scir.model.weights import compute_dtype

    for name in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda: fast)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found, spec = precision(ModelSpec(dtype=dtype)), ModelSpec(dtype=dtype)
    assert (
        found.state == state
        and words in found.finding
        and found.finding.startswith(str(compute_dtype(spec)).removeprefix("torch."))
    )


def test_four_bits_are_tried(monkeypatch):
    from bitsandbytes import functional

    assert four_bits(ModelSpec()).state == "ok"
    with monkeypatch.context() as m:
        m.setattr(functional, "dequantize_4bit", lambda packed, state: packed.float().new_zeros(64, 64))
        assert [four_bits(ModelSpec(quantize=q)).state for q in (None, "nf4")] == ["warn", "fault"]
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    found = four_bits(ModelSpec(quantize="nf4"))
    assert found.state == "fault" and "bitsandbytes" in found.fix


def test_a_kernel_is_started_as_for_a_stage(monkeypatch, tmp_path):
    assert kernel().state == "ok"
    absent = kernel("nobody-has-it")
    assert absent.state == "fault" and absent.fix == "python -m ipykernel install --sys-prefix --name nobody-has-it"
    (tmp_path / "kernels/dead").mkdir(parents=True)
    (tmp_path / "kernels/dead/kernel.json").write_text(
        json.dumps(
            {"argv": [sys.executable, "-c", "import sys; sys.exit(3)"], "display_name": "dead", "language": "python"}
        )
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setattr(checks, "use_warm_kernels", lambda: False)
    monkeypatch.setattr(checks.KernelProvisionerFactory.instance(), "default_provisioner_name", "local-provisioner")
    dead = kernel("dead", 20)
    assert dead.state == "fault" and "does not start" in dead.finding
    monkeypatch.setattr(checks.KernelProvisionerFactory.instance(), "default_provisioner_name", "scir-absent")
    assert kernel().fix == "pip install -e ."


def test_a_kernel_ends_as_a_process_does(tmp_path):
    "What waits for the end of the process, as a tracker does with its last lines, is done at the end of a warm kernel too."
    import nbformat
    from nbclient import NotebookClient
    from scir.runner.kernels import use_warm_kernels

    use_warm_kernels()
    last = tmp_path / "last"
    NotebookClient(
        nbformat.v4.new_notebook(
            cells=[
                nbformat.v4.new_code_cell(
                    f"import atexit; from pathlib import Path; atexit.register(Path({str(last)!r}).touch)"
                )
            ]
        ),
        kernel_name="python3",
    ).execute()
    assert last.exists()


@pytest.mark.parametrize("answer, state", [("/usr/bin/python", "fault"), (sys.executable, "ok")])
def test_a_kernel_of_another_python_is_a_fault(monkeypatch, answer, state):
    hook = lambda code, timeout, output_hook: output_hook({"msg_type": "stream", "content": {"text": answer + "\n"}})
    monkeypatch.setattr(checks, "run_kernel", lambda **kw: nullcontext(SimpleNamespace(execute_interactive=hook)))
    assert kernel().state == state


# packages -------------------------------------------------------------------


def test_a_package_is_imported_by_its_modules_name():
    assert (
        doctor.package("huggingface-hub>=0.1", {}).state == "ok"
        and doctor.package("huggingface-hub", {"huggingface_hub": "0.0.1"}).state == "warn"
    )  # as a wheel writes it


def test_tested_versions_are_those_of_this_python(tmp_path):
    (tmp_path / "c.txt").write_text(
        "# why\nnumpy==3.1; python_version >= '3'\nnumpy==2.2; python_version < '3'\n\nGlob==1\n"
    )
    assert constrained(tmp_path / "c.txt") == {"numpy": "3.1", "Glob": "1"} and constrained(tmp_path / "absent") == {}


def test_a_package_is_imported_and_its_version_compared(monkeypatch):
    from importlib import metadata

    have = metadata.version("typer")

    def broken(name):
        raise OSError("libcudart.so: cannot open")

    assert package("typer>=0.1", {"typer": have}) == Finding("typer", have)
    assert package("typer>=0.1", {"typer": "0.0.1"}) == Finding(
        "typer", f"{have}; tested with 0.0.1", "warn", "pip install typer==0.0.1"
    )
    assert package("typer>=999", {}) == Finding(
        "typer", f"{have}, but >=999 is required", "fault", "pip install 'typer>=999'"
    )
    assert package("nobody-has-it>=1", {}) == Finding(
        "nobody-has-it", "not installed", "fault", "pip install 'nobody-has-it>=1'"
    )
    assert package("typer", {}, broken) == Finding(
        "typer",
        f"{have} cannot be imported: libcudart.so: cannot open",
        "fault",
        f"pip install --force-reinstall --no-deps typer=={have}",
    )
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "2.13.0+cpu")
    assert package("typer>=2", {"typer": "2.13.0"}).state == "ok"


def test_all_that_a_run_needs_is_looked_at():
    *others, last = packages()
    assert (
        all(
            f"{name} " in last.finding + " ".join(f.what + " " for f in others)
            for name in ("torch", "transformers", "pyyaml", "papermill", "bitsandbytes")
        )
        and "alpaca_eval" not in last.finding
    )


@pytest.mark.parametrize(
    "version, state", [((3, 9, 2), "fault"), ((3, 10, 0), "ok"), ((3, 12, 9), "ok"), ((3, 13, 0), "fault")]
)
def test_python(version, state):
    assert python(version, ">=3.10,<3.13").state == state


def test_locale():
    assert (
        text_encoding("utf8").state == text_encoding("UTF-8").state == "ok"
        and text_encoding("ANSI_X3.4-1968").fix == "export PYTHONUTF8=1"
    )


def test_disk(tmp_path, monkeypatch):
    assert (
        disk(tmp_path / "not/yet/there", 1, "a row").state == "ok"
        and disk(tmp_path, 1e18, "all").state == "fault"
        and "du -sh" in disk(tmp_path, 1e18, "all").fix
    )
    monkeypatch.setattr(os, "access", lambda *a: False)
    assert "no write permission" in disk(tmp_path, 1, "a row").finding


# a recipe -------------------------------------------------------------------


def made(**more):
    return parse_recipe({"model": {"name": "tiny-random"}} | more)


@pytest.mark.parametrize(
    "name, offline, state, words",
    [
        ("tiny-random", True, "ok", "on this machine"),
        ("data/models/absent", False, "fault", "no config.json"),
        ("someone/a-model-nobody-has", True, "fault", "HF_HUB_OFFLINE"),
        ("someone/a-model-nobody-has", False, "warn", "hub"),
        ("gpt-nobody-has", False, "warn", "hub"),
    ],
)
def test_where_a_model_is(name, offline, state, words):
    found = model_found(name, None, False, offline)
    assert found.state == state and words in found.finding and (found.state == "ok" or found.fix)


def test_a_built_in_model_is_made_later_and_pickled_weights_are_not_enough(tmp_path, monkeypatch):
    shutil.copy(model_folder("tiny-random") / "config.json", tmp_path / "config.json")
    assert (
        model_found(str(tmp_path), None, False, True).state == "fault"
        and model_found(str(tmp_path), None, True, True).state == "ok"
    )
    monkeypatch.chdir(tmp_path)
    assert "by the first run" in model_found("smollm2-135m-instruct", None, False, True).finding
    assert verdicts(made()) is None and context(made()) is None and room_on_disk(made()) is None


def test_a_model_in_the_hubs_cache_is_found(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--someone--theirs/snapshots/abc"
    shutil.copytree(model_folder("tiny-random"), snapshot)
    (tmp_path / "models--someone--theirs/refs").mkdir()
    (tmp_path / "models--someone--theirs/refs/main").write_text("abc")
    import huggingface_hub

    original = huggingface_hub.try_to_load_from_cache
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda *a, **kw: original(*a, cache_dir=tmp_path, **kw)
    )
    theirs = made(model={"name": "someone/theirs"})
    assert [f.state for f in models(theirs)] == ["ok"] and verdicts(theirs).state == "ok"


def test_every_model_of_a_recipe_is_looked_for_but_no_server():
    recipe = made(labels={"external": "data/models/absent"}, alignment={"judge": "http://localhost:1/v1"})
    assert [f.state for f in models(recipe)] == ["ok", "fault"]


def test_data_is_read_and_counted(tmp_path):
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"Question {i}"} for i in range(30)] + [{"prompt": ""}])
    (found,) = data(
        made(
            data={
                "prompts": str(tmp_path / "prompts.jsonl"),
                "held_out_prompts": 10,
                "prompt_limit": 12,
                "test_limit": 7,
            }
        )
    )
    assert found == Finding("data", "12 prompts to train on, 10 held out; labelled pairs: held-out 7; dropped: 1 empty")
    (lost,) = data(made(data={"prompts": "absent.jsonl"}))
    assert lost.state == "fault" and "absent.jsonl" in lost.finding


def test_data_and_token_of_the_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    recipe = made(data={"prompts": ["data/prompts.jsonl", "someone/set:train"]})
    monkeypatch.setattr(checks, "is_offline_mode", lambda: False)
    assert [(f.state, "read_source('someone/set:train')" in f.fix) for f in data(recipe)] == [
        ("warn", True)
    ] and data_found("x/y", False, True).state == "fault"
    (tmp_path / "someone___set").mkdir()
    assert [f.finding for f in data(recipe)] == ["someone/set:train: in the cache"]
    for token, state in ((None, "warn"), ("hf_x", "ok")):
        monkeypatch.setattr(checks, "get_token", lambda: token)
        assert (
            hub_token(recipe).state == state and hub_token(made()) is None and "hf_x" not in hub_token(recipe).finding
        )


def test_verdicts_context_optimizer():
    assert (
        verdicts(made()).state == "ok"
        and verdicts(made(judge={"verdicts": ["First", "Second"]})).fix == "add --set 'judge.verdicts=[A, B]'"
    )
    assert optimizer(made()) is None and optimizer(made(train={"optimizer": "paged_adamw_8bit"})).state == "fault"
    assert (
        context(made()).state == context(made(data={"max_prompt_tokens": 4000})).state == "ok"
    )  # no prompt is that long
    assert context(made(sampling={"max_new_tokens": 2000})).state == "warn"


@pytest.mark.parametrize("longest", [300, 1000])
def test_the_fix_for_the_context_works(longest):
    warned = fits(1024, 40, longest, 512)
    left = int(warned.fix.split("max_prompt_tokens=")[1].split()[0])
    assert (
        warned.state == "warn"
        and fits(1024, 40, left, left).state == "ok"
        and fits(1024, 40, left + 1, left + 1).state == "warn"
    )


def test_a_fault_hides_no_other_and_is_told_once():
    found = [
        f
        for group, f in examine("recipes/tiny.yaml", ("report_to=wandb", "data.prompts=nope.jsonl"), None, True)
        if group == "recipe"
    ]
    assert [(f.what, f.fix.split()[0]) for f in found if f.state == "fault"] == [("recipe", "pip"), ("data", "add")]
    assert {"model", "verdicts", "context"} <= {f.what for f in found}


def test_the_disk_is_estimated_for_what_a_run_really_writes(tiny_run):
    recipe = load_recipe(tiny_run / "recipe.yaml")
    written = (tiny_run / "seed0/m1/adapter/adapter_model.safetensors").read_bytes()
    assert adapter_bytes(recipe) == len(written) - 8 - int.from_bytes(
        written[:8], "little"
    )  # safetensors: the header's length, the header, the numbers
    rows, bound = sum(f.stat().st_size for f in tiny_run.glob("seed0/**/*.jsonl")), row_bytes(recipe, 8, 4, 12, 16)
    assert rows < bound < 200 * rows
    assert (
        room_on_disk(recipe).state == "ok"
        and "7 adapters" not in room_on_disk(recipe).finding
        and "6 adapters" in room_on_disk(recipe).finding
    )


def test_a_recipe_that_does_not_load(tmp_path):
    for path, settings, words in (
        ("recipes/absent.yaml", (), "no such recipe"),
        ("recipes/tiny.yaml", ("train.betta=1",), "train.beta"),
        ("recipes/tiny.yaml", ("arms=[external]",), "labels.external"),
    ):
        recipe, (found,) = open_recipe(path, settings)
        assert (
            (recipe is None) == (words != "labels.external") and found.state == "fault" and words in found.finding
        )  # what loads is looked at further


# all of it ------------------------------------------------------------------


def test_a_check_that_fails_is_a_fault_and_the_others_go_on(monkeypatch):
    def broken_check():
        raise ModuleNotFoundError("No module named 'x'", name="x")

    assert (
        ask(broken_check)
        == [Finding("broken chec", "ModuleNotFoundError: No module named 'x'", "fault", "pip install x")]
        and ask(lambda: None) == []
    )
    monkeypatch.setattr(doctor, "text_encoding", broken_check)
    monkeypatch.setattr(doctor, "packages", lambda: [Finding("torch", "not installed", "fault", "pip install torch")])
    found = list(examine("recipes/tiny.yaml", (), None, True))
    assert (
        [f.state for _, f in found].count("fault") == 2
        and found[-1][1].what == "torch"
        and found[0][1].what == "system"
    )


def test_lines_fit_80_columns_and_the_fix_is_whole():
    fix = "add " + " ".join(f"--set field{i}=value" for i in range(9))
    shown = lines(Finding("context", "many words " * 30, "warn", fix)).splitlines()
    assert (
        max(map(len, shown[:-1])) <= 80
        and shown[-1].strip() == f"fix: {fix}"
        and len({len(l) - len(l.lstrip()) for l in shown[1:]}) == 1
    )
    assert (
        fault_counts([Finding("a", "", "fault"), Finding("b", ""), Finding("c", "", "warn"), Finding("d", "", "warn")])
        == "1 fault, 2 warnings, 1 ok"
    )


def test_the_command(monkeypatch):
    ask = lambda *args: subprocess.run(
        [SCIR, "doctor", *args],
        cwd=ROOT / "tests",
        env=os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "80"},
        capture_output=True,
        text=True,
    )
    well = ask("--recipe", "../recipes/tiny.yaml")
    assert well.returncode == 0 and well.stderr == "" and well.stdout.splitlines()[-1].startswith("0 faults, ")
    assert [l for l in well.stdout.splitlines() if not l.startswith(" ")][:-1] == [
        "machine",
        "python",
        "scir here",
        "recipe",
        "plan",
    ]
    assert all(
        f" {what} " in well.stdout
        for what in (
            "cores",
            "memory",
            "precision",
            "attention",
            "4 bits",
            "threads",
            "kernels",
            "verdicts",
            "context",
            "disk",
            "warm_start",
            "hours",
        )
    )


def test_the_command_at_fault(monkeypatch):
    monkeypatch.setattr(
        cli,
        "examine",
        lambda path, settings, gpu, probed: iter(
            [("machine", Finding("a", "b", "fault", "c")), ("machine", Finding("d", "e"))]
        ),
    )
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 1 and json.loads(done.stdout) == {
        "findings": [
            {"group": "machine", "what": "a", "finding": "b", "state": "fault", "fix": "c"},
            {"group": "machine", "what": "d", "finding": "e", "state": "ok", "fix": ""},
        ]
    }
    assert CliRunner().invoke(app, ["doctor"]).stdout.splitlines() == [
        "machine",
        "  fault a           b",
        " " * 20 + "fix: c",
        "  ok    d           e",
        "1 fault, 0 warnings, 1 ok",
    ]
