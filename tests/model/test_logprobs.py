from hypothesis import given, settings, strategies as st
import pytest, torch

from scir.model import logprobs
from scir.model.logprobs import (
    Tree,
    batches,
    check_projection,
    hidden_at,
    similar,
    supports_trees,
    tree_mask,
    trees,
    encode_prompt,
    encode_response,
    hidden_states,
    project,
    response_logps,
    token_logps,
)
from scir.model.weights import for_sampling, grouped_attention, load_base, tiny_model


def one_by_one(model, prompt, response):
    "Unpadded, unchunked, full softmax."
    ids = torch.tensor([prompt + response], device=model.device)
    logps = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)[0, len(prompt) - 1 : -1]
    return logps.gather(-1, ids[0, len(prompt) :, None]).sum()


@pytest.mark.parametrize("chunk", [3, 512])
@torch.no_grad()
def test_batched_padded_chunked_is_one_at_a_time(policy, pairs, chunk):
    prompts, responses = [p.prompt_ids for p in pairs] * 2, [p.ids_a for p in pairs] + [p.ids_b for p in pairs]
    expected = torch.stack([one_by_one(policy, p, r) for p, r in zip(prompts, responses)])
    got = response_logps(policy, prompts, responses, chunk)
    assert got.dtype == torch.float32
    lengths = torch.tensor([len(r) for r in responses], device=got.device)
    torch.testing.assert_close(got / lengths, expected / lengths, atol=1e-5, rtol=0)


def test_chunks_do_not_change_the_gradient():
    model, _ = tiny_model()
    targets, grads = torch.arange(10), []
    for chunk in (3, 100):
        hidden = torch.randn(10, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        grads.append(
            torch.autograd.grad(
                token_logps(model, hidden, targets, chunk).square().sum(), (hidden, model.lm_head.weight)
            )
        )
        assert all(g.abs().sum() > 0 for g in grads[-1])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)


def test_gradient_through_the_model_is_that_of_the_full_softmax(make_policy, pairs):
    grads = []
    for f in (
        lambda m, p: response_logps(m, [p.prompt_ids], [p.ids_a], 3).sum(),
        lambda m, p: one_by_one(m, p.prompt_ids, p.ids_a),
    ):
        model = make_policy()
        f(model, pairs[0]).backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_projection_on_some_rows_is_part_of_the_whole(policy, pairs):
    hidden = hidden_states(policy, [pairs[0].prompt_ids])
    rows = torch.tensor([5, 65, 66], device=hidden.device)
    torch.testing.assert_close(project(policy, hidden, rows), project(policy, hidden)[..., rows])


@torch.no_grad()
@pytest.mark.parametrize("name", ["logits_scaling", "logit_scale"])
def test_a_head_that_scales_otherwise_is_refused(name):
    model, _ = tiny_model()
    check_projection(model)
    setattr(model.config, name, 3.0)  # Llama's own head does not know it
    with pytest.raises(ValueError, match="LlamaForCausalLM"):
        check_projection(model)


def test_response_is_encoded_apart_from_the_prompt_and_ends_once(any_tokenizer):
    ids = encode_response(any_tokenizer, " fine")
    assert ids[-1] == any_tokenizer.eos_token_id and ids.count(any_tokenizer.eos_token_id) == 1
    assert any_tokenizer.decode(ids[:-1]) == " fine"


def test_prompt_is_the_rendered_chat(any_tokenizer):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why is it so?"}]
    text = any_tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = encode_prompt(any_tokenizer, "Why is it so?", "Be brief.")
    assert any_tokenizer.decode(ids) == text and ids == any_tokenizer.encode(text, add_special_tokens=False)


def test_base_model_without_chat_template_gets_the_plain_one():
    _, tokenizer = tiny_model()
    tokenizer.chat_template = None
    ids = encode_prompt(tokenizer, "Hi {content}")
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids[1:]) == "### Instruction:\nHi {content}\n\n### Response:\n"


def test_batches_hold_every_row_once_within_the_budget():
    assert (
        batches([5, 900, 3, 40, 40, 7, 15, 100], 100) == [[0], [1], [2, 3, 4, 5], [6], [7]] and batches([], 100) == []
    )


def test_a_sequence_longer_than_the_context_is_refused(policy):
    with pytest.raises(ValueError, match="does not fit the model.s context of 4096"):
        response_logps(policy, [[5] * 4090], [[6] * 9])


# what sequences share -------------------------------------------------------


def rows_of(lengths):
    return [Tree([0] * n, list(range(n)), {i: list(range(n))}) for i, n in enumerate(lengths)]


