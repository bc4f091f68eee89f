import json, math, shutil

import pytest, torch
from safetensors.torch import load_file

from scir.method.rewards import View, text_pair
from scir.method.scores import score, set_reference
from scir.method.trainer import arguments, fit, save_adapter
from scir.model.logprobs import response_logps
from scir.model.weights import dense, for_sampling, for_scoring, for_training, load_adapter, load_base
from scir.recipe import RecipeError, parse_recipe
from scir.runner.checks import check_recipe
from scir.runner.state import read_fields
from scir.stages.files import STAGES
from scir.stages.optimise import assert_reference, own_loss, pair_loss, unchanged
from scir.stages.sft import sft_loss
from scir.stages.warm_start import warm_start_loss

from helpers import TEXTS, scir


def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def lines(folder):
    return [json.loads(l) for l in (folder / "metrics.jsonl").read_text().splitlines()]


def close(a, b, atol=1e-6):
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=atol, rtol=0) for k in a)


@pytest.fixture
def run(make_policy, tokenizer, pairs, recipe, tmp_path):
    "Train a fresh policy in `folder` and give the folder back."

    def go(
        name,
        steps=2,
        batch_size=8,
        scale=0.05,
        loss=None,
        lora=recipe.lora,
        rate=1e-2,
        reference=True,
        report_to=(),
        **kw,
    ):
        model, folder = make_policy(scale, lora=lora), tmp_path / name
        if reference:
            set_reference(model, pairs, 4096)
        folder.mkdir(exist_ok=True)
        fit(
            model,
            tokenizer,
            pairs,
            loss or (lambda view: pair_loss(view, recipe.train)),
            recipe.model_copy(update={"report_to": report_to}),
            folder,
            arguments(folder / "checkpoints", 0, steps=steps, batch_size=batch_size, learning_rate=rate, **kw),
        )
        return folder

    return go


def gradients(model, tokenizer, pairs, recipe):
    model.train()
    pair_loss(View(model, tokenizer, pairs, recipe), recipe.train)[0].backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


# gradient ----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["warm start", "optimise"])
def test_every_lora_B_moves_in_one_optimizer_step(run, make_policy, recipe, kind):
    warm, scale = kind == "warm start", 0.0 if kind == "warm start" else 0.05
    before = {
        n.replace(".default", ""): p.detach().clone() for n, p in make_policy(scale).named_parameters() if "lora_B" in n
    }
    after = adapter(
        run("x", steps=2, scale=scale, loss=(lambda view: warm_start_loss(view, recipe.warm_start)) if warm else None)
    )  # the first of two has rate 0
    assert len(before) == 14 and all((after[n] - b.cpu()).abs().max() > 1e-4 for n, b in before.items())


def test_a_run_of_one_step_trains(run, recipe):
    folder = run("x", steps=1, scale=0.0, loss=lambda view: warm_start_loss(view, recipe.warm_start))
    assert all(v.abs().max() > 0 for n, v in adapter(folder).items() if "lora_B" in n)


@pytest.mark.parametrize("how", [True, "sequences"])
def test_gradient_checkpointing_changes_no_gradient(make_policy, tokenizer, pairs, recipe, how):
    spec = recipe.model.model_copy(update={"gradient_checkpointing": how})
    plain, saving = make_policy(), for_training(make_policy(), spec)
    assert (
        saving.get_base_model().is_gradient_checkpointing == (how is True)
        and not plain.get_base_model().is_gradient_checkpointing
    )
    one, two = (
        gradients(plain, tokenizer, pairs, recipe),
        gradients(saving, tokenizer, pairs, recipe.model_copy(update={"model": spec})),
    )
    assert len(one) == 28 and all(g.abs().sum() > 0 for g in one.values()) and close(one, two)


@pytest.mark.parametrize("kind", ["sft", "warm start", "optimise"])
def test_saved_tensors_of_sequences_are_few(make_policy, tokenizer, pairs, recipe, kind):
    "Between forward and backward only what the loss itself needs is kept."
    kept = {}
    loss_of = {
        "optimise": lambda view: pair_loss(view, view.recipe.train),
        "warm start": lambda view: warm_start_loss(view, recipe.warm_start),
        "sft": sft_loss,
    }[kind]
    for how in (False, "sequences"):
        model, size = make_policy(), []
        one = recipe.model_copy(update={"model": recipe.model.model_copy(update={"gradient_checkpointing": how})})
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (size.append(t.numel()), t)[1], lambda t: t):
            loss, _ = loss_of(View(model, tokenizer, pairs, one))
        kept[how] = sum(size)
    assert kept["sequences"] < kept[False] / 10


