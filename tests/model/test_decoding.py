from collections import Counter
from functools import partial

import pytest, torch
from scipy.stats import chisquare
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from scir.method.scores import candidate_pairs, score, set_reference
from scir.model.decoding import Pool, draw, end_ids, generate
from scir.model.logprobs import encode_prompt
from scir.stages.sample import distinct, sample, summarise
from scir.store import Response, read_rows, row_seed

from helpers import PROMPTS, drawn


def ending(policy, tokenizer, monkeypatch):
    "Let a fifth of the ids end a response, so that some do."
    monkeypatch.setattr(policy.generation_config, "eos_token_id", list(range(0, 250, 5)) + [tokenizer.eos_token_id])


def test_response_does_not_depend_on_its_batch(policy, tokenizer, recipe, tmp_path):
    whole = {r.id: r for r in drawn(policy, tokenizer, recipe, tmp_path, batch_size=15)}
    single = drawn(policy, tokenizer, recipe, tmp_path, batch_size=1)
    some = drawn(policy, tokenizer, recipe, tmp_path, PROMPTS[:0:-2], batch_size=4)
    assert len(single) == 15 and len(some) == 6 and all(r == whole[r.id] for r in single + some)


def test_rows_have_their_own_seeds(policy, tokenizer, recipe, tmp_path):
    rows, other = drawn(policy, tokenizer, recipe, tmp_path), drawn(policy, tokenizer, recipe, tmp_path, seed=1)
    assert len({r.seed for r in rows + other}) == 30 and len({tuple(r.response_ids) for r in rows + other}) == 30
    assert [r.id for r in rows] == [f"p{i}/{c}" for i in range(5) for c in range(3)]


def generators(n, *key):
    return [torch.Generator().manual_seed(row_seed(0, *key, i)) for i in range(n)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_draws_follow_the_softmax(temperature):
    logits, n = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, 0.5]), 6000
    counts = torch.bincount(draw(logits.expand(n, -1), generators(n), temperature, 1.0), minlength=6)
    assert chisquare(counts, n * (logits.double() / temperature).softmax(-1)).pvalue > 1e-3


def test_draws_of_one_row_are_independent():
    logits, one = torch.tensor([[0.5, 0.0, -0.5]]), generators(1)
    picks = [draw(logits, one, 1.0, 1.0).item() for _ in range(4000)]
    p, pairs = logits[0].double().softmax(-1), Counter(zip(picks[::2], picks[1::2]))
    assert chisquare([pairs[i, j] for i in range(3) for j in range(3)], (2000 * p[:, None] * p).flatten()).pvalue > 1e-3


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.5, 0.95])
def test_nucleus_is_that_of_transformers(top_p):
    "The same draw as from its masked logits, with the same noise; the border may round differently."
    n = 400
    logits = (
        torch.randn(n, 500, generator=torch.Generator().manual_seed(0))
        * torch.tensor([0.01, 0.3, 1.0, 3.0, 10.0]).repeat(n // 5)[:, None]
    )
    masked = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(0.7)(None, logits.clone()))
    ours, theirs = draw(logits, generators(n), 0.7, top_p), draw(masked * 0.7, generators(n), 0.7, 1.0)
    assert (ours != theirs).sum() <= 2
    assert (ours != draw(logits, generators(n), 0.7, 1.0)).sum() > 0


def test_draws_from_a_nucleus_follow_its_softmax():
    logits, n = torch.tensor([1.5, 1.0, 0.8, 0.0, -1.0]), 6000  # the first three hold 0.83
    counts = torch.bincount(draw(logits.expand(n, -1), generators(n), 1.0, 0.8), minlength=5)
    assert not counts[3:].any() and chisquare(counts[:3], n * logits[:3].double().softmax(-1)).pvalue > 1e-3