def test_groups_hold_every_row_once_and_waste_little():
    lengths = [7, 100, 95, 91, 90, 89, 3, 3, 50]
    for device, share in (("cpu", 0.9), ("cuda", 0.5)):
        groups = [[len(t.ids) for t in g] for g in similar(rows_of(lengths), device)]
        assert sorted(n for g in groups for n in g) == sorted(lengths) and all(min(g) >= share * max(g) for g in groups)
        assert len(groups) == {"cpu": 5, "cuda": 3}[device]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=8),
    st.sampled_from([0, 1, 64, 10**6]),
)
def test_a_tree_holds_its_sequences_and_nothing_twice(seqs, width):
    rows = trees(seqs, width)
    assert sorted(i for t in rows for i in t.paths) == list(range(len(seqs)))
    for tree in rows:
        prefixes = {tuple(seqs[i][: n + 1]) for i in tree.paths for n in range(len(seqs[i]))}
        assert len(tree.ids) == len(tree.positions) == len(prefixes)
        for i, path in tree.paths.items():
            assert [tree.ids[p] for p in path] == seqs[i] and [tree.positions[p] for p in path] == list(
                range(len(path))
            )
    if width in (0, 10**6):
        assert len(rows) == (len({s[0] for s in seqs}) if width else len(seqs))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=5))
def test_a_token_sees_its_ancestors_and_itself(seqs):
    (tree,) = trees(seqs := [[9] + s for s in seqs], 10**6)
    seen = tree_mask([tree], torch.float32)[0, 0] == 0
    prefix = {at: tuple(seqs[i][: n + 1]) for i, path in tree.paths.items() for n, at in enumerate(path)}
    for a, x in prefix.items():
        for b, y in prefix.items():
            assert seen[a, b] == (x[: len(y)] == y)


def branching(pairs):
    return [p.prompt_ids + r for p in pairs for r in (p.ids_a, p.ids_b, p.ids_a[:-1])] + [pairs[0].prompt_ids]


