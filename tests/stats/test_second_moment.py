"""Second moments of the keys: against a plain pass, the cache, and interruption."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lit_edit.data.request import DataError
from lit_edit.ledger.edit_ledger import EditLedger, LayerUpdate
from lit_edit.models.adapter import ModelAdapter
from lit_edit.stats.corpus import DocumentText, SampledText
from lit_edit.stats.second_moment import KeyStatistics, accumulate, weights_hash
from lit_edit.testing import tiny_model, tiny_tokenizer

LAYERS = (1, 2)
DOCUMENTS = [f"{who} lives in {where}{' and sings' * (i % 5)}." for i, (who, where) in enumerate(
    (who, where) for who in ("Ada", "Marie Curie", "Serena Williams", "I") for where in ("Rome", "Kyoto", "Mount Fuji")
)]  # fmt: skip


@pytest.fixture
def adapter() -> ModelAdapter:
    return ModelAdapter(tiny_model())


@pytest.fixture
def settings(own_cache: Path, tmp_path: Path) -> KeyStatistics:
    """Statistics of a text file, which is faster than sampling."""
    path = tmp_path / "settings.txt"
    path.write_text("\n".join(DOCUMENTS * 10))
    return KeyStatistics(str(path))


class Forwards:
    """Counts how often each layer begins to run."""

    def __init__(self, adapter: ModelAdapter) -> None:
        self.counts = [0] * adapter.n_layers
        for index, layer in enumerate(adapter.layers):
            layer.register_forward_pre_hook(self._counter(index))

    def _counter(self, index: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: object) -> None:
            self.counts[index] += 1

        return hook


def plain_moment(adapter: ModelAdapter, rows: list[list[int]], layer: int, skip_first: bool) -> Tensor:
    """One row at a time through the whole model, sums in float64."""
    kept: list[Tensor] = []
    handle = adapter.down_proj(layer).register_forward_hook(lambda module, args, output: kept.append(args[0]))
    with torch.no_grad():
        for row in rows:
            adapter.model(torch.tensor([row]))
    handle.remove()
    keys = torch.cat([k.reshape(-1, k.shape[-1])[int(skip_first) :] for k in kept]).double()
    return keys.T @ keys / len(keys)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("skip_first", [False, True])
def test_moments_equal_a_plain_pass(tmp_path: Path, family: str, skip_first: bool) -> None:
    adapter, corpus = ModelAdapter(tiny_model(family)), DocumentText(DOCUMENTS, "docs", rows=5)
    rows = [row for i in range(3) for row in corpus.chunk(i, adapter, tiny_tokenizer())]
    assert len({len(row) for row in rows}) > 3  # padding matters
    budget = sum(len(row) - skip_first for row in rows)
    found = accumulate(adapter, tiny_tokenizer(), LAYERS, corpus, budget, skip_first, tmp_path)
    for layer in LAYERS:
        expected = plain_moment(adapter, rows, layer, skip_first)
        assert found[layer].dtype == torch.float64
        torch.testing.assert_close(found[layer], expected, rtol=1e-5, atol=1e-7)
        assert torch.equal(found[layer], found[layer].T)
        assert torch.linalg.eigvalsh(found[layer]).min() > -1e-9


def test_one_pass_collects_all_layers_and_stops_at_the_highest(tmp_path: Path, adapter: ModelAdapter) -> None:
    forwards = Forwards(adapter)
    corpus = DocumentText(["The same length."] * 8, "docs", rows=4)
    accumulate(adapter, tiny_tokenizer(), LAYERS, corpus, 10, False, tmp_path)
    assert forwards.counts[0] > 0
    assert forwards.counts == [forwards.counts[0]] * 3 + [0]
    single = Forwards(adapter)
    accumulate(adapter, tiny_tokenizer(), [1], corpus, 10, False, tmp_path)
    assert single.counts == [forwards.counts[0] // 2] * 2 + [0, 0]  # the first hooks counted both runs


def budget_of(settings: KeyStatistics, adapter: ModelAdapter, layers: tuple[int, ...] = LAYERS) -> int:
    totals: list[int] = []
    settings.compute(adapter, tiny_tokenizer(), layers, lambda done, total: totals.append(total))
    assert len(set(totals)) == 1
    return totals[0]


@pytest.mark.parametrize(("tokens", "budget"), [(0, 480), (479, 480), (5000, 5000)])
def test_the_budget_is_ten_tokens_per_dimension_at_least(
    own_cache: Path, adapter: ModelAdapter, tokens: int, budget: int
) -> None:
    assert adapter.shape(1)[1] == 48
    assert budget_of(KeyStatistics(tokens=tokens), adapter) == budget
    if not tokens:
        assert budget_of(KeyStatistics(force=True), adapter, (1,)) == 480


def test_negative_budgets_are_refused() -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        KeyStatistics(tokens=-1)


def test_progress_starts_at_nothing_and_ends_with_everything(own_cache: Path, adapter: ModelAdapter) -> None:
    seen: list[tuple[int, int]] = []
    KeyStatistics().compute(adapter, tiny_tokenizer(), LAYERS, lambda *args: seen.append(args))
    assert (seen[0], seen[-1]) == ((0, 480), (480, 480))


def test_a_second_call_runs_no_layer(settings: KeyStatistics, adapter: ModelAdapter) -> None:
    assert not settings.is_cached(adapter, LAYERS)
    first = settings.compute(adapter, tiny_tokenizer(), LAYERS)
    assert settings.is_cached(adapter, LAYERS)
    forwards = Forwards(adapter)
    again = settings.compute(adapter, tiny_tokenizer(), LAYERS)
    assert forwards.counts == [0] * 4
    assert all(torch.equal(first[layer], again[layer]) for layer in LAYERS)
    some = settings.compute(adapter, tiny_tokenizer(), (2,))  # a part of what is kept
    assert forwards.counts == [0] * 4
    assert list(some) == [2]
    replace(settings, force=True).compute(adapter, tiny_tokenizer(), LAYERS)
    assert forwards.counts[1] > 0


def test_only_missing_layers_are_computed(settings: KeyStatistics, adapter: ModelAdapter) -> None:
    kept = settings.compute(adapter, tiny_tokenizer(), (1,))[1]
    both = settings.compute(adapter, tiny_tokenizer(), (1, 2))
    assert torch.equal(both[1], kept)
    assert torch.equal(both[2], replace(settings, force=True).compute(adapter, tiny_tokenizer(), (1, 2))[2])


@pytest.mark.parametrize(
    "other",
    [
        KeyStatistics(seed=1),
        KeyStatistics(tokens=481),
        KeyStatistics(skip_first=True),
        KeyStatistics(cache="elsewhere"),
        "weights",
        "corpus",
    ],
    ids=["seed", "tokens", "skip_first", "folder", "weights", "corpus"],
)
def test_what_would_change_the_result_is_not_found_in_the_cache(
    own_cache: Path, adapter: ModelAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: KeyStatistics | str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(SampledText.__init__, "__defaults__", (0, 16, 16, 50, ("The", "A")))  # a little text will do
    KeyStatistics().compute(adapter, tiny_tokenizer(), LAYERS)
    if other == "weights":
        with torch.no_grad():
            adapter.down_proj(0).weight[0, 0] += 1e-3
    elif other == "corpus":
        Path("docs.txt").write_text("Some text.\n")
    settings = {"weights": KeyStatistics(), "corpus": KeyStatistics("docs.txt")}.get(str(other), other)
    assert isinstance(settings, KeyStatistics)
    assert not settings.is_cached(adapter, LAYERS)


def test_a_changed_text_file_is_another_corpus(own_cache: Path, adapter: ModelAdapter, tmp_path: Path) -> None:
    path = tmp_path / "docs.txt"
    path.write_text("\n".join(DOCUMENTS * 10))
    settings = KeyStatistics(str(path))
    first = settings.compute(adapter, tiny_tokenizer(), LAYERS)
    path.write_text("\n".join(DOCUMENTS * 9 + ["Something else."] * 12))
    assert not settings.is_cached(adapter, LAYERS)
    assert not torch.equal(first[1], settings.compute(adapter, tiny_tokenizer(), LAYERS)[1])


class Interrupted(Exception):  # noqa: N818
    pass


def stop_after(chunks: int) -> Callable[[int, int], None]:
    calls = []

    def progress(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) > chunks:
            raise Interrupted

    return progress


@pytest.mark.parametrize(
    "corpus",
    [SampledText(rows=4, length=16), DocumentText(DOCUMENTS * 4, "docs", rows=7)],
    ids=["sampled", "documents"],
)
def test_an_interrupted_count_goes_on_bit_for_bit(
    tmp_path: Path, adapter: ModelAdapter, corpus: SampledText | DocumentText
) -> None:
    arguments = (adapter, tiny_tokenizer(), LAYERS, corpus, 200, False)
    whole = accumulate(*arguments, tmp_path / "whole")
    with pytest.raises(Interrupted):
        accumulate(*arguments, tmp_path / "cut", stop_after(2), save_every=0)
    assert len(list((tmp_path / "cut").iterdir())) == 1
    seen: list[int] = []
    resumed = accumulate(*arguments, tmp_path / "cut", lambda done, total: seen.append(done))
    assert seen[0] > 0  # and not from the beginning
    for layer in LAYERS:
        assert torch.equal(resumed[layer], whole[layer])
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == ["layer1.safetensors", "layer2.safetensors"]


def test_a_count_under_way_is_not_recorded_all_the_time(tmp_path: Path, adapter: ModelAdapter) -> None:
    arguments = (adapter, tiny_tokenizer(), LAYERS, DocumentText(DOCUMENTS * 4, "docs", rows=7), 200, False)
    with pytest.raises(Interrupted):
        accumulate(*arguments, tmp_path / "cut", stop_after(2))
    assert not (tmp_path / "cut").exists()


@pytest.mark.parametrize("damage", ["cut", "bit", "text", "empty"])
def test_a_damaged_interrupted_count_starts_again(tmp_path: Path, adapter: ModelAdapter, damage: str) -> None:
    arguments = (adapter, tiny_tokenizer(), LAYERS, DocumentText(DOCUMENTS * 4, "docs", rows=7), 200, False)
    whole = accumulate(*arguments, tmp_path / "whole")
    with pytest.raises(Interrupted):
        accumulate(*arguments, tmp_path / "cut", stop_after(2), save_every=0)
    (partial,) = (tmp_path / "cut").iterdir()
    raw = partial.read_bytes()
    flipped = raw[:-1] + bytes([raw[-1] ^ 1])
    partial.write_bytes({"cut": raw[: len(raw) // 2], "bit": flipped, "text": b"not a tensor", "empty": b""}[damage])
    found = accumulate(*arguments, tmp_path / "cut")
    assert all(torch.equal(found[layer], whole[layer]) for layer in LAYERS)


def damaged(path: Path, damage: str) -> None:
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "other tensor":
        save_file({"other": torch.zeros(2)}, path)
    elif damage == "other shape":
        save_file({"moment": torch.eye(3, dtype=torch.float64)}, path)
    else:
        save_file({"moment": torch.full((48, 48), float("nan"), dtype=torch.float64)}, path)


@pytest.mark.parametrize("damage", ["truncated", "empty", "other tensor", "other shape", "nan"])
def test_a_damaged_result_is_computed_anew(
    own_cache: Path, settings: KeyStatistics, adapter: ModelAdapter, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = settings.compute(adapter, tiny_tokenizer(), LAYERS)
    (kept,) = own_cache.rglob("layer2.safetensors")
    damaged(kept, damage)
    again = settings.compute(adapter, tiny_tokenizer(), LAYERS)
    assert all(torch.equal(first[layer], again[layer]) for layer in LAYERS)
    assert "computed anew" in caplog.text
    forwards = Forwards(adapter)
    settings.compute(adapter, tiny_tokenizer(), LAYERS)
    assert forwards.counts == [0] * 4  # and mended


def test_too_little_text_says_what_to_do(own_cache: Path, adapter: ModelAdapter, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("One line.\n")
    with pytest.raises(
        DataError, match=r"key statistics need 480 .*Use more text, or model\.statistics\.corpus=sampled"
    ):
        KeyStatistics(str(path)).compute(adapter, tiny_tokenizer(), LAYERS)


def test_the_hash_tells_weights_apart_and_nothing_else() -> None:
    first, same, other = weights_hash(tiny_model()), weights_hash(tiny_model()), weights_hash(tiny_model(seed=1))
    assert first == same != other
    assert weights_hash(tiny_model(dtype=torch.bfloat16)) != first
    edited = tiny_model()
    with torch.no_grad():
        edited.get_parameter("model.norm.weight")[3] += 1e-6
    assert weights_hash(edited) != first


def edited_ledger(adapter: ModelAdapter) -> EditLedger:
    ledger = EditLedger(adapter, LAYERS)
    updates = [
        LayerUpdate(layer, ledger.names[layer], torch.randn(32, 48, dtype=torch.float64, generator=torch.Generator()))
        for layer in LAYERS
    ]
    ledger.commit(updates, [])
    return ledger


def test_statistics_of_the_original_view_do_not_depend_on_the_edits(own_cache: Path, adapter: ModelAdapter) -> None:
    """A resumed stream has committed its edits before it asks for the statistics of the original weights."""
    settings = KeyStatistics()
    before = settings.compute(adapter, tiny_tokenizer(), LAYERS)
    view = edited_ledger(adapter).original()
    assert settings.is_cached(view, LAYERS)
    anew = KeyStatistics(force=True).compute(view, tiny_tokenizer(), LAYERS)
    assert all(torch.equal(before[layer], anew[layer]) for layer in LAYERS)
    assert not settings.is_cached(adapter, LAYERS)  # the edited model is another model


def test_a_view_samples_its_own_text_and_leaves_the_model_as_it_was(adapter: ModelAdapter) -> None:
    corpus = SampledText(rows=8, length=24)
    original = corpus.chunk(0, adapter, tiny_tokenizer())
    ledger = edited_ledger(adapter)
    edited = {name: value.clone() for name, value in adapter.model.named_parameters()}
    assert corpus.chunk(0, adapter, tiny_tokenizer()) != original
    assert corpus.chunk(0, ledger.original(), tiny_tokenizer()) == original
    assert all(torch.equal(value, edited[name]) for name, value in adapter.model.named_parameters())