def test_ties_at_the_border_stay():  # .3 .3 .2 .2: the border of .7 lies between equal ones
    logits = torch.tensor([0.3, 0.2, 0.3, 0.2]).log().expand(300, -1)
    assert set(draw(logits, generators(300), 1.0, 0.7).tolist()) == {0, 1, 2, 3} and set(
        draw(logits, generators(300), 1.0, 0.55).tolist()
    ) == {0, 2}


def test_a_token_of_no_probability_is_never_drawn():
    assert set(draw(torch.tensor([[-torch.inf, 0.0, -200.0]]).expand(200, -1), generators(200), 1.0, 1.0).tolist()) == {
        1
    }


# the pool ------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 30])
def test_the_likeliest_tokens_are_those_of_transformers(policy, tokenizer, recipe, monkeypatch, batch_size):
    "At temperature 0.0001 a draw is the argmax: greedy `generate`, prompt by prompt, is the oracle."
    ending(policy, tokenizer, monkeypatch)
    prompts = [
        encode_prompt(tokenizer, t * n)
        for n, t in enumerate(["Hi", "Why?", "A longer one. ", "é", "Count to three. ", "So be it"], 1)
    ]
    spec = recipe.sampling.model_copy(update={"temperature": 1e-4, "max_new_tokens": 40, "batch_size": batch_size})
    ours = {
        key: (ids, finished)
        for key, ids, finished in generate(
            policy, tokenizer, [((i, c), p, c) for i, p in enumerate(prompts) for c in range(2)], spec
        )
    }
    lengths = set()
    for i, p in enumerate(prompts):
        theirs = policy.generate(
            input_ids=torch.tensor([p]),
            do_sample=False,
            max_new_tokens=40,
            eos_token_id=sorted(end_ids(policy.generation_config, tokenizer)),
            pad_token_id=tokenizer.pad_token_id,
        )[0, len(p) :].tolist()
        for c in range(2):
            assert ours[i, c] == (theirs, theirs[-1] in end_ids(policy.generation_config, tokenizer))
        lengths.add(len(theirs))
    assert len(lengths) > 2


SHAPE = dict(
    vocab_size=259, hidden_size=64, initializer_range=0.2, bos_token_id=256, eos_token_id=257, pad_token_id=258
)


@pytest.mark.parametrize(
    "family, options",
    [
        (
            "Mistral",
            dict(
                sliding_window=12,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
            ),
        ),
        ("Bloom", dict(n_layer=2, n_head=4)),
        ("GPT2", dict(n_layer=2, n_head=4, n_embd=64, n_positions=100)),
    ],
)
def test_other_families_sample_what_transformers_samples(tokenizer, recipe, family, options):
    "A sliding window, biases that grow with distance, learned positions."
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM" if family != "GPT2" else "GPT2LMHeadModel")(
        getattr(transformers, f"{family}Config")(**SHAPE, **options)
    ).eval()
    prompts, spec = (
        [encode_prompt(tokenizer, t) for t in ("Hi", "Count to three, slowly.", "Why?")],
        recipe.sampling.model_copy(update={"temperature": 1e-4, "max_new_tokens": 45, "batch_size": 2}),
    )
    ours = {key: ids for key, ids, _ in generate(model, tokenizer, [(i, p, i) for i, p in enumerate(prompts)], spec)}
    for i, p in enumerate(prompts):
        assert (
            ours[i]
            == model.generate(input_ids=torch.tensor([p]), do_sample=False, max_new_tokens=45)[0, len(p) :].tolist()
        )


