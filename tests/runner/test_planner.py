"""What the planner says against what really happens: tensors, a process's memory, rows of a run."""

import json, os, subprocess, sys
from pathlib import Path

import pytest, torch
from torch.profiler import ProfilerActivity, profile

from scir.method.rewards import View, margins
from scir.model.decoding import generate
from scir.model.weights import for_sampling, for_training, load_base, new_adapter, tiny_tokenizer
from scir.recipe import SamplingSpec, load_recipe
from scir.runner import checks, planner
from scir.runner.planner import (
    ASSUMED,
    MEASURED,
    Task,
    answer_tokens,
    emulate_device,
    assumed_sizes,
    config_of,
    counted_sizes,
    hours,
    judged_pairs,
    largest_batch,
    sampled_lengths,
    letter_pairs,
    with_letter_rows,
    extrapolate,
    longest_answers,
    longest_rows,
    pair_tokens,
    pairs_per_prompt,
    peak,
    probe,
    sampled_rows,
    seconds_of,
    shallow,
    skeleton,
    planned_tasks,
)
from scir.stages.optimise import pair_loss, train
from scir.stages.sft import sft_loss
from scir.stages.warm_start import warm_start_loss
from scir.store import read_json, write_rows

from helpers import ROOT, response


LONG = ("sampling.max_new_tokens=120", "sampling.batch_size=32", "train.batch_size=8", "judge.batch_tokens=8192")


class NeverEnds:
    "A tokenizer whose answers go on to the limit."

    eos_token_id, chat_template = -1, None


pytestmark = pytest.mark.usefixtures("at_root")


def the_work(stage, recipe, sizes):
    "A stage's largest piece of work with a real model: () -> None."
    known, sampled, prompts = longest_rows(recipe, sizes)
    tokenizer, letters = tiny_tokenizer(), with_letter_rows(recipe, sizes)
    if stage == "judge":
        model, pairs = (
            new_adapter(load_base(recipe.model), recipe.lora).eval(),
            letter_pairs(largest_batch(recipe, sampled + known)),
        )
        return torch.no_grad()(lambda: margins(View(model, tokenizer, pairs, letters)))
    if stage == "sample":
        model, rows = for_sampling(recipe.model), sampled_rows(recipe, prompts)
        if model.dtype == torch.bfloat16:
            model = new_adapter(model, recipe.lora).eval()  # in float32 it is folded in
        model.generation_config.eos_token_id = None  # all answers as long as they may be
        return lambda: list(generate(model, NeverEnds(), [(i, ids, i) for i, ids in enumerate(rows)], recipe.sampling))
    model = for_training(new_adapter(load_base(recipe.model), recipe.lora), recipe.model).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    rows, section, loss = {
        "sft": (longest_answers(recipe, sizes), recipe.sft, sft_loss),
        "warm_start": (known, recipe.warm_start, lambda view: warm_start_loss(view, recipe.warm_start)),
        "optimise": (
            sorted(sampled, key=sum, reverse=True),
            recipe.train,
            lambda view: pair_loss(view, recipe.arm("scir")),
        ),
    }[stage]
    pairs = letter_pairs(rows[: section.batch_size])

    def step():
        view = View(model, tokenizer, pairs, letters)
        loss(view)[0].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def allocated(run, first=True):
    "Most bytes of tensors that a call has beside what was there, as PyTorch's own allocator reports them; of its second time, or its first."
    if first:
        run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    now = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            most = max(most, now := now + event.nbytes())
    return most


# memory ---------------------------------------------------------------------


