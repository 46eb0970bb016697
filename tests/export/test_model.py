"""Taking the edited model away, and finding a run again."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import lit_edit
from lit_edit.export.delta import edit_with, export_delta, read_delta
from lit_edit.export.model import ExportError, apply_deltas, escape, export_model, model_card, save_deltas
from lit_edit.ledger.edit_ledger import EditLedger, LayerUpdate, LedgerEntry
from lit_edit.models.adapter import ModelAdapter
from lit_edit.models.generation import continue_greedily
from lit_edit.models.language_model import LanguageModel
from lit_edit.models.spec import ArchSpec
from lit_edit.runs.folder import RunError, open_run
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
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1  # whoever may read the card may read the weights


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
        monkeypatch.setattr("lit_edit.export.model.model_card", fail)
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


# ---- a delta to take away -----------------------------------------------------------------------------------------


def delta_of(ledger: EditLedger, path: Path, **base: Any) -> Path:
    family, dtype = ledger.adapter.spec.family, ledger.adapter.dtype
    settings = {"name": "some/model", "dtype": str(dtype).removeprefix("torch."), **base}
    return export_delta(ledger, path, weights_hash(tiny_model(family, dtype)), LanguageModel(**settings))


def tampered(path: Path, change: dict[str, str | None] | None = None, **tensors: torch.Tensor | None) -> Path:
    """Write a delta anew with other metadata or tensors; ``None`` leaves one out."""
    with safe_open(path, "pt") as file:
        told = {name: text for name, text in file.metadata().items() if not name.startswith("digest of ")}
        meta = {**told, **(change or {})}
        content = {**{name: file.get_tensor(name) for name in file.keys()}, **tensors}  # noqa: SIM118
    save_file(
        {k: v for k, v in content.items() if v is not None}, path, {k: v for k, v in meta.items() if v is not None}
    )
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_delta_makes_the_edited_model_from_the_base(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    source = edited(family, dtype)
    path = delta_of(source, tmp_path / "new" / "x.safetensors")
    base = tiny_model(family, dtype)
    before = base(IDS).logits
    assert lit_edit.apply_delta(base, str(path)) is base
    for name, value in source.adapter.model.named_parameters():
        assert torch.equal(value, base.get_parameter(name)), name
    assert torch.equal(base(IDS).logits, source.adapter.model(IDS).logits)
    assert not torch.allclose(base(IDS).logits, before)
    assert [p.name for p in path.parent.iterdir()] == ["x.safetensors"]


def test_a_delta_is_applied_to_a_model_as_users_have_it(tmp_path: Path) -> None:
    path = delta_of(edited(), tmp_path / "x.safetensors")
    model = tiny_model().requires_grad_(True).train()
    lit_edit.apply_delta(model, path)
    assert model.training
    assert all(p.requires_grad and p.grad is None and p.grad_fn is None for p in model.parameters())


def test_the_ledger_of_a_delta_takes_it_back(tmp_path: Path) -> None:
    model = tiny_model()
    ledger = edit_with(model, read_delta(delta_of(edited(), tmp_path / "x.safetensors")))
    assert not unchanged(ledger)
    ledger.restore_base()
    assert unchanged(ledger)


def test_a_delta_says_what_it_is(tmp_path: Path) -> None:
    with safe_open(delta_of(edited(), tmp_path / "x.safetensors", revision="v2"), "pt") as file:
        meta, names = file.metadata(), set(file.keys())
    assert names == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2)}
    assert (meta["format"], meta["version"]) == ("lit-edit-export", "1")
    assert (meta["base_model"], meta["base_revision"], meta["base_dtype"]) == ("some/model", "v2", "float32")
    assert meta["base_hash"] == weights_hash(tiny_model())
    assert meta["lit_edit_version"]
    assert "(d_out, d_in)" in meta["layout"]
    wanted = {"id": "1", "prompt": "The capital of Italy is", "subject": "Italy", "target_new": NASTY}
    assert json.loads(meta["edits"]) == [wanted]
    file = read_delta(tmp_path / "x.safetensors")
    assert [(e.subject, e.target_new) for e in file.entries] == [("Italy", NASTY)]


def test_a_delta_knows_how_its_base_is_loaded(tmp_path: Path) -> None:
    arch = asdict(ModelAdapter(tiny_model()).spec) | {"family": "mine", "model_types": ()}
    path = delta_of(edited(), tmp_path / "x.safetensors", dtype="auto", revision="v2", arch=ArchSpec(**arch))
    file = read_delta(path)
    assert file.base == LanguageModel("some/model", "v2", "float32", arch=ArchSpec(**arch))  # not auto
    assert file.base_at("some/model").revision == "v2"
    assert file.base_at("/a/folder").revision is None
    assert file.base_at("/a/folder").name == "/a/folder"
    assert not file.base.trust_remote_code
    lit_edit.apply_delta(tiny_model(), path)


def test_a_delta_does_not_overwrite(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("mine")
    with pytest.raises(ExportError, match="exists and is not overwritten"):
        delta_of(edited(), path)
    assert path.read_text() == "mine"
    with pytest.raises(ExportError, match="is a folder; name a new file"):
        delta_of(edited(), tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ExportError, match="exists and is not overwritten"):
        delta_of(edited(), tmp_path / "link")
    with pytest.raises(ExportError, match="cannot be made"):
        delta_of(edited(), path / "below")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "x.safetensors"]


def test_a_delta_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("lit_edit.files.tensor_files.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        delta_of(edited(), tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_no_edits_make_no_delta(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no edit holds"):
        delta_of(ledger_of(tiny_model()), tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def refused(model: PreTrainedModel, path: Path, what: str) -> None:
    """Applying fails with such a message, and the model is as it was."""
    before = {name: value.clone() for name, value in model.named_parameters()}
    with pytest.raises(ExportError, match=what):
        lit_edit.apply_delta(model, path)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_a_delta_on_other_weights_is_refused_with_both_hashes(tmp_path: Path) -> None:
    path, other = delta_of(edited(), tmp_path / "x.safetensors"), tiny_model(seed=1)
    refused(other, path, weights_hash(tiny_model()))
    refused(other, path, weights_hash(other))
    refused(other, path, "made on 'some/model' in float32")
    refused(tiny_model(dtype=torch.bfloat16), path, "this model is in bfloat16")
    refused(tiny_model("gpt2"), path, "belongs to other base weights")


def test_a_delta_is_not_applied_twice(tmp_path: Path) -> None:
    path = delta_of(edited(), tmp_path / "x.safetensors")
    refused(lit_edit.apply_delta(tiny_model(), path), path, "belongs to other base weights")


@pytest.mark.parametrize(
    "name",
    ["model.layers.9.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight", "../../x", "\x1b[31m", "lm_head"],
)
def test_a_delta_of_unknown_weights_is_refused(tmp_path: Path, name: str) -> None:
    path = tampered(delta_of(edited(), tmp_path / "x.safetensors"), **{name: torch.zeros(32, 48, dtype=torch.float64)})
    refused(tiny_model(), path, re.escape(f"edits {name!r}, which this model does not have"))


@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        (torch.zeros(48, 32, dtype=torch.float64), r"must be \(d_out, d_in\) = \(32, 48\), got \(48, 32\)"),
        (torch.zeros(0, 48, dtype=torch.float64), "must be"),
        (torch.zeros(32 * 48, dtype=torch.float64), "must be a matrix in float64"),
        (torch.zeros(32, 48), "must be a matrix in float64, got torch.float32"),
        (torch.zeros(32, 48, dtype=torch.int64), "must be a matrix in float64"),
        (torch.full((32, 48), float("nan"), dtype=torch.float64), "holds NaN or infinite"),
        (torch.full((32, 48), float("inf"), dtype=torch.float64), "holds NaN or infinite"),
        (torch.full((32, 48), 1e300, dtype=torch.float64), "would write NaN or infinite"),
    ],
)
def test_a_delta_with_wrong_tensors_is_refused(tmp_path: Path, tensor: torch.Tensor, what: str) -> None:
    name = "model.layers.2.mlp.down_proj.weight"  # the first layer's is good
    refused(tiny_model(), tampered(delta_of(edited(), tmp_path / "x.safetensors"), **{name: tensor}), what)


@pytest.mark.parametrize("name", ["base_hash", "base_model", "base_revision", "base_dtype", "base_arch", "edits"])
def test_a_delta_without_some_metadata_is_refused(tmp_path: Path, name: str) -> None:
    path = tampered(delta_of(edited(), tmp_path / "x.safetensors"), {name: None})
    refused(tiny_model(), path, f"damaged metadata: KeyError\\('{name}'\\)")


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("format", None, "not a file of deltas"),
        ("format", "pt", "not a file of deltas"),
        ("version", "2", "version '1', and say 'lit-edit-export', '2'"),
        ("format", "lit-edit-deltas", "belongs to a run folder"),
        ("base_hash", "0", "belongs to other base weights"),
        ("base_dtype", "auto", "damaged metadata"),
        ("base_dtype", "uint8", "damaged metadata"),
        ("base_arch", "{", "damaged metadata"),
        ("base_arch", '["a"]', "damaged metadata"),
        ("base_arch", '{"family": "x"}', "damaged metadata"),
        ("base_arch", '{"family": "x", "layers": 1, "down_proj": "b", "norm": null}', "damaged metadata"),
        (
            "base_arch",
            '{"family": "x", "layers": "a", "down_proj": "b", "norm": null, "more": "c"}',
            "damaged metadata",
        ),
        ("edits", "{", "damaged metadata"),
        ("edits", "7", "damaged metadata"),
        ("edits", "[7]", "damaged metadata"),
        ("edits", '[{"id": "1"}]', "damaged metadata"),
        ("edits", '[{"id": "1", "prompt": "p", "subject": "s", "target_new": 7}]', "damaged metadata"),
        ("edits", '[{"id": "1", "prompt": "p", "subject": "s", "target_new": "\\ud800"}]', "damaged metadata"),
        ("edits", "[" * 100_000, "damaged metadata"),
    ],
)
def test_a_delta_with_wrong_metadata_is_refused(tmp_path: Path, name: str, value: str | None, what: str) -> None:
    refused(tiny_model(), tampered(delta_of(edited(), tmp_path / "x.safetensors"), {name: value}), what)


def test_a_delta_of_nothing_is_refused(tmp_path: Path) -> None:
    path = delta_of(edited(), tmp_path / "x.safetensors")
    refused(tiny_model(), tampered(path, **dict.fromkeys(edited().deltas)), "holds no deltas")


@pytest.mark.parametrize("damage", ["cut", "bit", "text", "empty", "missing", "folder"])
def test_a_damaged_delta_is_refused(tmp_path: Path, damage: str) -> None:
    path = delta_of(edited(), tmp_path / "x.safetensors")
    raw = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        flipped = raw[:-1] + bytes([raw[-1] ^ 1])
        path.write_bytes({"cut": raw[:-8], "bit": flipped, "text": b"hello, this is text", "empty": b""}[damage])
    refused(tiny_model(), path, "cannot be read")


def test_a_runs_own_deltas_are_not_taken_for_an_export(tmp_path: Path) -> None:
    path = tmp_path / "deltas.safetensors"
    save_deltas(edited(), path, weights_hash(tiny_model()))
    refused(tiny_model(), path, "lit-edit export --run RUN --as delta")


# ---- runs ---------------------------------------------------------------------------------------------------------


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
