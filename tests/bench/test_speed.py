import json, subprocess, sys

import pytest, torch

from scir.model.decoding import end_ids, generate
from scir.model.logprobs import encode_prompt
from scir.store import peak_bytes

from helpers import ROOT

from .speed import (
    GROUPS,
    TARGETS,
    Workload,
    alternate,
    run_in_child,
    floor_seconds,
    library_generate,
    judge_steps,
    meets_target,
)

BENCH = [sys.executable, "-m", "tests.bench.speed"]


@pytest.fixture(scope="module")
def work(recipe):
    return Workload(recipe, repeats=1, tokens=4)


def markdown_table(found: dict) -> str:
    "The figures as a Markdown table, described as in `TARGETS`."
    sign = lambda f: "met" if f["met"] else "**missed**"
    return "\n".join(
        ["| figure | ratio | target | | what |", "|---|---|---|---|---|"]
        + [
            f"| `{k}` | {f['ratio']:.3g} | {f['target']} | {sign(f)} | {TARGETS[k][2]} |"
            for k, f in found["figures"].items()
        ]
    )


def test_every_figure_is_there_with_its_raw_numbers(tmp_path):
    "`make bench` on the random model, once."
    command = [
        *BENCH,
        "--out",
        str(tmp_path / "b.json"),
        "--recipe",
        "recipes/tiny.yaml",
        "--set",
        "model.dtype=float32",
        "--repeats",
        "1",
        "--tokens",
        "4",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    found = json.loads((tmp_path / "b.json").read_text())
    assert list(found["figures"]) == list(TARGETS) and (tmp_path / "b.png").stat().st_size > 10_000
    for key, f in found["figures"].items():
        assert f["ratio"] > 0 and f["met"] == meets_target(key, f["ratio"]) and key in done.stdout
    for key in ("judge_vs_forward_limit", "judge_grad_vs_full_logits", "dpo_vs_trl", "sample_vs_limit", "growth_time"):
        assert all(len(x) == 1 and x[0] > 0 for x in found["figures"][key]["seconds"].values())
    assert found["dtype"] == "float32" and found["machine"]["threads"] >= 1 and found["machine"]["versions"]["trl"]


def test_an_unknown_group_is_refused():
    done = subprocess.run([*BENCH, "--only", "magic"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and all(group in done.stderr.splitlines()[-1] for group in GROUPS)


def test_contestants_warm_up_and_take_turns():
    calls = []
    seconds = alternate({n: lambda n=n: calls.append(n) for n in "ab"}, 3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab" and {k: len(v) for k, v in seconds.items()} == {"a": 3, "b": 3}


@pytest.mark.parametrize(
    "key, reached, missed",
    [
        ("dpo_vs_trl", [1.3, 9], [1.29]),
        ("growth_memory", [1.1, 0.5], [1.11]),
        ("growth_time", [9, 10, 11], [8.9, 11.1]),
    ],
)
def test_targets_point_the_right_way(key, reached, missed):
    assert all(meets_target(key, r) for r in reached) and not any(meets_target(key, r) for r in missed)


def test_memory_of_a_child_is_its_own(work):
    ballast = torch.ones(400_000_000)  # 1.6 GB
    assert run_in_child(work, "dpo")["bytes"] < peak_bytes() - ballast.nbytes / 2


def test_what_a_child_says_last_is_in_the_error(work):
    with pytest.raises(RuntimeError, match="bench, magic: KeyError"):
        run_in_child(work, "magic")


@torch.no_grad()
def test_both_samplers_do_the_same(policy, tokenizer, work):
    prompts, spec = (
        [encode_prompt(tokenizer, t) for t in ("Hi", "A longer prompt", "Why?")],
        work.spec.model_copy(update={"temperature": 1e-4, "top_p": 1.0, "max_new_tokens": 9}),
    )
    ours = {key: ids for key, ids, _ in generate(policy, tokenizer, [(i, p, i) for i, p in enumerate(prompts)], spec)}
    assert end_ids(policy.generation_config, tokenizer) == {tokenizer.eos_token_id} and library_generate(
        policy, tokenizer, prompts, spec
    ) == [ours[i] for i in range(3)]


def test_floors_by_hand():
    from scir.model.weights import tiny_model

    model, tokenizer = tiny_model()  # head and embedding are one
    head, layers = 64 * len(tokenizer), 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64) + 64
    floors = floor_seconds(model, {"bandwidth": 10.0, "matmul": 2.0}, prompt_tokens=7, tokens=6, batch=3)
    assert floors == {"bandwidth": (head + layers) * 4 * 2 / 10, "matmul": layers * 13 + head * 6}


def test_both_contestants_of_the_gradient_have_the_same_one(work):
    grads = []
    for full in (False, True):
        made = []
        policy = Workload.policy
        with pytest.MonkeyPatch.context() as m:
            m.setattr(Workload, "policy", lambda self, base: made.append(policy(self, base)) or made[-1])
            judge_steps(work, full, work.pairs[:3])()
        grads.append([p.grad for p in made[0].parameters() if p.requires_grad])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    assert any(g.abs().max() > 1e-3 for g in grads[0])


def test_the_documented_table_is_that_of_the_kept_run():
    found = json.loads((ROOT / "docs/results/bench/bfloat16.json").read_text())
    assert list(found["figures"]) == list(TARGETS) and markdown_table(found) in (ROOT / "docs/speed.md").read_text()
    assert all(f["met"] == meets_target(k, f["ratio"]) for k, f in found["figures"].items())
