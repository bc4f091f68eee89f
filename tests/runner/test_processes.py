"""Two processes on one machine do what one does: the same rows, gradients that differ by rounding only."""

import os, signal, subprocess, sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import psutil, pytest, typer
from safetensors.torch import load_file
from typer.testing import CliRunner

from scir import cli, store
from scir.recipe import load_recipe
from scir.runner import processes
from scir.runner.manifest import note_failure, start_manifest
from scir.runner.plan import Step
from scir.runner.processes import run_announced_steps, without_launcher, join_process_group, launch_line
from scir.runner.run import run_recipe
from scir.runner.work import failure_recorded
from scir.store import Journal, Prompt, read_rows, local_items, unfinished, unfinished_parts

from helpers import ENVIRONMENT, ROOT, difference, scir, together


GRADIENTS = """
import sys, torch
from safetensors.torch import save_file
from pathlib import Path
from types import SimpleNamespace
from helpers import TEXTS
from scir.model.weights import load_base, load_tokenizer, new_adapter, save_tiny
from scir.stages.optimise import pair_loss
from scir.runner.processes import join_process_group
from scir.recipe import parse_recipe
from scir.method.rewards import text_pair
from scir.store import rank
from scir.method.trainer import PairTrainer, arguments
folder, out, pairs = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
join_process_group()
recipe = parse_recipe({"model": {"name": str(folder / "tiny"), "dtype": "float32"}, "lora": {"r": 4, "alpha": 8}})
tokenizer, policy, g = load_tokenizer(recipe.model), new_adapter(load_base(recipe.model), recipe.lora, 0), torch.Generator().manual_seed(0)
with torch.no_grad():
    for name, p in policy.named_parameters():
        if "lora_B" in name: p.copy_(.05 * torch.randn(p.shape, generator=g))
rows = [text_pair(tokenizer, str(i), *t, reference_logps=(-20., -20.)) for i, t in enumerate(TEXTS)][:pairs]
spec = recipe.arm("scir").model_copy(update={"agreement_gate": False})
trainer = PairTrainer(lambda view: pair_loss(view, spec), recipe, tokenizer, model=policy, train_dataset=rows,
                      args=arguments(folder / f"checkpoints{out}", 0, steps=1, batch_size=8, learning_rate=1e-3))
read = [[p.id for p in b["pairs"]] for b in trainer.get_train_dataloader()]
trainer.create_optimizer_and_scheduler(1)
trainer.current_gradient_accumulation_steps = 1
wrapped = trainer.accelerator.prepare(trainer.model)
loss = trainer.training_step(wrapped, {"pairs": rows})
if not rank(): save_file({n: p.grad for n, p in policy.named_parameters() if p.grad is not None}, folder / f"{out}.safetensors")
sys.stdout.write(f"{rank()} {read}\\n")  # at once, not in pieces between another's
"""