def test_places_of_ended_rows_are_given_to_others(policy, tokenizer, recipe, monkeypatch):
    ending(policy, tokenizer, monkeypatch)
    joined, stepped, join, step = [], [], Pool.join, Pool.step
    monkeypatch.setattr(
        Pool, "join", lambda self, jobs: (joined.append((len(self.rows), len(jobs))), join(self, jobs))[1]
    )
    monkeypatch.setattr(Pool, "step", lambda self: (stepped.append(len(self.rows)), step(self))[1])
    out = list(
        generate(
            policy,
            tokenizer,
            [(i, encode_prompt(tokenizer, "Hi" * (i % 3 + 1)), i) for i in range(40)],
            recipe.sampling.model_copy(update={"batch_size": 8, "max_new_tokens": 12}),
        )
    )
    assert sorted(key for key, *_ in out) == list(range(40)) and sum(n for _, n in joined) == 40
    assert joined[0] == (0, 8) and all(0 < old <= 4 for old, _ in joined[1:]) and max(stepped) == 8 > min(stepped)


def test_a_prompt_is_read_once_for_all_its_candidates(policy, tokenizer, recipe, monkeypatch):
    seen, forward = [], Pool._forward
    monkeypatch.setattr(Pool, "_forward", lambda self, ids, *a: (seen.append(ids.shape), forward(self, ids, *a))[1])
    prompts = [encode_prompt(tokenizer, t) for t in ("Hi", "Why?")]
    list(
        generate(
            policy,
            tokenizer,
            [((i, c), p, c) for i, p in enumerate(prompts) for c in range(3)],
            recipe.sampling.model_copy(update={"batch_size": 6, "max_new_tokens": 2}),
        )
    )
    assert seen == [(2, max(map(len, prompts))), (6, 1)]


@torch.no_grad()
def test_a_row_that_ended_does_not_move_on(policy, tokenizer, recipe, monkeypatch):
    "One row ends while fifteen younger ones go on, too few to be dropped: no position is beyond the longest prompt and response."
    seen, forward, prompt = [], Pool._forward, encode_prompt(tokenizer, "Hi")
    monkeypatch.setattr(
        Pool,
        "_forward",
        lambda self, ids, mask, positions, cache: (
            seen.append(int(positions.max())),
            forward(self, ids, mask, positions, cache),
        )[1],
    )
    pool, ended = Pool(policy, recipe.sampling.model_copy(update={"max_new_tokens": 20}), set()), []
    pool.join([("old", prompt, 0)])
    for _ in range(10):
        ended += pool.step()
    pool.join([(i, prompt, i) for i in range(1, 16)])
    while pool.rows:
        ended += pool.step()
    assert (
        ended[0].key == "old"
        and len(ended) == 16
        and {len(r.ids) for r in ended} == {20}
        and max(seen) == len(prompt) + 18
    )


@pytest.mark.parametrize("what", ["state", "layers"])
def test_a_model_with_a_state_is_refused(policy, recipe, monkeypatch, what):
    if what == "state":
        monkeypatch.setattr(type(policy.get_base_model()), "_is_stateful", True)
    else:
        monkeypatch.setattr(policy.config, "layer_types", ["full_attention", "conv"], raising=False)
    with pytest.raises(ValueError, match="keeps a state that rows cannot share"):
        Pool(policy, recipe.sampling, set())


def test_first_token_is_drawn_from_the_model(policy, tokenizer, recipe):
    n, prompt = 3000, encode_prompt(tokenizer, "Hi")
    with torch.no_grad():
        p = policy(input_ids=torch.tensor([prompt], device=policy.device)).logits[0, -1].double().softmax(-1).cpu()
    out = generate(
        policy,
        tokenizer,
        [(i, prompt, row_seed(7, i)) for i in range(n)],
        recipe.sampling.model_copy(update={"max_new_tokens": 1}),
    )
    counts, rare = torch.bincount(torch.tensor([ids[0] for _, ids, _ in out]), minlength=len(p)), p * n < 5
    assert chisquare([*counts[~rare], counts[rare].sum()], [*(n * p[~rare]), n * p[rare].sum()]).pvalue > 1e-3


