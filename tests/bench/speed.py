"""Sampling, judging and training compared with other libraries, and with the limits of the machine: `make bench`.

Everything is measured on one machine in one run, with one model, the same rows, adapter and dtype. The compared
programs take turns in alternating order. Each figure is a ratio of medians, stored with the raw times.
Results and missed targets are in docs/speed.md.
"""

import argparse, gc, json, os, statistics, subprocess, sys, tempfile, time
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import scir  # noqa: F401, before torch, so that waiting threads yield as in a run
import torch

from scir.data.chat import as_text
from scir.data.load import load_pairs, merged, prompt_pool
from scir.method.judge import judge_ids, verdict_margins
from scir.method.labels import VOTE_SAMPLING, VOTE_TEMPLATE
from scir.method.rewards import View
from scir.method.scores import candidate_pairs, labelled_pairs, score, set_reference
from scir.model.decoding import generate
from scir.model.logprobs import batches, encode_chat, encode_prompt, pad_right, trees
from scir.model.weights import (
    body,
    compute_dtype,
    device,
    for_sampling,
    load_base,
    load_tokenizer,
    lora_config,
    model_path,
    new_adapter,
)
from scir.recipe import Recipe, SamplingSpec, load_recipe
from scir.runner.planner import timed
from scir.runner.work import silence_libraries
from scir.stages.optimise import pair_loss
from scir.stages.sample import sample
from scir.store import Response, peak_bytes, read_rows, row_seed, write_json

from .machine import machine

ROOT = Path(__file__).parents[2]

# Figures and targets. Each ratio is ours over theirs, of speeds (>=) or of seconds or bytes (<=).
# Where tokens are counted, a prefix that several sequences share counts once.

TARGETS = {
    "judge_vs_generated_votes": (
        ">=",
        20,
        "pairs judged per second: verdicts read from the logits, against three sampled 5-point votes per response",
    ),
    "judge_vs_forward_limit": (
        ">=",
        0.8,
        "tokens judged per second, against a bare forward pass without padding and output head",
    ),
    "judge_grad_vs_full_logits": (
        "<=",
        0.8,
        "seconds for the gradient of the judge's margins, against the same from full logits",
    ),
    "judge_grad_vs_full_logits_memory": ("<=", 0.8, "peak memory for this gradient, against the same from full logits"),
    "dpo_vs_trl": (">=", 1.3, "DPO steps per second, against trl's DPOTrainer, which runs the reference in every step"),
    "dpo_vs_trl_precomputed": (
        ">=",
        1.05,
        "DPO steps per second, against trl's DPOTrainer with precomputed reference log-probs",
    ),
    "scir_seconds_per_token_vs_trl": (
        "<=",
        1.05,
        "seconds per token of a SCIR step, against trl's DPO step with precomputed log-probs",
    ),
    "train_peak_memory_vs_trl": (
        "<=",
        1.0,
        "peak memory of DPO steps, against trl's, both without gradient checkpointing",
    ),
    "train_peak_memory_vs_trl_low": ("<=", 0.6, "the same, but ours with gradient_checkpointing: sequences"),
    "sample_vs_loop": (">=", 8, "tokens sampled per second, against generate, one prompt at a time"),
    "sample_vs_batched": (">=", 1.3, "tokens sampled per second, against generate on batches in arrival order"),
    "sample_vs_continuous": (">=", 1.0, "tokens sampled per second, against transformers' continuous batching"),
    "sample_vs_limit": (">=", 0.3, "the lower bound on the seconds of sampling, against the measured seconds"),
    "growth_time": ("10 +-", 1, "seconds to sample and judge ten times the prompts, against the original number"),
    "growth_memory": ("<=", 1.1, "peak memory with ten times the prompts, against the original number"),
}


def meets_target(key: str, ratio: float) -> bool:
    "Whether a figure reaches its target."
    sign, goal, _ = TARGETS[key]
    return ratio >= goal if sign == ">=" else ratio <= goal if sign == "<=" else abs(ratio - 10) <= goal


def figure(key: str, ratio: float, **raw) -> dict:
    "One figure, with its raw seconds or bytes."
    sign, goal, what = TARGETS[key]
    print(f"{key:34} {ratio:8.3g}   target {sign} {goal}{'' if meets_target(key, ratio) else '   missed'}", flush=True)
    return {key: {"ratio": ratio, "target": f"{sign} {goal}", "met": meets_target(key, ratio), "what": what} | raw}