def test_the_loss_of_sft_is_that_of_the_good_side_alone(make_policy, tokenizer, recipe):
    "And a batch counts answers, not tokens."
    model, made = (
        make_policy(),
        [text_pair(tokenizer, str(i), prompt, answer, other) for i, (prompt, answer, other) in enumerate(TEXTS)],
    )
    other = [text_pair(tokenizer, str(i), prompt, answer, "else") for i, (prompt, answer, _) in enumerate(TEXTS)]
    loss, named = sft_loss(View(model, tokenizer, made, recipe))
    by_hand = [-float(response_logps(model, [p.prompt_ids], [p.ids_a]).detach()) / len(p.ids_a) for p in made]
    loss = loss.detach()
    assert float(loss) == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-4) and float(
        named["loss_sft"]
    ) == pytest.approx(float(loss))
    assert float(sft_loss(View(model, tokenizer, other, recipe))[0].detach()) == pytest.approx(float(loss), abs=1e-5)


@pytest.mark.parametrize("loss", ["pair_loss", "warm_start_loss"])
def test_accumulation_is_one_big_batch(run, recipe, pairs, loss):
    if loss == "pair_loss":
        for p in pairs:
            p.target = math.nan
    f = (
        (lambda view: pair_loss(view, recipe.train))
        if loss == "pair_loss"
        else lambda view: warm_start_loss(view, recipe.warm_start)
    )
    big, small = run("big", loss=f, rate=1e-3), run("small", loss=f, rate=1e-3, batch_size=1, accumulation=8)
    assert not close(adapter(big), adapter(run("still", loss=f, rate=1e-9)), 1e-5) and close(
        adapter(big), adapter(small)
    )
    for a, b in zip(lines(big), lines(small)):
        for k in ("loss", "grad_norm"):
            assert a[k] == pytest.approx(b[k], rel=1e-3)


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"dtype": "bfloat16", "quantize": "nf4"}])
def test_adapter_is_float32_over_any_base(recipe, make_policy, options, tmp_path):
    model = make_policy(model=recipe.model.model_copy(update=options))
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(load_base(recipe.model.model_copy(update=options)), tmp_path / "adapter", trainable=True)
    for m in (model, again):
        assert {p.dtype for p in m.parameters() if p.requires_grad} == {torch.float32}
    assert sum(p.requires_grad for p in again.parameters()) == 28 and {v.dtype for v in adapter(tmp_path).values()} == {
        torch.float32
    }


def test_base_weights_do_not_move(make_policy, tokenizer, pairs, recipe):
    model = make_policy()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "lora_" in n
    }


# reference ----------------------------------------------------------------


@pytest.mark.parametrize("scale, silent", [(0.0, True), (0.05, False)])
def test_silent_implicit_reward_is_caught_at_step_0(make_policy, tokenizer, pairs, recipe, tmp_path, scale, silent):
    model = make_policy(scale).eval()
    set_reference(model, pairs, 4096)
    scores = score(model, tokenizer, pairs, recipe, tmp_path / "scores.jsonl")
    if not silent:
        return assert_reference(scores)
    with pytest.raises(ValueError, match="implicit margin is zero"):
        assert_reference(scores)


def test_reference_is_the_base_or_the_named_adapter(make_policy, recipe, pairs, tmp_path):
    logps = {}
    for name, scale in (("new", 0.05), ("old", 0.1)):
        save_adapter(make_policy(scale), tmp_path / name)
    for name, args in {
        "base": (),
        "new": (tmp_path / "new",),
        "old": (tmp_path / "old",),
        "new|base": (tmp_path / "new",),
        "new|old": (tmp_path / "new", tmp_path / "old"),
    }.items():
        model = for_scoring(recipe.model, *args) if "|" in name or name == "base" else for_sampling(recipe.model, *args)
        set_reference(model, pairs, 4096)
        logps[name] = torch.tensor([p.reference_logps for p in pairs])
    torch.testing.assert_close(logps["new|base"], logps["base"])
    torch.testing.assert_close(logps["new|old"], logps["old"], atol=1e-3, rtol=1e-5)
    assert (logps["old"] - logps["base"]).abs().min() > 1e-3 and (logps["old"] - logps["new"]).abs().min() > 1e-3