@pytest.mark.parametrize("stage", MEASURED)
@pytest.mark.parametrize(
    "settings",
    [
        ("model.dtype=float32",),
        ("model.dtype=bfloat16", "model.gradient_checkpointing=true"),
        ("model.dtype=float32", "model.gradient_checkpointing=sequences", "lora.last_layers=1"),
    ],
)
def test_tensors_of_a_stage_are_those_that_the_allocator_hands_out(monkeypatch, stage, settings):
    monkeypatch.setattr(planner, "GAPS", {"cpu": 0.05})
    recipe = load_recipe("recipes/tiny.yaml", LONG + settings)
    sizes = counted_sizes(recipe)
    weights = sum(p.nbytes for p in skeleton(recipe, "cpu").parameters())
    real = allocated(the_work(stage, recipe, sizes))
    assert abs(peak(stage, recipe, sizes, "cpu") - weights - real) < 0.15 * real


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_of_several_batches_keeps_their_gradients_and_a_copy(monkeypatch, tmp_path, accumulation):
    "Against the trainer itself, with an adapter that is large beside the activations."
    monkeypatch.setattr(planner, "GAPS", {"cpu": 0})
    recipe = load_recipe(
        "recipes/tiny.yaml",
        ("lora.r=512", "train.batch_size=1", f"train.accumulation={accumulation}", "model.gradient_checkpointing=true"),
    )
    sizes = counted_sizes(recipe)
    pairs = letter_pairs(longest_rows(recipe, sizes)[1][:1] * 2 * accumulation)
    model = for_training(new_adapter(load_base(recipe.model), recipe.lora), recipe.model)
    weights = sum(p.nbytes for p in model.parameters())
    real = allocated(
        lambda: train(model, tiny_tokenizer(), pairs, with_letter_rows(recipe, sizes), tmp_path, 0), first=False
    )
    assert abs(peak("optimise", recipe, sizes, "cpu") - weights - real) < 0.1 * real


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    "Peak memory of processes that do the stages' work with a model of 38 million parameters: stage -> (measured, planned, before)."
    found = {}
    for _ in range(3):  # the same work takes a tenth more or less from process to process
        done = subprocess.run(
            [sys.executable, str(Path(__file__)), str(tmp_path_factory.mktemp("model"))],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found = {
            stage: max(now, found.get(stage, now)) for stage, now in json.loads(done.stdout.splitlines()[-1]).items()
        }
        if all(within(*f) for f in found.values()):
            break
    return found


def within(measured, planned, start):
    return measured > 1.3 * start and abs(planned - measured) < 0.15 * measured


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of a process are read from Linux")
@pytest.mark.parametrize("stage", MEASURED)
def test_a_process_takes_what_was_planned_within_15_percent(processes, stage):
    measured, planned, start = processes[stage]
    print(
        f"{stage}: measured {measured / 1e6:.0f} MB, planned {planned / 1e6:.0f} MB, before the work {start / 1e6:.0f} MB"
    )
    assert within(measured, planned, start)


def measure(folder):
    "In a process of its own: every stage in a fork, whose peak begins anew."
    import psutil
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20_000,
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=4096,
        )
    ).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    recipe = load_recipe(
        "recipes/tiny.yaml",
        (
            f"model.name={folder}",
            "sampling.max_new_tokens=100",
            "sampling.candidates=4",
            "sampling.batch_size=48",
            "train.batch_size=4",
            "judge.batch_tokens=8192",
        ),
    )
    sizes, found = counted_sizes(recipe), {}
    for stage in MEASURED:
        planned = peak(stage, recipe, sizes, "cpu")
        start, (read, write) = psutil.Process().memory_info().rss, os.pipe()
        if not os.fork():
            Path("/proc/self/clear_refs").write_text("5")
            run = the_work(stage, recipe, sizes)
            for _ in range({"sample": 1, "judge": 6}.get(stage, 2)):
                run()  # small batches fill the heap by and by
            os.write(write, next(l.split()[1] for l in open("/proc/self/status") if l.startswith("VmHWM")).encode())
            os._exit(0)
        os.wait()
        os.close(write)  # or a child that failed would be waited for
        found[stage] = 1024 * int(os.read(read, 99)), start + planned, start
    print(json.dumps(found))


def test_nothing_is_left_behind_by_planning():
    "Patches are taken back, random numbers go on, and what is planned twice comes out the same."
    recipe, before = load_recipe("recipes/tiny.yaml"), torch.nn.functional.scaled_dot_product_attention
    sizes, state = counted_sizes(recipe), torch.random.get_rng_state()
    assert peak("optimise", recipe, sizes, "cpu") == peak("optimise", recipe, sizes, "cpu")
    assert torch.nn.functional.scaled_dot_product_attention is before and torch.equal(
        torch.random.get_rng_state(), state
    )


