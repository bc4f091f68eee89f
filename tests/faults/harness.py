"""What the tests of faults share: commands from outside, comparison of runs, the tally."""

import subprocess
from collections import Counter

from scir.store import hash_path, read_json

from helpers import ENV, ROOT, SCIR


TALLY = Counter()


def command(*args, **kw):
    "A `scir` command that ends by itself; its output as text."
    return subprocess.run(
        [SCIR, *map(str, args)],
        cwd=ROOT,
        env=ENV | kw.pop("env", {}),
        capture_output=True,
        text=True,
        timeout=600,
        **kw,
    )


def one_line(done, *words):
    "It failed, and said so in one line (progress bars aside) that holds all the words."
    said = [l for l in done.stderr.replace("\r", "\n").splitlines() if l.startswith("scir: ")]
    assert (
        done.returncode == 1
        and len(said) == 1
        and "Traceback" not in done.stderr + done.stdout
        and all(w in said[0] for w in words)
    ), (done.returncode, done.stderr[-2000:])


def outputs(run):
    "Everything that the run's steps wrote, hashed now, and their summaries."
    steps = read_json(run / "manifest.json")["steps"]
    return {f: hash_path(run / f) for s in steps.values() for f in s["outputs"]} | {
        k: s["summary"] for k, s in steps.items()
    }


def rows(run):
    return Counter(f.relative_to(run).as_posix() for f in run.rglob("*.jsonl") for line in f.open("rb"))


def equal(run, reference):
    "The run ended with what the uninterrupted one ended with; rows that it lacks are counted."
    TALLY["rows lost"] += sum((rows(reference) - rows(run)).values())
    ours, theirs = outputs(run), outputs(reference)
    assert ours.keys() == theirs.keys() and not [k for k in ours if ours[k] != theirs[k]], [
        k for k in theirs if ours.get(k) != theirs[k]
    ]
    assert not [f for pattern in ("*.partial.jsonl", ".*.tmp", "checkpoints") for f in run.rglob(pattern)]


SHORT = ("--set", "arms=[scir]", "--set", "iterations=1")


def uninterrupted(tmp_path_factory, *settings):
    folder = tmp_path_factory.mktemp("reference") / "tiny"
    done = command("run", "recipes/tiny.yaml", "--out", folder, *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder
