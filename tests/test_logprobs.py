import pytest, torch

from scir.logprobs import batches, check_projection, hidden_at, similar, encode_prompt, encode_response, hidden_states, project, response_logps, token_logps
from scir.model import for_sampling, load_base, tiny_model

def one_by_one(model, prompt, response):
    "Unpadded, unchunked, full softmax."
    ids = torch.tensor([prompt + response], device=model.device)
    logps = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)[0, len(prompt) - 1:-1]
    return logps.gather(-1, ids[0, len(prompt):, None]).sum()

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
        grads.append(torch.autograd.grad(token_logps(model, hidden, targets, chunk).square().sum(), (hidden, model.lm_head.weight)))
        assert all(g.abs().sum() > 0 for g in grads[-1])
    for a, b in zip(*grads): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)

def test_gradient_through_the_model_is_that_of_the_full_softmax(make_policy, pairs):
    grads = []
    for f in (lambda m, p: response_logps(m, [p.prompt_ids], [p.ids_a], 3).sum(), lambda m, p: one_by_one(m, p.prompt_ids, p.ids_a)):
        model = make_policy()
        f(model, pairs[0]).backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*grads): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)

@torch.no_grad()
def test_projection_on_some_rows_is_part_of_the_whole(policy, pairs):
    hidden, _ = hidden_states(policy, [pairs[0].prompt_ids])
    rows = torch.tensor([5, 65, 66], device=hidden.device)
    torch.testing.assert_close(project(policy, hidden, rows), project(policy, hidden)[..., rows])

@torch.no_grad()
@pytest.mark.parametrize("name", ["logits_scaling", "logit_scale"])
def test_a_head_that_scales_otherwise_is_refused(name):
    model, _ = tiny_model()
    check_projection(model)
    setattr(model.config, name, 3.0)  # Llama's own head does not know it
    with pytest.raises(ValueError, match="LlamaForCausalLM"): check_projection(model)

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
    lengths = [5, 900, 3, 40, 40, 7, 1]
    made = batches(lengths, 100)
    assert sorted(i for b in made for i in b) == list(range(7))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 100 for b in made) and made[0] == [1]


def test_a_sequence_longer_than_the_context_is_refused(policy):
    with pytest.raises(ValueError, match="does not fit the model.s context of 4096"): response_logps(policy, [[5] * 4090], [[6] * 9])

# groups of similar length ---------------------------------------------------

def test_groups_hold_every_row_once_and_waste_little():
    lengths = [7, 100, 95, 91, 90, 89, 3, 3, 50]
    groups = similar(lengths)
    assert sorted(i for g in groups for i in g) == list(range(9)) and all(min(lengths[i] for i in g) >= .9 * max(lengths[i] for i in g) for g in groups)
    assert len(groups) < 9 and similar(lengths, "cuda") == [list(range(9))]

@torch.no_grad()
def test_hidden_states_do_not_depend_on_the_grouping(policy, pairs, monkeypatch):
    import scir.logprobs
    seqs = [p.prompt_ids + p.ids_a for p in pairs]
    wanted = [[0, len(s) - 1] for s in seqs]
    grouped = hidden_at(policy, seqs, wanted)
    monkeypatch.setattr(scir.logprobs, "similar", lambda lengths, device: [list(range(len(lengths)))])
    assert len(grouped) == 2 * len(seqs) and torch.allclose(grouped, hidden_at(policy, seqs, wanted), atol=1e-5)

def test_adapters_only_in_the_last_layers(make_policy, recipe):
    names = [n for n, _ in make_policy(lora=recipe.lora.model_copy(update={"last_layers": 1})).named_parameters() if "lora_" in n]
    assert names and all("layers.1." in n for n in names)

def test_either_attention_gives_the_same_gradient(make_policy, pairs):
    "On a CPU in bfloat16 a model is loaded with the plain one for scoring and training, and samples with the fused one."
    grads = []
    for attention in ("eager", "sdpa"):
        model = make_policy()
        model.set_attn_implementation(attention)
        response_logps(model, [p.prompt_ids for p in pairs], [p.ids_a for p in pairs]).sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*grads): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)

@pytest.mark.skipif(torch.cuda.is_available(), reason="CPU only")
@pytest.mark.parametrize("dtype, scoring", [("bfloat16", "eager"), ("float32", "sdpa")])
@torch.no_grad()
def test_attention_follows_dtype_and_task(recipe, dtype, scoring):
    spec = recipe.model.model_copy(update={"dtype": dtype})
    assert load_base(spec).config._attn_implementation == scoring and for_sampling(spec).config._attn_implementation == "sdpa"

@torch.no_grad()
def test_sampling_hands_the_projection_whole_memory(recipe):
    seen, model = [], for_sampling(recipe.model)
    model.get_output_embeddings().register_forward_hook(lambda head, inputs, out: seen.append(inputs[0].is_contiguous()))
    model(input_ids=torch.ones(3, 5, dtype=torch.long), logits_to_keep=1)
    assert seen == [True]