def test_what_takes_more_is_planned_as_more():
    recipe = load_recipe("recipes/tiny.yaml", LONG)
    sizes, of = (
        counted_sizes(recipe),
        lambda stage, *settings, kind="cpu": peak(
            stage, load_recipe("recipes/tiny.yaml", LONG + settings), counted_sizes(recipe), kind
        ),
    )
    assert of("optimise", "train.batch_size=2") < of("optimise", "model.gradient_checkpointing=true") < of("optimise")
    assert of("sample", "sampling.batch_size=4") < of("sample") and of("judge", "judge.batch_tokens=1024") < of("judge")
    assert of("optimise", kind="cuda") != of("optimise")
    assert len(sampled_rows(load_recipe("recipes/tiny.yaml", ("sampling.batch_size=5",)), [9] * 4)) == 5
    cache = lambda tokens: planner.sampling_peak(
        load_recipe("recipes/tiny.yaml", (f"sampling.max_new_tokens={tokens}", "sampling.batch_size=512")),
        "cpu",
        [9] * 512,
    )
    a_token = 512 * 2 * 2 * 2 * 16 * 4  # rows, layers, keys and values, heads, size, bytes
    assert cache(1000) - cache(500) > 480 * a_token
    adapter = sum(p.nbytes for p in skeleton(recipe, "cpu").parameters() if p.requires_grad)
    assert of("judge") == of("judge", "train.reference=previous") == of("judge", "train.reference=initial") + adapter


@pytest.mark.parametrize("kind, name", [("cpu", "grouped"), ("cuda", "sdpa")])
def test_attention_is_that_of_the_device(kind, name):
    model = skeleton(load_recipe("recipes/tiny.yaml"), kind)
    with emulate_device(kind, model):
        assert model.get_base_model().config._attn_implementation == name


def test_four_bits_are_counted_as_they_are_stored():
    recipe = load_recipe("recipes/mistral-7b.yaml")
    sizes = assumed_sizes(recipe)
    plain = recipe.model_copy(update={"model": recipe.model.model_copy(update={"quantize": None})})
    linear = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    saved = peak("judge", plain, sizes, "cuda") - peak("judge", recipe, sizes, "cuda")
    assert saved == round(linear * (2 - 0.5 - 1 / 64 - 4 / (64 * 256)) - 4096 * 14336 * 2)


# rows and hours -------------------------------------------------------------


def test_letters_have_the_lengths_that_are_asked_for():
    pairs = letter_pairs([(60, 20, 30), (90, 1, 2)])
    assert [(len(p.prompt_ids), len(p.ids_a), len(p.ids_b)) for p in pairs] == [(60, 20, 30), (90, 2, 2)]
    from scir.method.judge import judge_ids

    recipe = load_recipe("recipes/smol.yaml")
    letters = with_letter_rows(recipe, assumed_sizes(recipe)._replace(frame=100))
    assert len(judge_ids(tiny_tokenizer(), letters.judge, "", "", "")) == 100


def test_a_pair_is_two_sequences_and_two_questions():
    assert pair_tokens((10, 3, 5), 7, False) == 28 and pair_tokens((10, 3, 5), 7, True) == 28 + 2 * (7 + 18)


def test_all_pairs_of_the_longest_prompts_are_met():
    "Four answers are six pairs; where nothing was counted, all as long as the recipe lets them be."
    recipe = load_recipe("recipes/tiny.yaml", ["sampling.candidates=4"])
    sizes, d = assumed_sizes(recipe)._replace(prompts=[3, 9, 5], held=[7], counted=True), recipe.data
    answer = recipe.sampling.max_new_tokens
    assert longest_rows(recipe, sizes)[1:] == (
        [(p, answer, answer) for p in (9, 7, 5, 3) for _ in range(6)],
        [9, 7, 5, 3],
    )
    assert longest_rows(recipe, sizes._replace(counted=False))[2] == [d.max_prompt_tokens] * 3 + [7]


