"""Every architecture from warm start to export, at tiny size, next to transformers' own results.

`make test-models` prints the table of `docs/models.md` and stores it there; with names after it, the script tries some.
"""

import argparse
import io
import re
import time
from contextlib import redirect_stderr, redirect_stdout
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import peft
import torch
import transformers
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer

import scir
from models.make import MODELS, ODD, save
from scir.data.chat import messages
from scir.export.folders import export_merged
from scir.method.rewards import text_pair
from scir.model.logprobs import PLAIN_TEMPLATE, check_projection, encode_prompt, response_logps
from scir.recipe import adapters
from scir.model.weights import dense, for_sampling, for_scoring, load_tokenizer, reach_summary
from scir.recipe import load_recipe
from scir.runner.work import do
from scir.runner.run import prepare_recipe
from scir.runner.manifest import start_manifest
from scir.model.decoding import end_ids, generate

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/models.md"
MARK = "<!-- printed by make test-models -->"
SETTINGS = (
    "iterations=1",
    "arms=[scir]",
    "data.prompt_limit=4",
    "data.held_out_prompts=2",
    "data.pair_limit=4",
    "data.max_prompt_tokens=160",
    "data.max_response_tokens=160",
    "sampling.max_new_tokens=8",
)
LAST = "seed0/scir/m2"
TALK = [
    {"role": "user", "content": "Name a fruit."},
    {"role": "assistant", "content": "Fig."},
    {"role": "user", "content": "And a bird? é"},
]
PROMPTS = ["Why is the sky blue?", "2 + 2?", TALK, [{"role": "system", "content": "Be brief."}, *TALK]]
PAIRS = [(PROMPTS[0], "Air scatters blue light.", "no"), (PROMPTS[1], "4", "5 or so"), (PROMPTS[0], "Owl", "")]
TOLERANCE = 1e-3  # nats per token, in float32


class Row(NamedTuple):
    """What was found out about a model."""

    name: str
    prompts: str = ""
    logps: str = ""
    sampling: str = ""
    adapter: str = ""
    run: str = ""
    exported: str = ""
    says: str = ""

    @property
    def works(self) -> bool:
        """Whether all steps were done and nothing differs."""
        return not self.says


# comparisons ------------------------------------------------------------------


def theirs_of(tokenizer, turns: list) -> list | None:
    """Ids of a conversation by transformers alone; None where its template has no such role."""
    if tokenizer.chat_template is None:
        text = "".join(PLAIN_TEMPLATE.format(**t) if t["role"] == "user" else t["content"] + "\n\n" for t in turns)
        return tokenizer(text)["input_ids"]
    options = {"add_generation_prompt": True, "return_dict": False}
    try:
        return tokenizer.apply_chat_template(turns, **options)
    except TemplateError:
        if turns[0]["role"] != "system":
            raise
        return None


def equal_prompts(tokenizer, plain) -> str:
    """How many prompts have the same ids here and there."""
    asked = [(prompt, theirs_of(plain, messages(prompt))) for prompt in PROMPTS]
    return fraction([encode_prompt(tokenizer, prompt) == ids for prompt, ids in asked if ids is not None])


def fraction(same: list) -> str:
    """Of comparisons, how many came out equal."""
    return f"{sum(same)} of {len(same)}"


def plain_logp(model, prompt: list, answer: list) -> float:
    """Log-probability of an answer by one forward pass of the whole model, nats."""
    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
    places = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return logits[places, torch.tensor(answer)].sum().item()


def logp_difference(model, plain, tokenizer) -> float:
    """The largest difference of a response's log-probability, nats per token."""
    pairs = [text_pair(tokenizer, "p", *texts) for texts in PAIRS]
    asked = [(p.prompt_ids, ids) for p in pairs for ids in (p.ids_a, p.ids_b)]
    with torch.no_grad():
        ours = response_logps(model, *zip(*asked)).double()
    theirs = torch.tensor([plain_logp(plain, *x) for x in asked]).double()
    lengths = torch.tensor([len(ids) for _, ids in asked])
    return ((ours - theirs).abs() / lengths).max().item()


def equal_answers(model, plain, tokenizer, spec) -> str:
    """How many near-greedy answers are the same as greedy ones of `generate`."""
    cold = spec.model_copy(update={"temperature": 1e-6, "top_p": 1.0, "max_new_tokens": 12})
    asked = [encode_prompt(tokenizer, p) for p in PROMPTS[:3]]
    jobs = [(str(i), ids, i) for i, ids in enumerate(asked)]
    ours = {key: ids for key, ids, _ in generate(model, tokenizer, jobs, cold)}
    ends = sorted(i for i in end_ids(plain.generation_config, tokenizer) if i is not None)
    options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": ends, "pad_token_id": 0}
    theirs = [plain.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in asked]
    return fraction([ours[str(i)] == ids for i, ids in enumerate(theirs)])