def test_policy_is_back_after_the_reference_was_read(make_policy, recipe, pairs, tokenizer, tmp_path):
    for name, scale in (("new", 0.05), ("old", 0.1)):
        save_adapter(make_policy(scale), tmp_path / name)
    model = for_scoring(recipe.model, tmp_path / "new", tmp_path / "old")
    with torch.no_grad():
        before = View(model, tokenizer, pairs, recipe).logps
        set_reference(model, pairs, 4096)
        torch.testing.assert_close(View(model, tokenizer, pairs, recipe).logps, before)


def test_merged_adapter_is_the_adapter(make_policy, recipe, pairs, tokenizer, tmp_path):
    save_adapter(make_policy(), tmp_path / "adapter")
    with torch.no_grad():
        merged, beside = (
            View(f(recipe.model, tmp_path / "adapter"), tokenizer, pairs, recipe).logps
            for f in (for_sampling, for_scoring)
        )
    torch.testing.assert_close(merged, beside, atol=1e-3, rtol=1e-5)


# resume -------------------------------------------------------------------


class Killed(Exception):
    pass


def dies_at(call, recipe):
    "A loss that ends the training at its n-th call, and the list of its calls."
    calls = []

    def loss(view):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return pair_loss(view, recipe.train)

    return loss, calls


def test_interrupted_and_run_again_is_uninterrupted(run, recipe):
    lora, (dying, calls) = recipe.lora.model_copy(update={"dropout": 0.2}), dies_at(6, recipe)
    options = dict(steps=7, batch_size=2, save_steps=3, lora=lora)  # an epoch is four steps
    whole = run("whole", **options)
    with pytest.raises(Killed):
        run("cut", loss=dying, **options)
    assert (whole.parent / "cut/checkpoints/checkpoint-3").is_dir() and not (whole.parent / "cut/adapter").exists()
    cut = run("cut", loss=dying, **options)
    assert len(calls) == 6 + 4  # steps 1 to 3 were not done again
    assert close(adapter(whole), adapter(cut)) and lines(whole) == lines(cut) and len(lines(whole)) == 7
    assert not (cut / "checkpoints").exists()


def test_checkpoint_that_a_kill_left_unfinished_is_not_used(run, recipe):
    dying, _ = dies_at(4, recipe)
    options = dict(steps=4, batch_size=4, save_steps=2)
    whole = run("whole", **options)
    with pytest.raises(Killed):
        run("cut", loss=dying, **options)
    good = whole.parent / "cut/checkpoints/checkpoint-2"
    shutil.copytree(
        good, good.with_name("checkpoint-3"), ignore=shutil.ignore_patterns("*.pt", "*.pth", "*.json")
    )  # the adapter is written first
    assert close(adapter(whole), adapter(run("cut", loss=dying, **options)))


# numbers ------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_loss_names_step_and_rows(run, value):
    calls = []

    def loss(view):
        calls.append([p.id for p in view.pairs])
        return view.logps.sum() * (value if len(calls) == 3 else 1), {}

    with pytest.raises(FloatingPointError) as e:
        run("x", steps=4, batch_size=2, loss=loss)
    assert "step 3" in str(e.value) and str(calls[2]) in str(e.value) and "\n" not in str(e.value)


def test_a_gradient_that_is_not_finite_names_step_and_rows(run):
    calls = []

    def loss(view):
        calls.append([p.id for p in view.pairs])
        x = view.logps.sum()
        return (x + (x - x.detach()).abs().sqrt() if len(calls) == 3 else x), {}  # the loss is finite, its slope is not

    with pytest.raises(FloatingPointError) as e:
        run("x", steps=4, batch_size=2, loss=loss)
    assert "gradient is nan at step 3" in str(e.value) and str(calls[2]) in str(e.value) and "\n" not in str(e.value)


def test_the_margin_is_averaged_over_retained_pairs(run):
    values = iter([(1.0, 1.0), (5.0, 0.25), (2.0, 0.0), (7.0, 0.0)])

    def loss(view):
        margin, retained = next(values)
        return view.logps.sum(), {"margin": margin, "retained": retained}

    found = lines(run("x", steps=2, batch_size=2, accumulation=2, loss=loss))
    assert [l["margin"] for l in found] == [pytest.approx((1 + 5 * 0.25) / 1.25), 0.0] and found[0]["retained"] == 0.625