def alternate(contestants: dict, repeats: int) -> dict:  # name -> list of seconds
    "Time functions (name -> () -> None) in turns after one warm-up each, in alternating order."
    seconds = {name: [] for name in contestants}
    for run in contestants.values():
        run()
    for i in range(repeats):
        for name in list(contestants)[:: -1 if i % 2 else 1]:
            gc.collect()
            seconds[name].append(timed(contestants[name]))
    return seconds


def median_ratio(a: list, b: list) -> float:
    "The median of `a` over the median of `b`."
    return statistics.median(a) / statistics.median(b)


# The workload. All figures use the same models and rows, loaded once.


@dataclass
class Workload:
    "Models and rows that the figures share, loaded on first use."

    recipe: Recipe
    repeats: int = 5
    tokens: int = 32  # longest sampled response

    @cached_property
    def tokenizer(self):
        return load_tokenizer(self.recipe.model)

    @property
    def named(self) -> dict:
        "Arguments that load the model with transformers."
        spec = self.recipe.model
        return {
            "pretrained_model_name_or_path": model_path(spec),
            "revision": spec.revision,
            "trust_remote_code": spec.trust_remote_code,
        }

    @cached_property
    def width(self) -> int:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(**self.named).get_text_config().hidden_size

    @cached_property
    def spec(self) -> SamplingSpec:
        return self.recipe.sampling.model_copy(
            update={"temperature": 0.7, "top_p": 0.9, "candidates": 2, "max_new_tokens": self.tokens, "batch_size": 64}
        )

    @cached_property
    def prompts(self) -> list:
        return prompt_pool(self.recipe.data.model_copy(update={"prompt_limit": None}))[0]

    @cached_property
    def pairs(self) -> list:
        d = self.recipe.data
        pairs, _ = labelled_pairs(
            self.tokenizer, merged(load_pairs, d.pairs)[0], d.max_prompt_tokens, d.max_response_tokens, 48
        )
        return pairs

    def theirs(self):
        "The model as transformers loads it."
        from transformers import AutoModelForCausalLM

        return (
            AutoModelForCausalLM.from_pretrained(
                **self.named, dtype=compute_dtype(self.recipe.model), device_map={"": device()}
            )
            .eval()
            .requires_grad_(False)
        )

    def policy(self, base):
        "`base` with a random adapter, in training mode."
        return with_random_adapter(new_adapter(base, self.recipe.lora)).train()

    def presentations(self, pairs) -> list:
        return [
            judge_ids(self.tokenizer, self.recipe.judge, p.prompt, *sides)
            for p in pairs
            for sides in ((p.response_a, p.response_b), (p.response_b, p.response_a))
        ]


@torch.no_grad()
def with_random_adapter(model):
    "Give an adapter random weights, so that it changes the model's output."
    for i, (name, p) in enumerate(model.named_parameters()):
        if "lora_B" in name:
            p.copy_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return model


def library_generate(model, tokenizer, prompts: list, spec: SamplingSpec) -> list:  # response ids
    "transformers' `generate` on one left-padded batch."
    width, pad = max(map(len, prompts)), tokenizer.pad_token_id
    pad = tokenizer.eos_token_id if pad is None else pad
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=True,
        temperature=spec.temperature,
        top_p=spec.top_p,
        top_k=0,
        max_new_tokens=spec.max_new_tokens,
        pad_token_id=pad,
    )
    return [_until_end(row, tokenizer.eos_token_id) for row in out[:, width:].tolist()]


def _until_end(ids, end):
    return ids[: ids.index(end) + 1] if end in ids else ids


# Judging. The verdict costs one forward pass per order; a sampled vote costs a generated text. For its gradient,
# the margin needs two rows of the output head, not the logits of every position.


def read_verdicts(w: Workload, base, pairs: list) -> None:
    "Read the verdicts of `pairs` from the logits, in both orders."
    orders = w.presentations(pairs)
    for batch in batches([len(s) for s in orders], w.recipe.judge.batch_tokens):
        verdict_margins(base, [orders[i] for i in batch], View(base, w.tokenizer, [], w.recipe).verdicts)


