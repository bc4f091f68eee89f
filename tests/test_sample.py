from collections import Counter

import pytest, torch
from transformers import TopPLogitsWarper
from scipy.stats import chisquare

from scir import sample as module
from scir.logprobs import encode_prompt
from scir.sample import Nucleus, RowGumbel, distinct, end_ids, generate, processors, sample, summarise
from scir.score import candidate_pairs, score, set_reference
from scir.store import Prompt, Response, read_rows, row_seed

PROMPTS = [Prompt(id=f"p{i}", prompt=t) for i, t in enumerate(["Hi", "A much longer question than the others?", "Why?", "é", "Count to three."])]

def drawn(policy, tokenizer, recipe, folder, prompts=PROMPTS, seed=0, **spec):
    sample(policy, tokenizer, prompts, recipe.sampling.model_copy(update=spec), folder/"responses.jsonl", seed)
    return read_rows(folder/"responses.jsonl", Response)

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

@pytest.mark.parametrize("temperature", [1.0, .7])
def test_draws_follow_the_softmax(recipe, temperature):
    logits, n = torch.tensor([2., 1., 0., -1., .5, .5]), 6000
    draw = processors(recipe.sampling.model_copy(update={"temperature": temperature}), [row_seed(0, i) for i in range(n)])
    counts = torch.bincount(draw(None, logits.expand(n, -1).clone()).argmax(-1), minlength=6)
    assert chisquare(counts, n * (logits.double() / temperature).softmax(-1)).pvalue > 1e-3

def test_draws_of_one_row_are_independent():
    gumbel, logits = RowGumbel([row_seed(0)]), torch.tensor([[.5, 0., -.5]])
    picks = [gumbel(None, logits).argmax().item() for _ in range(4000)]
    p, pairs = logits[0].double().softmax(-1), Counter(zip(picks[::2], picks[1::2]))
    assert chisquare([pairs[i, j] for i in range(3) for j in range(3)], (2000 * p[:, None] * p).flatten()).pvalue > 1e-3

def test_nucleus_is_never_left(recipe):
    logits = torch.tensor([3., 2.5, 0., -1., -9.])  # the first two hold 0.9 of the mass
    draw = processors(recipe.sampling.model_copy(update={"top_p": .8}), list(range(500)))
    assert set(draw(None, logits.expand(500, -1).clone()).argmax(-1).tolist()) == {0, 1}

@pytest.mark.parametrize("top_p", [.01, .5, .95, .999])
@pytest.mark.parametrize("first", [1, 16, 500])
def test_nucleus_is_transformers(top_p, first):
    scores = torch.randn(6, 500, generator=torch.Generator().manual_seed(0)) * torch.tensor([.01, .3, 1., 3., 10., 40.])[:, None]
    ours, theirs = Nucleus(top_p, first)(None, scores), TopPLogitsWarper(top_p)(None, scores.clone())
    assert (ours.isinf() != theirs.isinf()).sum() <= 1 and ours.isfinite().any(-1).all()  # the border may round differently
    assert torch.equal(ours[ours.isfinite()], scores[ours.isfinite()])

def test_ties_at_the_border_stay(): # .3 .3 .2 .2: the border of .7 lies between equal ones
    assert Nucleus(.7)(None, torch.tensor([[.3, .2, .3, .2]]).log()).isfinite().all() and Nucleus(.55)(None, torch.tensor([[.3, .2, .3, .2]]).log()).isfinite().tolist() == [[True, False, True, False]]

def test_noise_is_finite(): assert RowGumbel([1])(None, torch.zeros(1, 200_000)).isfinite().all()

def test_first_token_is_drawn_from_the_model(policy, tokenizer, recipe):
    n, prompt = 3000, encode_prompt(tokenizer, "Hi")
    with torch.no_grad(): p = policy(input_ids=torch.tensor([prompt], device=policy.device)).logits[0, -1].double().softmax(-1).cpu()
    out = generate(policy, tokenizer, [prompt] * n, [row_seed(7, i) for i in range(n)], recipe.sampling.model_copy(update={"max_new_tokens": 1}))
    counts, rare = torch.bincount(torch.tensor([ids[0] for ids, _ in out]), minlength=len(p)), p * n < 5
    assert chisquare([*counts[~rare], counts[rare].sum()], [*(n * p[~rare]), n * p[rare].sum()]).pvalue > 1e-3

@pytest.mark.parametrize("setting, value", [("repetition_penalty", 5.0), ("no_repeat_ngram_size", 1), ("top_k", 1)])
def test_generation_config_of_the_model_does_not_bend_the_draw(policy, tokenizer, recipe, tmp_path, monkeypatch, setting, value):
    plain = drawn(policy, tokenizer, recipe, tmp_path, max_new_tokens=24)
    monkeypatch.setattr(policy.generation_config, setting, value)
    assert drawn(policy, tokenizer, recipe, tmp_path, max_new_tokens=24) == plain

def test_nothing_after_the_end_is_kept(policy, tokenizer, recipe, tmp_path, monkeypatch):
    ending(policy, tokenizer, monkeypatch)
    rows, ends = drawn(policy, tokenizer, recipe, tmp_path), end_ids(policy, tokenizer)
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
    scores = score(policy, tokenizer, pairs, recipe, tmp_path/"scores.jsonl")
    assert len(scores) > 8 and any(rows[f"{s.prompt_id}/0"].finished for s in scores)
    for p, s in zip(pairs, scores):
        a, b = s.id.removeprefix(s.prompt_id + "/").split("-")
        for ids, scored, c in ((p.ids_a, s.ids_a, a), (p.ids_b, s.ids_b, b)): assert ids == scored == rows[f"{s.prompt_id}/{c}"].response_ids

def test_interrupted_sampling_goes_on(policy, tokenizer, recipe, tmp_path, monkeypatch):
    whole, calls = drawn(policy, tokenizer, recipe, tmp_path), []
    def dying(*a):
        calls.append(len(a[2]))
        if len(calls) == 3: raise KeyboardInterrupt
        return generate(*a)
    monkeypatch.setattr(module, "generate", dying)
    with pytest.raises(KeyboardInterrupt): drawn(policy, tokenizer, recipe, tmp_path/"cut")
    assert not (tmp_path/"cut/responses.jsonl").exists()
    assert drawn(policy, tokenizer, recipe, tmp_path/"cut") == whole and sum(calls) == 15 + 4

def test_long_prompts_are_dropped_and_counted(policy, tokenizer, recipe, tmp_path):
    length = len(encode_prompt(tokenizer, PROMPTS[1].prompt))
    summary = sample(policy, tokenizer, PROMPTS, recipe.sampling, tmp_path/"r.jsonl", 0, length - 1)
    assert summary["dropped"] == {"prompt too long": 1} and summary["responses"] == 12
    with pytest.raises(ValueError, match="max_prompt_tokens") as e: sample(policy, tokenizer, PROMPTS, recipe.sampling, tmp_path/"r.jsonl", 0, 2)
    assert "\n" not in str(e.value)

def test_summary_by_hand():
    rows = [Response(id=f"p/{i}", prompt_id="p", prompt="x", candidate=i, response=t, response_ids=ids, finished=f, seed=0) for i, (t, ids, f) in enumerate([("ab", [1, 2, 1, 2], True), (" ", [3], False)])]
    assert summarise(rows) == {"responses": 2, "mean_tokens": 2.5, "finished": .5, "empty": 1, "distinct_2": 2 / 3} and distinct(rows[1:]) == 0