def test_the_probes_lengths_are_those_of_the_run():
    sizes = assumed_sizes(load_recipe("recipes/tiny.yaml"))._replace(prompts=[9, 30])
    met = lambda answer, limit: sampled_lengths(SamplingSpec(max_new_tokens=limit), sizes._replace(answer=answer), 2000)
    prompts, first, second = zip(*met(20, 100))
    assert (
        set(prompts) == {9, 30} and 4 <= min(first) < 5 and 37 < max(second) <= 39 and abs(sum(first) / 2000 - 20) < 1
    )
    assert {a for _, *both in met(50, 50) for a in both} == {50}


def test_judged_pairs_share_a_prompt_and_its_answers():
    recipe = load_recipe("recipes/tiny.yaml", ("sampling.candidates=4", "sampling.max_new_tokens=20"))
    pairs = judged_pairs(recipe, assumed_sizes(recipe)._replace(prompts=[60], answer=20), 8)
    assert (
        len({p.prompt for p in pairs[:6]}) == 1
        and len({r for p in pairs[:6] for r in (p.response_a, p.response_b)}) == 4
        and len({p.prompt for p in pairs}) == 2
    )
    assert {(len(p.prompt_ids), len(p.ids_a), len(p.ids_b)) for p in pairs} == {(60, 20, 20)} and len(pairs) == 8
    each = lambda *settings: pairs_per_prompt(load_recipe("recipes/tiny.yaml", settings).sampling)
    assert (
        each() == 1
        and each("sampling.candidates=4", "sampling.pairs_per_prompt=2") == 2
        and each("sampling.pairs_per_prompt=5") == 1
    )


def test_the_work_is_that_of_the_run(tiny_run):
    "Rows as the run's files have them."
    recipe = load_recipe(tiny_run / "recipe.yaml")
    rows = {(w.stage, w.kind): w for w in planned_tasks(recipe, counted_sizes(recipe))}
    steps = read_json(tiny_run / "manifest.json")["steps"]
    total = lambda stage, field: sum(s["summary"][field] for k, s in steps.items() if k.split(":")[0] == stage)
    assert rows["sample", "decoded"].rows == total("sample", "responses") and rows["evaluate", "decoded"].rows == total(
        "evaluate", "responses"
    )
    assert rows["warm_start", "trained"].rows == total("warm_start", "pairs") and rows[
        "sft", "trained"
    ].rows == pytest.approx(total("sft", "answers") * recipe.sft.epochs)
    assert all(1e8 < s["peak_bytes"] < 5e9 for s in steps.values() if "summary" in s)
    assert (
        total("judge", "pairs") <= rows["judge", "read"].rows / 2 <= 1.2 * total("judge", "pairs")
    )  # equal responses fall out


def test_evaluation_reads_every_set_and_the_reference_once():
    "M_0, M_1 and two rounds of two arms judge what was labelled and the panel, in both orders; the reference is read at M_0 and M_1. All but M_1 judge their own answers too."
    recipe = load_recipe("recipes/tiny.yaml")
    sizes = assumed_sizes(recipe)
    pair, n = lambda lengths, judged: pair_tokens(lengths, sizes.frame, judged), len(sizes.held) + len(sizes.labelled)
    own = (sizes.prompts[0], sizes.answer, sizes.answer)
    found = next(w for w in planned_tasks(recipe, sizes) if (w.stage, w.kind) == ("evaluate", "read"))
    prefill = 6 * len(sizes.held)
    assert found.rows == prefill + (6 + 2) * n + 2 * 5 * len(sizes.held)
    previous = next(
        w
        for w in planned_tasks(load_recipe("recipes/tiny.yaml", ("train.reference=previous",)), sizes)
        if (w.stage, w.kind) == ("evaluate", "read")
    )
    assert previous.rows == prefill + (6 + 6) * n + 2 * 5 * len(sizes.held)  # every trained model reads its predecessor
    per = lambda lengths, count: count * (6 * pair(lengths, True) + 2 * pair(lengths, False))
    theirs = 5 * len(sizes.held) * (pair(own, True) + pair(own, False))
    assert found.tokens == pytest.approx(
        prefill * own[0] + per(own, len(sizes.held)) + per(sizes.labelled[0], len(sizes.labelled)) + theirs
    )


