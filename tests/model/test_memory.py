"""Out of memory: batches are halved, it is said, and what comes out is the same."""

from pathlib import Path

import pytest, torch

from scir.method.scores import score, set_reference
from scir.method.trainer import arguments, fit
from scir.model import decoding as sampling, outside
from scir.model.logprobs import batches, in_batches
from scir.model.weights import out_of_memory
from scir.store import peak_bytes

from helpers import drawn


FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize(
    "error, yes",
    [
        (FULL, True),
        (MemoryError(), True),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes. Error code 12 (Cannot allocate memory)"
            ),
            True,
        ),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory."), False),
    ],
)
def test_what_counts_as_out_of_memory(error, yes):
    assert out_of_memory(error) == yes


@pytest.mark.parametrize("room", [12, 25, 50, 1000])
def test_batches_are_halved_until_they_fit_and_no_row_is_lost(room, capsys):
    sizes, read = [5, 9, 12, 3, 3, 8, 1, 12, 7, 2], []

    def once(rows):
        if sum(sizes[i] for i in rows) > room:
            raise FULL
        read.append(rows)
        return [10 * i for i in rows]

    found = {i: x for rows, out in in_batches(once, batches(sizes, 60), sizes) for i, x in zip(rows, out, strict=True)}
    assert found == {i: 10 * i for i in range(10)} and sorted(sum(read, [])) == list(range(10))
    assert ("out of memory: batches of at most" in capsys.readouterr().out) == (room < 60)


def test_a_row_that_does_not_fit_alone_is_one_line_and_other_errors_pass():
    def never(rows):
        raise FULL

    with pytest.raises(MemoryError, match="single row of 9 tokens; lower") as e:
        list(in_batches(never, [[0, 1]], [9, 9]))
    assert "\n" not in str(e.value)

    def broken(rows):
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape"):
        list(in_batches(broken, [[0, 1]], [9, 9]))


def crowded(monkeypatch, model, most):
    "A decoder that runs out of memory when it is to read more than `most` ids at once."
    decoder, sizes = model.get_base_model().get_decoder(), []
    plain = type(decoder).forward

    def forward(self, input_ids=None, **kw):
        if input_ids.numel() > most:
            raise FULL
        sizes.append(input_ids.numel())
        return plain(self, input_ids=input_ids, **kw)

    monkeypatch.setattr(type(decoder), "forward", forward)
    return sizes


def test_scores_are_the_same_in_little_memory(policy, tokenizer, pairs, recipe, tmp_path, monkeypatch, capsys):
    set_reference(policy, pairs, 10**6)
    known, whole = [p.reference_logps for p in pairs], score(policy, tokenizer, pairs, recipe, tmp_path / "a.jsonl")
    sizes = crowded(monkeypatch, policy, 300)
    set_reference(policy, pairs, 10**6)
    few = score(policy, tokenizer, pairs, recipe, tmp_path / "b.jsonl")
    assert max(sizes) <= 300 and "out of memory" in capsys.readouterr().out
    assert [p.reference_logps for p in pairs] == [pytest.approx(x, abs=1e-4) for x in known] and [
        s.id for s in few
    ] == [s.id for s in whole]
    for a, b in zip(whole, few):
        assert a.margins == pytest.approx(b.margins, abs=1e-4) and a.logps == pytest.approx(b.logps, abs=1e-4)


@pytest.mark.parametrize("most", [1, 2, 3, 7])
def test_responses_are_the_same_in_little_memory(policy, tokenizer, recipe, tmp_path, monkeypatch, capsys, most):
    whole, plain = drawn(policy, tokenizer, recipe, tmp_path / "a", batch_size=15), sampling.Pool._forward

    def forward(self, ids, mask, positions, cache):
        if len(self.rows) > most or len(ids) > most:
            raise FULL
        return plain(self, ids, mask, positions, cache)

    monkeypatch.setattr(sampling.Pool, "_forward", forward)
    assert drawn(policy, tokenizer, recipe, tmp_path / "b", batch_size=15) == whole
    said = [
        int(l.split()[3])
        for l in capsys.readouterr().out.splitlines()
        if "responses decoded together from here on" in l
    ]
    assert said == [n for n in (7, 3, 1) if n >= max(1, most // 2)][: len(said)] and said[-1] <= most


def test_a_response_that_does_not_fit_alone_is_one_line(policy, tokenizer, recipe, tmp_path, monkeypatch):
    def forward(*a):
        raise FULL

    monkeypatch.setattr(sampling.Pool, "_forward", forward)
    with pytest.raises(MemoryError, match="single response; lower sampling.max_new_tokens"):
        drawn(policy, tokenizer, recipe, tmp_path)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_training_that_does_not_fit_is_one_line(make_policy, tokenizer, pairs, recipe, tmp_path, where):
    from scir.stages.optimise import pair_loss

    model = make_policy(0.05)

    def loss(view):
        if where == "forward":
            raise FULL
        return pair_loss(view, recipe.train)

    def hook(gradient):
        raise FULL

    next(p for p in model.parameters() if p.requires_grad).register_hook(hook)
    set_reference(model, pairs, 4096)
    args = arguments(tmp_path / "checkpoints", 0, steps=3, batch_size=4, learning_rate=1e-2)
    with pytest.raises(MemoryError, match="out of memory with 4 pairs at step 1; lower batch_size") as e:
        fit(model, tokenizer, pairs, loss, recipe, tmp_path, args)
    assert "\n" not in str(e.value)


def test_rewards_are_the_same_in_little_memory(tmp_path, monkeypatch):
    from transformers import LlamaForSequenceClassification
    from scir.model.weights import save_tiny_reward

    folder, rows = str(save_tiny_reward(tmp_path / "reward")), [(f"q{i}", "word " * i) for i in range(9)]
    whole, plain = outside.reward_scores(folder, rows, dtype="float32"), LlamaForSequenceClassification.forward

    def forward(self, input_ids=None, **kw):
        if len(input_ids) > 3:
            raise FULL
        return plain(self, input_ids=input_ids, **kw)

    monkeypatch.setattr(LlamaForSequenceClassification, "forward", forward)
    assert outside.reward_scores(folder, rows, dtype="float32") == pytest.approx(whole, abs=1e-5)


def test_the_peak_is_the_gpus_where_one_was_used_else_the_machines(monkeypatch):
    "A stage without a model leaves a GPU alone; some systems, gVisor among them, have no VmHWM."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 7)
    assert peak_bytes() == 7
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 0)
    machine = peak_bytes()
    monkeypatch.setattr(Path, "read_text", lambda *a, **kw: "VmRSS:\t1 kB\n")
    assert 1e8 < machine <= 1.1 * peak_bytes()
