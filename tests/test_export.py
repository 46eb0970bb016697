"""Taking the edited model away, and finding a run again."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lit_edit.export import ExportError, apply_deltas, escape, export_model, model_card, save_deltas
from lit_edit.generation import continue_greedily
from lit_edit.ledger import EditLedger, LayerUpdate, LedgerEntry
from lit_edit.models.adapter import ModelAdapter
from lit_edit.runs import RunError, open_run
from lit_edit.stats.second_moment import weights_hash
from lit_edit.testing import tiny_model, tiny_tokenizer

IDS = torch.tensor([[5, 6, 7, 8, 9]])
NASTY = "<script>alert(1)</script> | [x](http://a) `b` **c** _d_ \\| # ~ &amp;\nnew | line\r\n---\n\u2028end"


def ledger_of(model: PreTrainedModel, layers: tuple[int, ...] = (1, 2)) -> EditLedger:
    return EditLedger(ModelAdapter(model), layers)


def edited(family: str = "llama", dtype: torch.dtype = torch.float32) -> EditLedger:
    ledger = ledger_of(tiny_model(family, dtype))
    generator = torch.Generator().manual_seed(0)
    updates = []
    for layer, name in ledger.names.items():
        delta = 0.1 * torch.randn(*ledger.adapter.shape(layer), generator=generator, dtype=torch.float64)
        updates.append(LayerUpdate(layer, name, delta))
    ledger.commit(updates, [LedgerEntry("1", "Italy", "The capital of Italy is", NASTY, {"target_probability": 0.9})])
    return ledger


def export(ledger: EditLedger, folder: Path) -> Path:
    return export_model(ledger.adapter.model, tiny_tokenizer(), ledger, folder, "some/model")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_exported_folder_loads_and_gives_the_same_logits(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    ledger = edited(family, dtype)
    (tmp_path / "out").mkdir()  # an empty folder will do
    folder = export(ledger, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected, found = ledger.adapter.model(IDS).logits, loaded(IDS).logits
        base = tiny_model(family, dtype)(IDS).logits
    assert loaded.dtype == dtype
    for name, value in ledger.adapter.model.named_parameters():
        assert torch.equal(value, loaded.get_parameter(name)), name
    # tiny_model's .to(bfloat16) rounds the rotary table as well, which loading does not.
    torch.testing.assert_close(expected, found, rtol=0, atol=0 if dtype == torch.float32 else 0.05)
    assert not torch.allclose(base, found)
    text = "The capital of Italy is"
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_holds_something_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "keep.txt").write_text("mine")
    with pytest.raises(ExportError, match="not empty"):
        export(edited(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["keep.txt"]
    with pytest.raises(ExportError, match="is a file"):
        export(edited(), tmp_path / "keep.txt")
    assert (tmp_path / "keep.txt").read_text() == "mine"


@pytest.mark.parametrize("part", ["model", "tokenizer", "card"])
def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    ledger = edited()

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    if part == "model":
        monkeypatch.setattr(type(ledger.adapter.model), "save_pretrained", fail)
    elif part == "tokenizer":
        monkeypatch.setattr(type(tiny_tokenizer()), "save_pretrained", fail)
    else:
        monkeypatch.setattr("lit_edit.export.model_card", fail)
    with pytest.raises(OSError, match="disk full"):
        export(ledger, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def cells(row: str) -> list[str]:
    """Split a Markdown table row where an unescaped bar stands."""
    return re.split(r"(?<!\\)(?:\\\\)*\|", row.strip())[1:-1]


def test_the_card_shows_what_users_wrote_and_lets_nothing_become_markup() -> None:
    entries = [LedgerEntry("1", NASTY, "ok", NASTY), LedgerEntry("2", "b", "p", "t")]
    card = model_card(entries, "some/<b>model</b>", {"a.weight": {"relative_change": 0.1234}})
    rows = [line for line in card.splitlines() if re.match(r"\| \d", line)]
    assert [len(cells(row)) for row in rows] == [4, 4]
    body = card.partition("---\n\n")[2]
    assert not re.search(r"<(?!!)", body)
    assert "&lt;script&gt;" in body
    assert "&amp;amp;" in body  # an ampersand is shown as it was written
    assert "(http://a)" in body
    assert not re.search(r"(?<!\\)\[x", body)
    assert "| `a.weight` | 0.1234 |" in card
    assert "with 2 facts" in card


@pytest.mark.parametrize("mark", list("\\`*_[]|#~"))
def test_escape_neutralises_every_mark_once(mark: str) -> None:
    assert escape(f"a{mark}b") == f"a\\{mark}b"


def test_escape_keeps_ordinary_text() -> None:
    assert escape(" Zürich,  (1998) – “x” \n") == "Zürich, (1998) – “x”"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_saved_updates_bring_back_the_very_weights(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    path, source = tmp_path / "ledger" / "deltas.safetensors", edited(family, dtype)
    base_hash = weights_hash(tiny_model(family, dtype))
    save_deltas(source, path, base_hash)
    target = ledger_of(tiny_model(family, dtype))
    apply_deltas(target, path, weights_hash(target.adapter.model))
    for name, value in source.adapter.model.named_parameters():
        assert torch.equal(value, target.adapter.model.get_parameter(name)), name
    for name, delta in source.deltas.items():
        assert delta.dtype == target.deltas[name].dtype == torch.float64
        assert torch.equal(delta, target.deltas[name])


def unchanged(ledger: EditLedger) -> bool:
    base = tiny_model()
    return all(torch.equal(value, base.get_parameter(name)) for name, value in ledger.adapter.model.named_parameters())


def test_updates_of_other_base_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "deltas.safetensors"
    save_deltas(edited(), path, weights_hash(tiny_model(seed=1)))
    target = ledger_of(tiny_model())
    with pytest.raises(ExportError, match="belongs to other base weights"):
        apply_deltas(target, path, weights_hash(target.adapter.model))
    assert unchanged(target)


def test_updates_of_other_layers_are_refused(tmp_path: Path) -> None:
    path, base_hash = tmp_path / "deltas.safetensors", weights_hash(tiny_model())
    save_deltas(edited(), path, base_hash)
    target = ledger_of(tiny_model(), (1,))
    with pytest.raises(ExportError, match=r"edits model\.layers\.2\.mlp\.down_proj\.weight"):
        apply_deltas(target, path, base_hash)
    assert unchanged(target)


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "missing", "folder"])
def test_a_damaged_file_is_an_export_error(tmp_path: Path, damage: str) -> None:
    path, base_hash = tmp_path / "deltas.safetensors", weights_hash(tiny_model())
    save_deltas(edited(), path, base_hash)
    raw = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"cut": raw[:-8], "text": b"hello, this is text", "empty": b""}[damage])
    target = ledger_of(tiny_model())
    with pytest.raises(ExportError, match="cannot be read"):
        apply_deltas(target, path, base_hash)
    assert unchanged(target)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A finished run of a model folder, with a subject that holds a line separator."""
    model, ledger, folder = tmp_path / "model", edited(), tmp_path / "run"
    tiny_model().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    save_deltas(ledger, folder / "ledger" / "deltas.safetensors", weights_hash(tiny_model()))
    rows = [json.dumps({"number": 1, **entry.as_dict()}, ensure_ascii=False) + "\n" for entry in ledger.entries]
    (folder / "ledger" / "edits.jsonl").write_text("".join(rows), "utf-8")
    (folder / "config.yaml").write_text(json.dumps({"model": {"language_model": {"name": str(model), "arch": None}}}))
    return folder