@pytest.mark.parametrize("setting, value", [("repetition_penalty", 5.0), ("no_repeat_ngram_size", 1), ("top_k", 1)])
def test_generation_config_of_the_model_does_not_bend_the_draw(
    policy, tokenizer, recipe, tmp_path, monkeypatch, setting, value
):
    plain = drawn(policy, tokenizer, recipe, tmp_path, max_new_tokens=24)
    monkeypatch.setattr(policy.generation_config, setting, value)
    assert drawn(policy, tokenizer, recipe, tmp_path, max_new_tokens=24) == plain


def test_nothing_after_the_end_is_kept(policy, tokenizer, recipe, tmp_path, monkeypatch):
    ending(policy, tokenizer, monkeypatch)
    rows, ends = drawn(policy, tokenizer, recipe, tmp_path), end_ids(policy.generation_config, tokenizer)
    assert {r.finished for r in rows} == {True, False} and len({len(r.response_ids) for r in rows}) > 2
    for r in rows:
        assert not set(r.response_ids[:-1]) & ends and (r.response_ids[-1] in ends) == r.finished
        assert r.finished or len(r.response_ids) == 8
        assert r.response == tokenizer.decode(r.response_ids[:-1] if r.finished else r.response_ids)


def test_sampled_ids_are_the_scored_ids(policy, tokenizer, recipe, tmp_path, monkeypatch):
    ending(policy, tokenizer, monkeypatch)
    rows = {r.id: r for r in drawn(policy, tokenizer, recipe, tmp_path)}
    pairs, _ = candidate_pairs(tokenizer, list(rows.values()))
    set_reference(policy, pairs, 4096)
    scores = score(policy, tokenizer, pairs, recipe, tmp_path / "scores.jsonl")
    assert len(scores) > 8 and any(rows[f"{s.prompt_id}/0"].finished for s in scores)
    for p, s in zip(pairs, scores):
        a, b = s.id.removeprefix(s.prompt_id + "/").split("-")
        for ids, scored, c in ((p.ids_a, s.ids_a, a), (p.ids_b, s.ids_b, b)):
            assert ids == scored == rows[f"{s.prompt_id}/{c}"].response_ids


def test_interrupted_sampling_goes_on(policy, tokenizer, recipe, tmp_path):
    whole, asked = drawn(policy, tokenizer, recipe, tmp_path), []

    def dying(jobs, spec):
        asked.append(len(jobs))
        for n, row in enumerate(generate(policy, tokenizer, jobs, spec)):
            if len(asked) == 1 and n == 7:
                raise KeyboardInterrupt
            yield row

    out = tmp_path / "cut/responses.jsonl"
    with pytest.raises(KeyboardInterrupt):
        sample(dying, tokenizer, PROMPTS, recipe.sampling, out)
    assert not out.exists()
    sample(dying, tokenizer, PROMPTS, recipe.sampling, out)
    assert read_rows(out, Response) == whole and asked == [15, 8]


def test_long_prompts_are_dropped_and_counted(policy, tokenizer, recipe, tmp_path):
    length = len(encode_prompt(tokenizer, PROMPTS[1].prompt))
    engine = partial(generate, policy, tokenizer)
    summary = sample(engine, tokenizer, PROMPTS, recipe.sampling, tmp_path / "r.jsonl", 0, length - 1)
    assert summary["dropped"] == {"prompt too long": 1} and summary["responses"] == 12
    with pytest.raises(ValueError, match="max_prompt_tokens") as e:
        sample(engine, tokenizer, PROMPTS, recipe.sampling, tmp_path / "r.jsonl", 0, 2)
    assert "\n" not in str(e.value)


def test_summary_by_hand():
    rows = [
        Response(id=f"p/{i}", prompt_id="p", prompt="x", candidate=i, response=t, response_ids=ids, finished=f, seed=0)
        for i, (t, ids, f) in enumerate([("ab", [1, 2, 1, 2], True), (" ", [3], False)])
    ]
    assert (
        summarise(rows) == {"responses": 2, "mean_tokens": 2.5, "finished": 0.5, "empty": 1, "distinct_2": 2 / 3}
        and distinct(rows[1:]) == 0
    )