# one model --------------------------------------------------------------------


def steps_of(name: str, folder: Path):  # yields (column, what it says)
    """All that is done with a model; stops with the exception of what fails."""
    recipe = load_recipe(ROOT / "recipes/tiny.yaml", (*SETTINGS, f"model.name={save(name, folder / 'model')}"))
    try:
        recipe = prepare_recipe(recipe, folder / "run", say=False)
    except ValueError as e:
        yield "says", str(e)
    tokenizer = load_tokenizer(recipe.model)
    plain = AutoModelForCausalLM.from_pretrained(recipe.model.name, dtype=torch.float32)
    yield "prompts", equal_prompts(tokenizer, AutoTokenizer.from_pretrained(recipe.model.name))
    base = dense(recipe.model)
    check_projection(base)
    yield "logps", f"{logp_difference(base, plain, tokenizer):.0e}"
    yield "adapter", f"{reach_summary(base, recipe.lora)['fraction']:.0%}"
    yield "sampling", equal_answers(for_sampling(recipe.model), plain, tokenizer, recipe.sampling)
    start_manifest(recipe, folder / "run")
    do("optimise", recipe, folder / "run", LAST)
    yield "run", "done"
    export_merged(str(folder / "run" / LAST), folder / "out")
    exported = AutoModelForCausalLM.from_pretrained(folder / "out", dtype=torch.float32)
    trained = for_scoring(recipe.model, *adapters(recipe, folder / "run", LAST))
    if not logp_difference(trained, plain, tokenizer) > TOLERANCE:
        raise ValueError("training left the log-probs as they were")
    yield "exported", f"{logp_difference(trained, exported, tokenizer):.0e}"


def fault_of(row: Row) -> str:
    """What differs in a row all of whose steps were done."""
    counted = {"prompt ids": row.prompts, "answers": row.sampling}
    measured = {"log-probs": row.logps, "exported log-probs": row.exported}
    parts = [f"{what} differ" for what, text in counted.items() if len(set(text.split(" of "))) > 1]
    parts += [f"{what} differ" for what, text in measured.items() if not float(text) <= TOLERANCE]  # nan is a fault too
    return "; ".join(parts)


def short(says: str, folder: str) -> str:
    """A message in one line of a table, without the folder's name and without a command."""
    says = " ".join(says.replace(f"model {folder}/model: ", "").replace(folder + "/", "").split())
    return re.split(r"; (?=add --set)", says)[0][:300]


def try_model(name: str) -> Row:
    """One row of the table."""
    row = Row(name)
    with TemporaryDirectory() as folder, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            for column, value in steps_of(name, Path(folder)):
                row = row._replace(**{column: value})
        except Exception as e:
            says = row.says or (str(e) if isinstance(e, ValueError) else f"{type(e).__name__}: {e}")
            return row._replace(says=short(says, folder))
    return row._replace(says=short(row.says, folder) or fault_of(row))


# the table --------------------------------------------------------------------

HEAD = (
    "model",
    "prompt ids",
    "log-probs",
    "near-greedy",
    "adapted",
    "warm start to export",
    "exported",
    "what happens",
)


def line_of(cells) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(str(c).replace("|", r"\|") or "-" for c in cells) + " |"


def cells_of(row: Row) -> tuple:
    """A row's cells."""
    kind = (MODELS | ODD)[row.name].type
    name = row.name if kind == row.name else f"{row.name} (`{kind}`)"
    return name, *row[1:-1], row.says or "works"


def versions() -> str:
    """The day and the packages of a run."""
    packages = ", ".join(f"{p.__name__} {p.__version__}" for p in (scir, torch, transformers, peft))
    return f"{date.today()}, {packages}"


def main(names: list, page: Path | None) -> None:
    """Try models one after the other, print their rows, and store the table in a page."""
    transformers.logging.set_verbosity_error()
    start, rows, lines = time.time(), [], [line_of(HEAD), line_of(["---"] * len(HEAD))]
    print("\n".join(lines), flush=True)
    for name in names:
        rows.append(try_model(name))
        lines.append(line_of(cells_of(rows[-1])))
        print(lines[-1], flush=True)
    summary = f"{sum(r.works for r in rows)} of {len(rows)} work. {versions()}; {time.time() - start:.0f} s."
    print(f"\n{summary}")
    if page:
        kept = page.read_text().partition(MARK)[0]
        page.write_text(f"{kept}{MARK}\n\n{summary}\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="models to try; none: all of them, and the page is written")
    asked = parser.parse_args().names
    main(asked or [*MODELS, *ODD], None if asked else PAGE)
