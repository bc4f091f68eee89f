"""What the tests of the commands share."""

import os

import torch
from typer.testing import CliRunner

from scir.cli import app
from scir.model.weights import load_base, new_adapter
from scir.recipe import parse_recipe

from helpers import ENV, scir


TINY = "data/models/tiny-random"
FEW = ("--set", "sampling.max_new_tokens=6")
PLAIN = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS")} | {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
WIDE = ENV | {"COLUMNS": "200"}


def works(*args):
    done = scir(*args, env=WIDE)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def save_adapter(folder, recipe, scale=0.05):
    "An adapter that is not the identity, as peft writes it."
    policy, g = new_adapter(load_base(recipe.model), recipe.lora), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.copy_(scale * torch.randn(p.shape, generator=g))
    policy.save_pretrained(folder)
    return folder


def made_recipe(**more):
    return parse_recipe({"model": {"name": TINY, "dtype": "float32"}, "lora": {"r": 4, "alpha": 8}} | more)


def one_line(args, *words, code=1):
    done = CliRunner().invoke(app, [*map(str, args)])
    assert done.exit_code == code and done.stdout == "" and isinstance(done.exception, SystemExit), (
        done.exit_code,
        done.exception,
        done.stdout,
    )
    assert len(done.stderr.strip().splitlines()) == 1 and all(w in done.stderr for w in words), done.stderr