def test_a_run_is_opened_unedited_and_edited_on_demand(run_folder: Path) -> None:
    run = open_run(run_folder)
    assert unchanged(run.ledger)
    before = continue_greedily(run.ledger.adapter, run.tokenizer, "The capital of Italy is", 12)
    run.apply()
    expected = edited().adapter.model
    for name, value in run.ledger.adapter.model.named_parameters():
        assert torch.equal(value, expected.get_parameter(name))
    assert [(e.subject, e.target_new) for e in run.ledger.entries] == [("Italy", NASTY)]
    assert continue_greedily(run.ledger.adapter, run.tokenizer, "The capital of Italy is", 12) != before


@pytest.mark.parametrize(
    ("file", "content", "what"),
    [
        ("ledger/deltas.safetensors", None, "no finished run"),
        ("config.yaml", None, "no finished run"),
        ("config.yaml", "model: [", "cannot be opened"),
        ("config.yaml", "model: {}", "cannot be opened"),
        ("config.yaml", "[]", "cannot be opened"),
        ("config.yaml", "model: {language_model: {nonsense: 1}}", "cannot be opened"),
        ("ledger/edits.jsonl", None, "cannot be opened"),
        ("ledger/edits.jsonl", "{", "cannot be opened"),
        ("ledger/edits.jsonl", '{"id": "1"}\n', "cannot be opened"),
        ("ledger/deltas.safetensors", "text", "cannot be opened"),
    ],
)
def test_a_broken_run_folder_says_so(run_folder: Path, file: str, content: str | None, what: str) -> None:
    path = run_folder / file
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(RunError, match=what):
        open_run(run_folder)


def test_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is no run folder"):
        open_run(tmp_path / "absent")


def test_a_greedy_continuation_is_the_argmax_chain() -> None:
    adapter, ids = ModelAdapter(tiny_model()), list(tiny_tokenizer()("The capital of")["input_ids"])
    start = len(ids)
    with torch.no_grad():
        for _ in range(8):
            ids.append(int(adapter.model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tiny_tokenizer().eos_token_id:
                break
    expected = tiny_tokenizer().decode(ids[start:], skip_special_tokens=True).strip()
    assert continue_greedily(adapter, tiny_tokenizer(), "The capital of", 8) == expected