@pytest.mark.parametrize("pairs", [8, 5, 1])
def test_gradients_of_two_processes_are_those_of_one(tmp_path, pairs):
    "Also where the batch is odd, or smaller than the number of processes."
    from scir.model.weights import save_tiny

    save_tiny(tmp_path / "tiny")
    script = tmp_path / "gradients.py"
    script.write_text(GRADIENTS)
    alone = subprocess.run(
        [sys.executable, script, tmp_path, "one", str(pairs)], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert alone.returncode == 0, alone.stderr[-3000:]
    both = together(script, tmp_path, "two", pairs)
    assert both.returncode == 0, both.stderr[-3000:]
    one, two = (load_file(tmp_path / f"{n}.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys() and max(v.abs().max() for v in one.values()) > 1
    assert max((one[k] - two[k]).abs().max() for k in one) < 1e-6 * max(v.abs().max() for v in one.values())
    batches = alone.stdout.split(" ", 1)[1].strip()
    assert (
        sorted(line.split(" ", 1)[1] for line in both.stdout.strip().splitlines()) == [batches] * 2
    )  # both read whole batches, in the order of one


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "recipes/tiny.yaml, run by two processes."
    folder = tmp_path_factory.mktemp("two") / "tiny"
    done = subprocess.run(
        ["scir", "run", "recipes/tiny.yaml", "--out", folder, "--processes", "2"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


def test_a_run_of_two_processes_is_that_of_one(two, tiny_run):
    folder, _ = two
    files = {
        f.relative_to(tiny_run)
        for f in tiny_run.rglob("*")
        if f.is_file() and "notebooks" not in f.parts and f.name != "stdout.txt"
    }
    assert {f.relative_to(folder) for f in folder.rglob("*") if f.is_file() and "notebooks" not in f.parts} == files
    adapters, rows = (
        [f for f in files if f.suffix == ".safetensors"],
        [f for f in files if f.suffix == ".jsonl" and f.name != "metrics.jsonl"],
    )
    assert len(adapters) == 6 and len(rows) > 20
    for f in adapters:
        one, other = load_file(tiny_run / f), load_file(folder / f)
        assert max((one[k] - other[k]).abs().max() for k in one) < 5e-5, f  # steps of up to 1e-2
    for f in rows:
        if f.name in ("responses.jsonl", "preferences.jsonl"):
            assert (tiny_run / f).read_bytes() == (folder / f).read_bytes(), f
        else:
            assert difference(*(read_rows(r / f) for r in (tiny_run, folder))) < 1e-3, f
    for f in (f for f in files if f.name == "metrics.jsonl"):
        ties = lambda line: {
            k: v for k, v in line.items() if k != "accuracy_implicit" or line["step"] > 1
        }  # before the first step the implicit margin is zero but for rounding
        assert difference(*([ties(line) for line in read_rows(r / f)] for r in (tiny_run, folder))) < 1e-4, f


def test_two_processes_speak_with_one_voice(two, tiny_run):
    voice = lambda text: [
        line
        for line in text.splitlines()
        if line.startswith(("[", "verdict mass", "inconsistency", "claims", "tables:"))
    ]
    said, alone = voice(two[1].stdout), voice((tiny_run / "stdout.txt").read_text())
    assert said[:-1] == alone[:-1] and said[-1].startswith("tables:")


def test_one_process_takes_over_a_run_of_two(two):
    "Nothing is done again, and nothing waits for processes that are not there."
    done = scir("run", "recipes/tiny.yaml", "--out", two[0])
    assert done.returncode == 0 and done.stdout.count("unchanged") == 22, done.stdout


def test_every_row_is_somebodys(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    found = []
    for k in "012":
        monkeypatch.setenv("RANK", k)
        found += local_items(list(range(8)))
    assert sorted(found) == list(range(8))


def test_unfinished_rows_of_three_processes_are_continued_by_one(tmp_path, monkeypatch):
    out, row = tmp_path / "prompts.jsonl", lambda i: Prompt(id=i, prompt="?")
    for k, i in enumerate("abc"):
        store.write_rows(unfinished(out, k), [row(i)])
    (tmp_path / "prompts.partial.notes.jsonl").write_text("another file")
    journal = Journal(out, Prompt)
    assert journal.done == set("abc") and list(unfinished_parts(out)) == [0]
    journal.add(row("d"))
    assert [r.id for r in journal.finish(list("dcba"))] == list("dcba") and not unfinished_parts(out)
    assert (tmp_path / "prompts.partial.notes.jsonl").exists()


def test_journals_of_two_processes_make_one_file(tmp_path, monkeypatch):
    "The second one's rows are in its own file until the first one puts all in order."
    out, row = tmp_path / "prompts.jsonl", lambda i: Prompt(id=i, prompt="?")
    monkeypatch.setattr(store, "barrier", lambda: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    second = Journal(out, Prompt)
    second.add(row("b"))
    second.file.close()
    assert [r.id for r in read_rows(unfinished(out, 1), Prompt)] == ["b"] and not unfinished(out).exists()
    monkeypatch.setenv("RANK", "0")
    first = Journal(out, Prompt)
    assert first.done == {"b"}  # a later try knows what another process had made
    first.add(row("a"))
    assert [r.id for r in first.finish(["a", "b"])] == ["a", "b"] and not unfinished_parts(out)


@pytest.mark.parametrize("number", ["0", "1"])
def test_the_first_process_has_all_rows_before_another_empties_its_file(tmp_path, monkeypatch, number):
    out, seen = tmp_path / "prompts.jsonl", []
    for k, i in enumerate("ab"):
        store.write_rows(unfinished(out, k), [Prompt(id=i, prompt="?")])
    monkeypatch.setattr(
        store,
        "barrier",
        lambda: seen.append(["".join(sorted(r.id for r in read_rows(unfinished(out, k), Prompt))) for k in (0, 1)]),
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", number)
    Journal(out, Prompt)
    assert seen == (
        [["a", "b"], ["ab", "b"]] if number == "0" else [["a", "b"], ["a", "b"]]
    )  # what is there when they meet, twice
    assert [len(read_rows(unfinished(out, k))) for k in (0, 1)] == ([2, 1] if number == "0" else [1, 0])


def test_kernels_are_started_outside_the_group(monkeypatch):
    given = {
        k: "2"
        for k in (
            "RANK",
            "WORLD_SIZE",
            "LOCAL_RANK",
            "LOCAL_WORLD_SIZE",
            "MASTER_ADDR",
            "MASTER_PORT",
            "TORCHELASTIC_RUN_ID",
            "GROUP_RANK",
            "ROLE_RANK",
            "ACCELERATE_USE_CPU",
        )
    }
    for k, v in given.items():
        monkeypatch.setenv(k, v)
    with without_launcher():
        assert not given.keys() & os.environ.keys()
    assert given.items() <= os.environ.items()


def two_processes(run, *words):
    return [Path(sys.executable).parent / "scir", "run", "recipes/tiny.yaml", "--out", run, "--processes", "2", *words]


@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_processes_end_with_the_command(tmp_path, sent, code):
    "Ctrl-C is said once; and nobody works on when the command is killed."
    with open(tmp_path / "err", "w") as err:
        command = subprocess.Popen(
            two_processes(tmp_path / "run"),
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=err,
            text=True,
            start_new_session=True,
        )
        next(line for line in command.stdout if "sft" in line)
        begun = psutil.Process(command.pid).children(recursive=True)
        os.killpg(command.pid, sent)
        assert command.wait(40) == code and len(begun) >= 2
    gone, alive = psutil.wait_procs(begun, 10)
    assert not alive and (tmp_path / "err").read_text() == (
        "scir: interrupted; rerun the same command to resume\n" if sent == signal.SIGINT else ""
    )


def test_a_faulty_recipe_is_said_once_and_starts_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(cli, "launch", lambda *a: pytest.fail("started"))
    done = CliRunner().invoke(cli.app, [*map(str, two_processes(tmp_path / "run", "--set", "arms=[external]")[1:])])
    assert (
        done.exit_code == 1
        and done.stderr.startswith("scir: arm external: name its reward model")
        and len(done.stderr.splitlines()) == 1
    )
    assert not (tmp_path / "run").exists()


def failed(code):
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    return ChildFailedError("scir", {1: ProcessFailure(1, 7, code, "nowhere")})


def ended(sent):
    from torch.distributed.elastic.multiprocessing.api import SignalException

    return SignalException("ended", signal.Signals(sent))


@pytest.mark.parametrize(
    "raised, code, said",
    [
        (failed(3), 3, ""),
        (
            failed(-9),
            1,
            "scir: process 1 of 2 was killed (SIGKILL), probably out of memory; rerun the same command to resume\n",
        ),
        (ended(15), 143, ""),
    ],
)
def test_a_launcher_ends_as_the_processes_do(monkeypatch, capsys, raised, code, said):
    "One that failed has said why; one that was killed could not."

    def torchrun(args):
        raise raised

    monkeypatch.setattr("torch.distributed.run.run", torchrun)
    monkeypatch.setattr("logging.disable", lambda: None)
    for k in ("PATH", "OMP_NUM_THREADS"):
        monkeypatch.setenv(k, os.environ.get(k, "1"))
    with pytest.raises(typer.Exit) as exit:
        cli.launch(["run"], 2)
    assert exit.value.exit_code == code and capsys.readouterr().err == said


def test_a_step_that_fails_in_several_processes_is_said_by_the_first_one(tmp_path):
    step, closed = (
        Step("sample", "seed0/m1"),
        RuntimeError("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:21"),
    )
    start_manifest(load_recipe(ROOT / "recipes/tiny.yaml"), tmp_path)
    note_failure(tmp_path, step, "no luck")
    with pytest.raises(SystemExit), failure_recorded(tmp_path, step):
        raise closed
    assert store.read_json(tmp_path / "manifest.json")["failed"][step.key]["reason"] == "no luck"
    with pytest.raises(RuntimeError), failure_recorded(tmp_path, Step("judge", "seed0/m1")):
        raise closed
    assert (
        "another process of this step ended; see its error (if it printed none, it probably ran out of memory)"
        in store.read_json(tmp_path / "manifest.json")["failed"]["judge:seed0/m1"]["reason"]
    )


def test_the_others_leave_it_to_the_first_one_to_say_why_it_ended(tmp_path, monkeypatch):
    def all_gather(value):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(processes, "all_gather", all_gather)
    with pytest.raises(SystemExit):
        run_announced_steps(tmp_path)


def test_jobs_in_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("scir.runner.run.join_process_group", lambda shard: None)
    with pytest.raises(ValueError, match="2 jobs in 2 processes: use either --jobs or --processes"):
        run_recipe(load_recipe("recipes/tiny.yaml"), tmp_path, jobs=2)


def test_others_are_waited_for_as_long_as_a_report_takes_and_left_in_order(monkeypatch):
    asked = []
    monkeypatch.setattr("accelerate.PartialState", lambda **kw: asked.append(kw["timeout"]))
    monkeypatch.setattr(processes, "exit_with", asked.append)
    for k, v in {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(k, v)
    monkeypatch.setattr(processes, "atexit", SimpleNamespace(register=asked.append))
    join_process_group()
    assert asked == [os.getppid(), timedelta(days=2), processes.leave_process_group]


def test_a_number_of_processes_that_no_launcher_set_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="WORLD_SIZE=2 .* unset WORLD_SIZE"):
        join_process_group()


def test_processes_do_not_start_processes_again(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(cli, "launch", lambda *a: pytest.fail("started"))
    done = CliRunner().invoke(cli.app, ["run", "recipes/absent.yaml", "--processes", "2"])
    assert done.exit_code == 2 and "a launcher already started several (WORLD_SIZE=2)" in done.stderr


def test_deepspeed_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(processes, "exit_with", lambda owner: None)
    monkeypatch.setattr(
        "accelerate.PartialState", lambda **kw: pytest.fail("joined")
    )  # which would wait for the others for days
    for k, v in {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "ACCELERATE_USE_DEEPSPEED": "true"}.items():
        monkeypatch.setenv(k, v)
    with pytest.raises(RuntimeError, match="ZeRO-3 splits the weights.*--multi_gpu.*--use_fsdp"):
        join_process_group()


def test_launch_line():
    assert (
        launch_line(["run"], 2)[0] == "torchrun"
        and "--standalone" in launch_line(["run", "r.yaml"], 2)
        and launch_line(["run", "r.yaml"], 2)[-3:] == ["scir", "run", "r.yaml"]
    )
    line = launch_line(["run", "r.yaml"], 8, machines=4)
    given = dict(zip(line[1::2], line[2::2]))
    assert (
        given.items()
        >= {
            "--nnodes": "4",
            "--nproc_per_node": "8",
            "--node_rank": "$RANK_OF_THIS_MACHINE",
            "--master_addr": "$FIRST_MACHINE",
        }.items()
    )


@pytest.mark.parametrize("words", [("--processes", "2"), ("--processes=2",)])
def test_the_words_for_each_process_lack_those_for_the_launcher(monkeypatch, words):
    monkeypatch.setattr("sys.argv", ["scir", "run", "a.yaml", *words, "--dry-run", "--set", "x=1"])
    assert cli.command_words() == ["run", "a.yaml", "--set", "x=1"]