def vote_figure(w: Workload, base, pairs: list) -> dict:
    "Verdicts from logits compared with three sampled votes per response."
    votes = [
        encode_chat(w.tokenizer, VOTE_TEMPLATE, {"prompt": as_text(p.prompt), "response": r}, None)
        for p in pairs
        for r in (p.response_a, p.response_b)
        for _ in range(3)
    ]
    theirs, spec = w.theirs(), SamplingSpec(**VOTE_SAMPLING, max_new_tokens=w.recipe.labels.vote_tokens)
    vote = lambda: library_generate(theirs, w.tokenizer, votes, spec)
    seconds = alternate({"ours": lambda: read_verdicts(w, base, pairs), "theirs": vote}, w.repeats)
    ratio = median_ratio(seconds["theirs"], seconds["ours"])
    return figure("judge_vs_generated_votes", ratio, pairs=len(pairs), seconds=seconds)


def forward_figure(w: Workload, base, pairs: list) -> dict:
    "Verdicts from logits compared with bare forward passes of as many tokens."
    seqs = w.presentations(pairs)
    split = batches([len(s) for s in seqs], w.recipe.judge.batch_tokens)
    presented = sum(map(len, seqs))
    computed = sum(len(t.ids) for b in split for t in trees([seqs[i] for i in b], w.width))
    length = round(presented / len(seqs))

    def forward(tokens):
        rows = torch.randint(5, 200, (max(1, round(tokens / length)), length), device=base.device)
        for part in rows.split(max(1, w.recipe.judge.batch_tokens // length)):
            body(base)[1](input_ids=part, use_cache=False)

    ways = {"ours": lambda: read_verdicts(w, base, pairs)}
    ways |= {"presented": lambda: forward(presented), "computed": lambda: forward(computed)}
    seconds = alternate(ways, w.repeats)
    return figure(
        "judge_vs_forward_limit",
        median_ratio(seconds["computed"], seconds["ours"]),
        all_orders_counted=median_ratio(seconds["presented"], seconds["ours"]),
        tokens={"presented": presented, "computed": computed},
        pairs=len(pairs),
        seconds=seconds,
    )


@torch.no_grad()
def judge_figures(w: Workload) -> dict:
    "Verdicts from logits compared with sampled votes, and with bare forward passes."
    base = load_base(w.recipe.model)
    return vote_figure(w, base, w.pairs[:4]) | forward_figure(w, base, w.pairs[:32])


def judge_steps(w: Workload, full: bool, pairs: list):
    "A function that computes the judge's margins of `pairs` and their gradient; `full`: with full logits."
    model = w.policy(w.theirs() if full else load_base(w.recipe.model))

    def ours():
        View(model, w.tokenizer, pairs, w.recipe).orders[0].square().sum().backward()

    def theirs():
        seqs = w.presentations(pairs)
        ids, lengths = pad_right(seqs, device=model.device), torch.tensor([len(s) for s in seqs], device=model.device)
        logits = model(
            input_ids=ids, attention_mask=(torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
        ).logits.float()
        last, v = logits[torch.arange(len(ids)), lengths - 1], View(model, w.tokenizer, [], w.recipe).verdicts
        (last[:, list(v.first)].logsumexp(-1) - last[:, list(v.second)].logsumexp(-1)).square().sum().backward()

    return theirs if full else ours


def judge_gradient_figures(w: Workload) -> dict:
    "Time and memory of the judge's gradient."
    seconds = alternate(
        {"ours": judge_steps(w, False, w.pairs[:8]), "theirs": judge_steps(w, True, w.pairs[:8])}, w.repeats
    )
    memory = {name: run_in_child(w, f"judge-{name}") for name in ("ours", "theirs")}
    return figure(
        "judge_grad_vs_full_logits", median_ratio(seconds["ours"], seconds["theirs"]), seconds=seconds
    ) | figure(
        "judge_grad_vs_full_logits_memory",
        memory["ours"]["bytes"] / memory["theirs"]["bytes"],
        bytes={k: v["bytes"] for k, v in memory.items()},
    )


# Training. Both sides train the same adapter on the same rows in the same batches of eight pairs. A step is the
# loss, the backward pass and AdamW. For trl we use its own collator and `compute_loss`.


def trl_trainer(w: Workload, pairs: list, precomputed: bool, checkpointing: bool):
    "trl's DPOTrainer over `pairs`, with our adapter."
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    sides = [("response_a", "response_b") if p.target else ("response_b", "response_a") for p in pairs]
    rows = [
        {"prompt": w.tokenizer.decode(p.prompt_ids), "chosen": getattr(p, c), "rejected": getattr(p, r)}
        for p, (c, r) in zip(pairs, sides)
    ]
    args = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        beta=w.recipe.train.beta,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        report_to="none",
        max_length=None,
        gradient_checkpointing=checkpointing,
        disable_tqdm=True,
        precompute_ref_log_probs=precomputed,
        average_tokens_across_devices=False,
    )
    base, data = w.theirs(), Dataset.from_list(rows)
    how = {"processing_class": w.tokenizer, "peft_config": lora_config(base, w.recipe.lora)}
    return DPOTrainer(model=base, args=args, train_dataset=data, **how)


def trl_step(w: Workload, pairs: list, precomputed: bool, checkpointing: bool = False):
    "A function that makes trl's DPO steps over `pairs`, in batches of eight. `checkpointing` is trl's default."
    trainer = trl_trainer(w, pairs, precomputed, checkpointing)
    model = with_random_adapter(trainer.model).train()
    data = list(trainer.train_dataset)
    for p, row in zip(pairs, data, strict=True):
        theirs = row["prompt_ids"], {tuple(row["chosen_ids"]), tuple(row["rejected_ids"])}
        if theirs != (p.prompt_ids, {tuple(p.ids_a), tuple(p.ids_b)}):
            raise ValueError(f"trl tokenises pair {p.id} differently")
    collated = [trainer.data_collator(data[i : i + 8]) for i in range(0, len(data), 8)]
    loss = lambda batch: trainer.compute_loss(model, {k: v.to(model.device) for k, v in batch.items()})
    return _steps(model, [lambda b=b: loss(b) for b in collated])


def our_step(w: Workload, pairs: list, arm: str, recompute=False):
    "A function that makes our steps over `pairs`, with an arm's loss."
    recipe = w.recipe.model_copy(
        update={
            "train": w.recipe.arm(arm),
            "model": w.recipe.model.model_copy(update={"gradient_checkpointing": recompute}),
        }
    )
    model = w.policy(load_base(w.recipe.model))
    return _steps(
        model,
        [
            lambda b=pairs[i : i + 8]: pair_loss(View(model, w.tokenizer, b, recipe), recipe.train)[0]
            for i in range(0, len(pairs), 8)
        ],
    )


def _steps(model, losses):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)

    def run():
        for loss in losses:
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def training_figures(w: Workload) -> dict:
    "Steps per second and peak memory against trl."
    pairs = w.pairs[:16]
    set_reference(load_base(w.recipe.model), pairs, w.recipe.judge.batch_tokens)
    s = alternate(
        {
            "dpo": our_step(w, pairs, "srlm"),
            "scir": our_step(w, pairs, "scir"),
            "trl": trl_step(w, pairs, False),
            "trl precomputed": trl_step(w, pairs, True),
        },
        w.repeats,
    )
    responses = sum(2 * len(p.prompt_ids) + len(p.ids_a) + len(p.ids_b) for p in pairs)
    tokens = {
        "trl precomputed": responses,
        "scir": sum(_computed(w, pairs[i : i + 8]) for i in range(0, len(pairs), 8)),
        "scir, nothing shared": responses + sum(map(len, w.presentations(pairs))),
    }
    per_token = {k: [x / tokens[k] for x in s[k]] for k in ("trl precomputed", "scir")}
    memory = {name: run_in_child(w, name) for name in ("dpo", "dpo-low", "scir", "scir-low", "trl", "trl-low")}
    share = {k: v["bytes"] / memory["trl"]["bytes"] for k, v in memory.items()}
    return (
        figure("dpo_vs_trl", median_ratio(s["trl"], s["dpo"]), seconds=s, pairs=len(pairs))
        | figure("dpo_vs_trl_precomputed", median_ratio(s["trl precomputed"], s["dpo"]))
        | figure(
            "scir_seconds_per_token_vs_trl",
            median_ratio(per_token["scir"], per_token["trl precomputed"]),
            tokens=tokens,
        )
        | figure("train_peak_memory_vs_trl", share["dpo"], bytes=memory, scir_share=share["scir"])
        | figure(
            "train_peak_memory_vs_trl_low",
            share["dpo-low"],
            scir_share=share["scir-low"],
            trl_checkpointing_share=share["trl-low"],
        )
    )


def _computed(w, pairs):
    "Tokens that a SCIR step on `pairs` computes."
    width, seqs = w.width, [p.prompt_ids + ids for p in pairs for ids in (p.ids_a, p.ids_b)]
    return sum(len(t.ids) for some in (seqs, w.presentations(pairs)) for t in trees(some, width))


# Sampling, compared with three ways of transformers, and with a lower bound: every token needs all weights read
# and all operations done, at the measured rates of this machine.


def machine_limits(dtype: torch.dtype, device) -> dict:  # bytes/s, operations/s
    "The measured rates of reading a large array and of multiplying two large matrices, best of seven."
    x, (a, b) = torch.ones(2**26, device=device), torch.randn(2, 2048, 2048, device=device).to(dtype)

    def best(f):
        f()
        return min(timed(f) for _ in range(7))

    return {
        "bandwidth": x.numel() * 4 / best(lambda: float(x.sum())),
        "matmul": 2 * 2048**3 / best(lambda: float((a @ b)[0, 0])),
    }


def floor_seconds(model, limits: dict, prompt_tokens: int, tokens: int, batch: int) -> dict:  # bound -> seconds
    "Lower bounds for sampling `tokens` tokens after reading `prompt_tokens`."
    head = model.get_output_embeddings().weight
    weights = sum(p.numel() for p in model.parameters())
    if not model.config.get_text_config().tie_word_embeddings:
        weights -= head.numel()
    inner = weights - head.numel()
    return {
        "bandwidth": weights * head.element_size() * tokens / batch / limits["bandwidth"],
        "matmul": 2 * (inner * (prompt_tokens + tokens) + head.numel() * tokens) / limits["matmul"],
    }


def continuous_batching(model, tokenizer, prompts: list, spec: SamplingSpec) -> list:  # response ids
    "transformers' continuous batching, with a cache of the needed size (by default it takes most of the memory)."
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    pages = -(-(max(map(len, prompts)) + spec.max_new_tokens) // 8)
    how = GenerationConfig(
        max_new_tokens=spec.max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=spec.temperature,
        top_p=spec.top_p,
        top_k=0,
    )
    batching = ContinuousBatchingConfig(
        page_size=8,
        num_blocks=pages * spec.batch_size + 8,
        max_batch_tokens=256,
        max_requests_per_batch=spec.batch_size,
        max_blocks_per_request=0,
        use_cuda_graph=False,
        use_async_batching=False,
        default_compile_level=0,
        auto_switch_to_flash=False,
    )
    done = model.generate_batch(
        [list(p) for p in prompts], generation_config=how, continuous_batching_config=batching, warmup=False
    )
    out = [list(o.generated_tokens) for o in done.values()]
    if len(out) != len(prompts):
        raise RuntimeError(f"continuous batching gave {len(out)} of {len(prompts)} responses")
    return out


def sampling_figures(w: Workload) -> dict:
    "Tokens per second compared with three ways of transformers, and with the machine's limits."
    model, theirs = for_sampling(w.recipe.model), w.theirs()
    encoded = [encode_prompt(w.tokenizer, p.prompt) for p in w.prompts[:64]]
    rows, made = [ids for ids in encoded for _ in range(w.spec.candidates)], {}

    def note(name, out):
        made.setdefault(name, []).append(sum(map(len, out)))

    def ours():
        jobs = [(i, ids, row_seed(0, i)) for i, ids in enumerate(rows)]
        note("ours", [ids for _, ids, _ in generate(model, w.tokenizer, jobs, w.spec)])

    def in_batches(rows, size):
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        return [ids for part in parts for ids in library_generate(theirs, w.tokenizer, part, w.spec)]

    def loop():
        note("loop", in_batches(rows[:: len(rows) // 6], 1))

    def batched():
        note("batched", in_batches(rows, w.spec.batch_size))

    def packed():
        note("continuous", continuous_batching(theirs, w.tokenizer, rows, w.spec))

    s = alternate({"ours": ours, "loop": loop, "batched": batched, "continuous": packed}, w.repeats)
    per_token = {name: [x / n for x, n in zip(s[name], made[name][1:])] for name in s}
    limits, tokens = machine_limits(compute_dtype(w.recipe.model), model.device), statistics.median(made["ours"])
    floors = floor_seconds(model, limits, sum(map(len, encoded)), tokens, w.spec.batch_size)
    speed = {name: 1 / statistics.median(x) for name, x in per_token.items()}
    found = {}
    for name in ("loop", "batched", "continuous"):
        found |= figure(f"sample_vs_{name}", speed["ours"] / speed[name])
    return found | figure(
        "sample_vs_limit",
        max(floors.values()) / statistics.median(s["ours"]),
        floors=floors,
        limits=limits,
        tokens_per_second=speed,
        seconds=s,
        tokens=made,
        rows=len(rows),
    )


# Growth and peak memory. Peak memory is that of a separate process: its resident set or, on a GPU, the
# allocator's reserved memory.

SMALL, LARGE = 14, 140


def growth(w: Workload, n: int) -> list:  # seconds
    "Sample and judge `n` prompts, as the stages do, with their files."
    model = for_sampling(w.recipe.model)
    spec = w.spec.model_copy(update={"batch_size": 8, "max_new_tokens": w.tokens // 4})
    longest = sorted(w.prompts, key=lambda p: len(as_text(p.prompt)))[::-1]
    prompts = longest[: LARGE : LARGE // n]  # the same lengths for few and many
    if len(prompts) != n:
        raise ValueError(f"bench: {len(w.prompts)} prompts, but {LARGE} are needed; use a recipe with more")

    def run():
        with tempfile.TemporaryDirectory() as d:
            sample(partial(generate, model, w.tokenizer), w.tokenizer, prompts, spec, Path(d) / "responses.jsonl")
            pairs, _ = candidate_pairs(w.tokenizer, read_rows(Path(d) / "responses.jsonl", Response))
            set_reference(model, pairs, 1024)
            judge = w.recipe.judge.model_copy(update={"batch_tokens": 1024})
            recipe = w.recipe.model_copy(update={"judge": judge})
            score(model, w.tokenizer, pairs, recipe, Path(d) / "scores.jsonl")

    return alternate({"run": run}, w.repeats)["run"]


def measure_in_child(w: Workload, name: str) -> dict:  # what a child process writes
    "Run one workload and measure the memory of this process."
    kind, _, n = name.partition("=")
    if kind == "growth":
        return {"seconds": growth(w, int(n)), "bytes": peak_bytes()}
    pairs = w.pairs[:16]
    for p in pairs:
        p.reference_logps = (-50.0, -50.0)
    run = {
        "judge-ours": lambda: judge_steps(w, False, w.pairs[:8]),
        "judge-theirs": lambda: judge_steps(w, True, w.pairs[:8]),
        "trl": lambda: trl_step(w, pairs, False),
        "trl-low": lambda: trl_step(w, pairs, False, True),
        "dpo": lambda: our_step(w, pairs, "srlm"),
        "dpo-low": lambda: our_step(w, pairs, "srlm", "sequences"),
        "scir": lambda: our_step(w, pairs, "scir"),
        "scir-low": lambda: our_step(w, pairs, "scir", "sequences"),
    }[kind]()
    before = peak_bytes()
    for _ in range(2):
        run()
    return {"bytes": peak_bytes(), "before_the_steps": before}


def run_in_child(w: Workload, name: str) -> dict:
    "Run `measure_in_child` in a process of its own."
    with tempfile.TemporaryDirectory() as d:
        (Path(d) / "recipe.json").write_text(w.recipe.model_dump_json())  # JSON is YAML
        options = {"recipe": f"{d}/recipe.json", "out": f"{d}/out.json", "repeats": w.repeats, "tokens": w.tokens}
        command = [sys.executable, "-m", "tests.bench.speed", "--child", name]
        command += [str(x) for name, value in options.items() for x in (f"--{name}", value)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"bench, {name}: {done.stderr.strip().splitlines()[-1]}")
        return json.loads((Path(d) / "out.json").read_text())


def growth_figures(w: Workload) -> dict:
    "Time and memory for ten times the prompts."
    small, large = (run_in_child(w, f"growth={n}") for n in (SMALL, LARGE))
    return figure(
        "growth_time",
        median_ratio(large["seconds"], small["seconds"]),
        seconds={f"{SMALL} prompts": small["seconds"], f"{LARGE} prompts": large["seconds"]},
    ) | figure(
        "growth_memory",
        large["bytes"] / small["bytes"],
        bytes={f"{SMALL} prompts": small["bytes"], f"{LARGE} prompts": large["bytes"]},
    )


# All figures. They depend on the machine, so it is stored with them.


def plot_figures(found: dict, path) -> None:
    "Plot each figure relative to its target: 1 is the target, and more is better."
    import matplotlib.pyplot as plt

    keys = list(found["figures"])[::-1]

    def reached(key):
        sign, goal, _ = TARGETS[key]
        ratio = found["figures"][key]["ratio"]
        if sign == ">=":
            return ratio / goal
        return goal / ratio if sign == "<=" else min(ratio / (10 - goal), (10 + goal) / ratio)

    values = [reached(k) for k in keys]
    fig, ax = plt.subplots(figsize=(9, 0.38 * len(keys) + 1))
    ax.barh(keys, values, color=["#0072B2" if found["figures"][k]["met"] else "#D55E00" for k in keys])
    ax.axvline(1, color="black", lw=1)
    ax.set_xscale("log")
    for y, (k, v) in enumerate(zip(keys, values)):
        ax.text(v, y, f" {found['figures'][k]['ratio']:.3g} ({found['figures'][k]['target']})", va="center", fontsize=8)
    m = found["machine"]
    ax.set(
        xlabel="figure / target (log scale); met right of the line",
        xlim=(min(0.4, *values) * 0.9, max(values) * 4),
        title=f"{found['model']}, {found['dtype']}, {m['gpu'] or m['cpu']}, {m['date']}",
    )
    fig.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(fig)


GROUPS = {
    "judge": judge_figures,
    "judge-gradient": judge_gradient_figures,
    "training": training_figures,
    "sampling": sampling_figures,
    "growth": growth_figures,
}


def bench(w: Workload, only: str | None = None) -> dict:  # figures, raw times, machine
    "Measure all groups of figures, or one."
    silence_libraries()
    started, figures = time.time(), {}
    for name, group in GROUPS.items():
        if only in (None, name):
            figures |= group(w)
        gc.collect()
    return {
        "model": w.recipe.model.name,
        "dtype": str(compute_dtype(w.recipe.model)).removeprefix("torch."),
        "repeats": w.repeats,
        "seconds": round(time.time() - started),
        "machine": machine(),
        "figures": figures,
    }


def write_results(w: Workload, out: Path, only: str | None) -> None:
    "Measure, then write the figures and, with the same name, their plot."
    found, plot = bench(w, only), out.with_suffix(".png")
    write_json(out, found)
    plot_figures(found, plot)
    missed, n = sum(not f["met"] for f in found["figures"].values()), len(found["figures"])
    print(f"{found['seconds']} s; {missed} of {n} missed; {out}, {plot}")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("data/bench.json"), help="output; the plot has the same name")
    parser.add_argument("--recipe", default="recipes/smol.yaml", help="recipe for model, adapter, judge and data")
    parser.add_argument("--set", action="append", default=[], help="override a field of the recipe; repeatable")
    parser.add_argument("--repeats", type=int, default=5, help="repeats of each measurement; the median is used")
    parser.add_argument("--tokens", type=int, default=32, help="maximum tokens of a sampled response")
    parser.add_argument("--only", choices=GROUPS, help="measure one group of figures")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # a workload of `measure_in_child`
    return parser.parse_args()


def main() -> None:
    "The command line."
    a = parsed()
    out = a.out.resolve()
    recipe = load_recipe(a.recipe, tuple(a.set))
    os.chdir(ROOT)
    w = Workload(recipe, a.repeats, a.tokens)
    if a.child:
        write_json(out, measure_in_child(w, a.child))
    else:
        write_results(w, out, a.only)


if __name__ == "__main__":
    main()