def test_the_warm_start_answers_its_prompts_and_learns_from_the_pairs():
    "Three answers to each of five seed prompts are three pairs, two of which are kept; their prompts and the longest answers are met in memory too."
    recipe = load_recipe(
        "recipes/tiny.yaml",
        (
            "data.grader=given_words",
            "data.seed_prompts=5",
            "sampling.candidates=3",
            "warm_start.pairs_per_prompt=2",
            "warm_start.epochs=2",
        ),
    )
    sizes = counted_sizes(recipe)
    rows = {w.kind: w.rows for w in planned_tasks(recipe, sizes) if w.stage == "warm_start"}
    assert (
        rows == {"decoded": 15, "trained": 2 * (16 + 10), "read": 5 + 16 + 10}
        and len(sizes.seeds) == 16
        and len(sizes.seed_prompts) == 5
    )
    assert (
        longest_rows(recipe, sizes._replace(seed_prompts=[999]))[0][0] == (999, 12, 12)
        and longest_rows(recipe, sizes._replace(seed_prompts=[999]))[2][0] == 999
    )
    assert len(longest_rows(recipe, sizes)[0]) == 26 and len(assumed_sizes(recipe).seed_prompts) == 5


def test_replayed_pairs_have_their_reference_read():
    def read(*settings):
        recipe = load_recipe("recipes/tiny.yaml", ("arms=[srlm]", "iterations=1", *settings))
        return {w.kind: w.rows for w in planned_tasks(recipe, counted_sizes(recipe)) if w.stage == "optimise"}

    assert read() == {"trained": 8} and read("train.replay=0.2") == {"trained": 10, "read": 2}


def test_votes_are_read_and_decoded_in_the_rounds_that_need_them():
    def label(*settings):
        recipe = load_recipe("recipes/tiny-arms.yaml", ("arms=[srlm-pointwise, cream]", "iterations=2", *settings))
        return {w.kind: w for w in planned_tasks(recipe, assumed_sizes(recipe)) if w.stage == "label"}

    both, once = label(), label("stop_after={srlm-pointwise: 1}")
    assert both["decoded"].rows == 2 * once["decoded"].rows == 2 * 8 * 3 and once["read"].rows == 8 * 3
    assert not label("arms=[cream]")


def test_answers_are_as_long_as_those_that_are_there(tmp_path, monkeypatch):
    monkeypatch.setattr("scir.recipe.root", lambda: tmp_path)
    recipe = load_recipe("recipes/tiny.yaml")
    assert answer_tokens(recipe) == ASSUMED["answer"] * 12
    row = lambda n: response(candidate=n, ids=[1] * n)
    (tmp_path / "data/runs/tiny/seed0/scir/m2").mkdir(parents=True)
    write_rows(tmp_path / "data/runs/tiny/seed0/scir/m2/responses.jsonl", [row(3), row(4)])
    assert answer_tokens(recipe) == 3.5


def test_arms_do_the_work_that_they_do():
    "SCIR trains on all pairs and asks the judge, self-rewarding training on one pair of a prompt; replay adds seed pairs."

    def trained(arm, *settings):
        recipe = load_recipe("recipes/tiny.yaml", (f"arms=[{arm}]", "iterations=1", "sampling.candidates=4", *settings))
        return next(
            w for w in planned_tasks(recipe, counted_sizes(recipe)) if (w.stage, w.kind) == ("optimise", "trained")
        )

    assert (
        trained("scir").rows == 6 * trained("srlm").rows == 48 and trained("scir").tokens > 6 * trained("srlm").tokens
    )
    assert trained("scir", "train.replay=0.2").rows == 60 and trained("scir", "train.epochs=2").rows == 96


def test_a_line_through_two_depths():
    assert (
        extrapolate([1.0, 1.5], 30) == 1.5 + 0.25 * 26
        and extrapolate([2.0, 1.9], 30) == 1.9
        and extrapolate([3.0], 2) == 3.0
    )
    assert hours([Task("judge", "read", 1, 7200), Task("judge", "decoded", 1, 3600)], {"read": 1, "decoded": 0.5}) == {
        "judge": 2.5
    }