@torch.no_grad()
def test_hidden_states_do_not_depend_on_the_company(policy, pairs):
    seqs = branching(pairs)
    wanted = [[0, len(s) - 1, len(s) // 2] for s in seqs]
    assert supports_trees(policy) and sum(len(t.ids) for t in trees(seqs, 64)) < 0.7 * sum(map(len, seqs))
    together = hidden_at(policy, seqs, wanted)
    alone = torch.stack([hidden_states(policy, [s])[0, w] for s, w in zip(seqs, wanted)]).flatten(0, 1)
    assert len(together) == 3 * len(seqs) and torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradient_does_not_depend_on_the_company(make_policy, pairs, recompute):
    grads = []
    for together in (True, False):
        model = make_policy()
        model.get_base_model()._supports_trees = together
        logps = response_logps(
            model,
            [p.prompt_ids for p in pairs] * 2,
            [p.ids_a for p in pairs] + [p.ids_b for p in pairs],
            recompute=recompute and together,
        )
        (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(g.abs().max() > 0 for g in grads[0])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_recomputing_drops_the_same(make_policy, pairs, recipe):
    grads = []
    for recompute in (False, True):
        model = make_policy(lora=recipe.lora.model_copy(update={"dropout": 0.5})).train()
        supports_trees(model), torch.manual_seed(0)
        response_logps(
            model, [pairs[0].prompt_ids] * 2, [pairs[0].ids_a, pairs[0].ids_b], recompute=recompute
        ).sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_the_trial_leaves_the_model_as_it_was(make_policy, recipe):
    model = make_policy(lora=recipe.lora.model_copy(update={"dropout": 0.5}))
    before = [m.training for m in model.modules()]
    assert supports_trees(model) and [m.training for m in model.modules()] == before and len(set(before)) == 2


def test_recomputing_keeps_one_row_at_a_time(make_policy, pairs, monkeypatch):
    calls, model = [], make_policy()
    monkeypatch.setattr(logprobs, "hidden_states", lambda m, rows: (calls.append(len(rows)), hidden_states(m, rows))[1])
    supports_trees(model), calls.clear()
    loss = response_logps(model, [p.prompt_ids for p in pairs], [p.ids_a for p in pairs], recompute=True).sum()
    forward = len(calls)
    loss.backward()
    assert set(calls) == {1} and len(calls) == 2 * forward


@torch.no_grad()
def test_a_response_asked_for_twice_is_computed_once(policy, pairs, monkeypatch):
    seen = []
    monkeypatch.setattr(logprobs, "hidden_at", lambda m, seqs, *a: (seen.append(len(seqs)), hidden_at(m, seqs, *a))[1])
    p = pairs[0]
    one, two, again = response_logps(policy, [p.prompt_ids] * 3, [p.ids_a, p.ids_b, p.ids_a])
    assert seen == [2] and one == again != two


@pytest.mark.parametrize("dtype, attention", [("float32", "sdpa"), ("bfloat16", "sdpa"), ("bfloat16", "grouped")])
@pytest.mark.parametrize("deaf", ["position_ids", "attention_mask", None])
def test_the_trial_tells_on_a_real_model(recipe, monkeypatch, deaf, dtype, attention):
    model = load_base(recipe.model.model_copy(update={"name": "smollm2-135m-instruct", "dtype": dtype}))
    model.set_attn_implementation(attention)
    decoder = model.get_decoder()
    forward = decoder.forward
    monkeypatch.setattr(decoder, "forward", lambda **kw: forward(**{k: v for k, v in kw.items() if k != deaf}))
    assert supports_trees(model) == (deaf is None)


@pytest.mark.parametrize("deaf", ["position_ids", "attention_mask"])
def test_a_model_that_does_not_look_where_it_is_told_gets_sequences_alone(make_policy, pairs, monkeypatch, deaf):
    model = make_policy().eval()
    decoder = model.get_base_model().get_decoder()
    forward = decoder.forward
    monkeypatch.setattr(decoder, "forward", lambda **kw: forward(**{k: v for k, v in kw.items() if k != deaf}))
    assert not supports_trees(model)
    p = pairs[0]
    torch.testing.assert_close(
        response_logps(model, [p.prompt_ids] * 2, [p.ids_a, p.ids_b])[1],
        one_by_one(model, p.prompt_ids, p.ids_b),
        atol=1e-3,
        rtol=1e-5,
    )


@torch.no_grad()
def test_sequences_longer_than_a_sliding_window_stand_alone(policy, pairs, monkeypatch):
    made = []
    monkeypatch.setattr(logprobs, "trees", lambda seqs, width: (made.append(width), trees(seqs, width))[1])
    for name in ("sliding_window", "attention_chunk_size"):
        for window in (None, 1000, 10):
            monkeypatch.setattr(policy.config, name, window, raising=False)
            response_logps(policy, [pairs[0].prompt_ids], [pairs[0].ids_a])
        monkeypatch.setattr(policy.config, name, None)
    assert made == [64, 64, 0] * 2


# attention ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize(
    "b, t, length, mask",
    [(2, 1, 9, "bool"), (2, 1, 9, "added"), (3, 1, 9, None), (2, 7, 7, "added"), (1, 7, 7, None), (1, 7, 7, "bool")],
)
def test_grouped_attention_is_that_of_transformers(dtype, atol, b, t, length, mask):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(b, h, n, 16, generator=g).to(dtype) for h, n in ((6, t), (2, length), (2, length)))
    seen = (torch.rand(b, 1, t, length, generator=g) > 0.4) | torch.eye(t, length, dtype=torch.bool)
    given = {
        None: None,
        "bool": seen,
        "added": torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min),
    }[mask]
    module = torch.nn.Module()
    module.num_key_value_groups = 3
    ours, theirs = (f(module, q, k, v, given, scaling=0.3)[0] for f in (grouped_attention, sdpa_attention_forward))
    assert ours.shape == theirs.shape == (b, t, 6, 16)
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def test_models_on_a_cpu_use_it(recipe):
    model = load_base(recipe.model)
    assert model.config._attn_implementation == ("grouped" if model.device.type == "cpu" else "sdpa")


def test_adapters_only_in_the_last_layers(make_policy, recipe):
    names = [
        n
        for n, _ in make_policy(lora=recipe.lora.model_copy(update={"last_layers": 1})).named_parameters()
        if "lora_" in n
    ]
    assert names and all("layers.1." in n for n in names)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_attention_gives_the_same_gradient(make_policy, pairs, recipe, dtype):
    grads = []
    for attention in ("eager", "sdpa", "grouped"):
        model = make_policy(model=recipe.model.model_copy(update={"dtype": dtype}))
        model.set_attn_implementation(attention)
        response_logps(model, [p.prompt_ids for p in pairs], [p.ids_a for p in pairs]).sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for same in zip(*grads):
        for other in same[1:]:
            assert (same[0] - other).norm() < (1e-4 if dtype == "float32" else 0.05) * same[0].norm()


@torch.no_grad()
def test_sampling_hands_the_projection_whole_memory(recipe):
    seen, model = [], for_sampling(recipe.model)
    model.get_output_embeddings().register_forward_hook(
        lambda head, inputs, out: seen.append(inputs[0].is_contiguous())
    )
    model(input_ids=torch.ones(3, 5, dtype=torch.long), logits_to_keep=1)
    assert seen == [True]