def test_metrics_are_averaged_over_accumulated_batches(run):
    values = iter([1.0, 3.0, 5.0, 9.0])
    folder = run(
        "x", steps=2, batch_size=2, accumulation=2, loss=lambda view: (view.logps.sum(), {"value": next(values)})
    )
    assert [l["value"] for l in lines(folder)] == [2.0, 7.0]


@torch.no_grad()
def test_dense_nf4_is_nf4(recipe):
    spec = recipe.model.model_copy(update={"quantize": "nf4"})
    packed, plain, full = (
        load_base(spec).train(),
        dense(spec),
        load_base(recipe.model),
    )  # in eval mode bitsandbytes rounds to bfloat16 on a CPU with AVX512-BF16
    ids = torch.arange(40, device=packed.device)[None]
    a, b, c = (m(input_ids=ids).logits.float() for m in (packed, plain, full))
    assert "Linear4bit" in str(packed) and "4bit" not in str(plain)
    torch.testing.assert_close(a, b, atol=1e-3, rtol=0)
    assert (a - c).abs().max() > 1e-2  # it was quantised at all


# oracle -------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_loss_and_gradient_are_those_of_trl(make_policy, tokenizer, pairs, recipe, tmp_path):
    "Penalty off and label fixed, on both sides of the pair; the reference is the base."
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    model, sides = (
        make_policy(0.0),
        [("response_a", "response_b") if p.target else ("response_b", "response_a") for p in pairs],
    )
    rows = [
        {"prompt": tokenizer.decode(p.prompt_ids), "chosen": getattr(p, c), "rejected": getattr(p, r)}
        for p, (c, r) in zip(pairs, sides)
    ]
    args = DPOConfig(
        output_dir=str(tmp_path),
        beta=0.1,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        report_to="none",
        max_length=None,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    theirs = DPOTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    with torch.no_grad():
        for i, (n, p) in enumerate(model.named_parameters()):
            if "lora_B.default" in n:
                p.copy_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    data = list(theirs.train_dataset)
    for p, row, (c, _) in zip(pairs, data, sides):
        assert row["prompt_ids"] == p.prompt_ids and row["chosen_ids"] == (p.ids_a if c == "response_a" else p.ids_b)
    loss = theirs.compute_loss(theirs.model, {k: v.to(model.device) for k, v in theirs.data_collator(data).items()})
    loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    set_reference(model, pairs, 4096)
    spec = recipe.train.model_copy(
        update={
            "label": "generative",
            "lambda_consistency": 0.0,
            "lambda_confidence": 0.0,
            "lambda_sft": 0.0,
            "implicit_length": "sum",
            "beta": 0.1,
        }
    )
    ours, _ = pair_loss(View(model, tokenizer, pairs, recipe.model_copy(update={"train": spec})), spec)
    ours.backward()
    assert ours.item() == pytest.approx(loss.item(), abs=1e-5) and abs(ours.item() - math.log(2)) > 1e-3
    assert len(expected) == 28 and close(
        expected, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, 1e-5
    )


def test_adapters_of_two_processes_are_the_same_bytes(make_policy, tmp_path):
    "peft keeps the names of the layers in a set, whose order changes from process to process."
    save_adapter(make_policy(), tmp_path / "a")
    names = json.loads((tmp_path / "a/adapter_config.json").read_text())["target_modules"]
    assert len(names) == 7 and names == sorted(names)


def test_log_lines_have_their_fields_in_order(run):
    assert all(list(l) == sorted(l) for l in lines(run("x")))


# trackers -----------------------------------------------------------------


def events(folder):
    "Scalars by step, as TensorBoard shows them."
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read, out = EventAccumulator(str(folder / "tracking")).Reload(), {}
    for tag in read.Tags()["scalars"]:
        for e in read.Scalars(tag):
            out.setdefault(e.step, []).append((tag.removeprefix("train/"), e.value))
    return out


def are_our_lines(folder):
    found, ours = events(folder), lines(folder)
    assert sorted(found) == [l["step"] for l in ours] == list(range(1, len(ours) + 1))
    for line in ours:
        expected = {
            k: v for k, v in line.items() if k not in ("step", "epoch")
        }  # the epoch is said once more at the end
        seen = [(k, v) for k, v in found[line["step"]] if k in expected]
        assert len(seen) == len(dict(seen)) and dict(seen) == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert {
        "loss_dpo",
        "loss_consistency",
        "loss_confidence",
        "retained",
        "margin",
        "inconsistency",
        "abs_margin_generative",
        "abs_margin_implicit",
    } < expected.keys()


def test_a_tracker_sees_our_lines_and_changes_no_byte(run, recipe):
    options = dict(steps=4, batch_size=2, lora=recipe.lora.model_copy(update={"dropout": 0.2}))
    plain, tracked = run("plain", **options), run("tracked", report_to=("tensorboard",), **options)
    are_our_lines(tracked)
    assert (
        sorted(p.name for p in tracked.iterdir()) == ["adapter", "metrics.jsonl", "tracking"]
        and not (plain / "tracking").exists()
    )
    for f in ("metrics.jsonl", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (plain / f).read_bytes() == (tracked / f).read_bytes()


def test_a_tracker_sees_every_step_once_after_a_kill_and_nothing_of_an_earlier_run(run, recipe):
    dying, _ = dies_at(6, recipe)
    options = dict(steps=7, batch_size=2, save_steps=3, report_to=("tensorboard",))
    with pytest.raises(Killed):
        run("x", loss=dying, **options)
    assert sorted(events((folder := run("x", loss=dying, **options)))) == list(range(1, 8))
    are_our_lines(folder)
    are_our_lines(run("x", **options | {"steps": 2}))


def test_a_model_that_stays_has_no_tracked_steps(run):
    folder = run("x", report_to=("tensorboard",))
    shutil.copytree(folder, folder.with_name("y"))
    unchanged("scir", folder, folder.with_name("y"))
    assert not (folder.with_name("y") / "tracking").exists() and (folder / "tracking").exists()


@pytest.mark.parametrize(
    "name, says",
    [
        ("tensorbord", "a tracker that transformers supports: .*tensorboard"),
        ("azure_ml", "pip install azureml-core$"),
        ("wandb", "pip install wandb$"),
    ],
)
def test_a_tracker_that_is_not_there_is_said_before_anything_is_done(run, monkeypatch, name, says):
    monkeypatch.setattr(
        "scir.method.trainer.integrations.get_available_reporting_integrations", lambda: ["tensorboard"]
    )
    for go in (
        lambda: check_recipe(parse_recipe({"report_to": name})),
        lambda: run("x", report_to=(name,), loss=lambda view: pytest.fail("it trained")),
    ):
        with pytest.raises(RecipeError, match=says) as e:
            go()
        assert "\n" not in str(e.value)


def test_a_misspelt_tracker_is_one_line():
    done = scir("run", "recipes/tiny.yaml", "--set", "report_to=tensorbord")
    assert (
        done.returncode == 1
        and done.stderr.startswith("scir: report_to: tensorbord")
        and len(done.stderr.splitlines()) == 1
    )


def test_no_stage_depends_on_trackers(recipe):
    tracked = parse_recipe(recipe.model_dump() | {"report_to": "tensorboard"})
    assert tracked.report_to == ("tensorboard",) and tracked != recipe
    for s in STAGES.values():
        assert read_fields(tracked, s.fields) == read_fields(recipe, s.fields)


# replay ------------------------------------------------------------------


def test_replayed_pairs_continue_the_warm_start(policy, tokenizer, pairs, recipe):
    "Five own pairs and three seed pairs: the mean over all eight of SCIR's loss and the warm start's."
    set_reference(policy, pairs, 4096)
    spec = recipe.train.model_copy(update={"replay": 0.4, "lambda_sft": 0.5})
    for p in pairs[5:]:
        p.extra = p.extra | {"label": "a"}
    view = lambda rows: View(policy, tokenizer, rows, recipe)
    mixed, metrics = pair_loss(view(pairs), spec)
    own, alone = own_loss(view(pairs[:5]), spec)
    seeds, _ = warm_start_loss(view(pairs[5:]), recipe.warm_start)
    torch.testing.assert_close(mixed, (5 * own + 3 * seeds) / 8)
    assert metrics["replayed"] == 3 / 8 and float(metrics["retained"]) == pytest.approx(
        5 / 8 * float(alone["retained"]) + 3 / 8
    )
    assert metrics["inconsistency"] == alone["inconsistency"]
    only, told = pair_loss(view(pairs[5:]), spec)
    torch.testing.assert_close(only, seeds)
    assert told["retained"] == told["replayed"] == 1