def test_batches_grow_while_time_is_left(monkeypatch):
    monkeypatch.setattr(planner, "timed", lambda run, n: 0.1 * n)
    assert (
        seconds_of(None, 64, 100)[1] == 64
        and seconds_of(None, 24, 100)[1] == 24
        and seconds_of(None, 64, 1.7)[1] == 4
        and seconds_of(None, 1, 100) == (0.1, 1)
    )


def test_a_probe_of_a_deeper_model(tmp_path):
    "Two shallow models stand for one of six layers; all three kinds are timed and the recipe's own name is left alone."
    recipe = load_recipe("recipes/tiny.yaml", ("lora.last_layers=3", "sampling.max_new_tokens=4"))
    config = config_of(recipe.model)
    config.num_hidden_layers, config.layer_types = 6, None
    config.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    deep = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": str(tmp_path)})})
    few = shallow(deep, 2, tmp_path / "few")
    assert config_of(few.model).num_hidden_layers == 2 and few.lora.last_layers == 1
    rates = probe(deep, counted_sizes(recipe), 1)
    assert set(rates) == {"trained", "read", "decoded"} and all(r > 0 for r in rates.values())


# in the doctor --------------------------------------------------------------


def findings(monkeypatch, *settings, **kw):
    monkeypatch.setattr(planner, "probe", lambda *a: {"trained": 1e-3, "read": 1e-4, "decoded": 1e-2})
    return {f.what: f for f in checks.memory_and_hours(load_recipe("recipes/tiny.yaml", settings), **kw)}


def test_the_doctor_says_memory_and_hours(monkeypatch):
    found = findings(monkeypatch)
    assert {*MEASURED, "lengths", "hours"} == set(found) and all(f.state == "ok" for f in found.values())
    assert "100" in found["hours"].finding and "counted" in found["lengths"].finding
    assert "not estimated" in findings(monkeypatch, probed=False)["hours"].finding


def test_what_does_not_fit_is_a_fault_with_settings_that_fit(monkeypatch):
    monkeypatch.setattr(checks, "CONTEXT", 0)
    need = peak("sample", load_recipe("recipes/tiny.yaml"), counted_sizes(load_recipe("recipes/tiny.yaml")), "cuda")
    found = findings(monkeypatch, gpu=0.8 * need / 1e9)["sample"]
    assert found.state == "fault"
    settings = tuple(s for s in found.fix.replace("add ", "").split() if s != "--set")
    assert findings(monkeypatch, *settings, gpu=0.8 * need / 1e9)["sample"].state == "ok"
    assert "not estimated" in findings(monkeypatch, gpu=24)["hours"].finding


def test_smaller_batches_leave_the_optimizer_step_as_it_was():
    recipe = load_recipe("recipes/mistral-7b.yaml")
    assert (
        checks.smaller_settings("optimise", recipe, lambda r: r.train.batch_size == 1)
        == "add --set train.batch_size=1 --set train.accumulation=16"
    )
    assert checks.smaller_settings(
        "optimise", recipe, lambda r: r.train.batch_size == 1 and r.model.gradient_checkpointing == "sequences"
    ).endswith("sequences --set train.batch_size=1 --set train.accumulation=16")


def test_a_model_that_is_nowhere_is_no_plan(monkeypatch):
    found = findings(monkeypatch, "model.name=somebody/some-model")
    assert (
        set(found) == {"plan"}
        and found["plan"].state == "warn"
        and "hf download somebody/some-model" in found["plan"].fix
    )


@pytest.mark.parametrize("name", ["mistral-7b", "smol", "smol-full", "tiny", "tiny-arms"])
def test_every_recipe_has_a_plan(monkeypatch, name):
    monkeypatch.setattr(planner, "probe", lambda *a: {"trained": 1e-3, "read": 1e-4, "decoded": 1e-2})
    if name.startswith(("smol", "mistral")):
        monkeypatch.setattr(planner, "peak", lambda *a: 1)  # taken for real by the tests above
    monkeypatch.setattr("scir.runner.planner.counted_sizes", assumed_sizes)
    found = checks.memory_and_hours(load_recipe(f"recipes/{name}.yaml"))
    assert {*MEASURED, "lengths", "hours"} == {f.what for f in found}


if __name__ == "__main__":
    measure(sys.argv[1])
