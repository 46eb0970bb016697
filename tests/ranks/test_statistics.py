"""Key statistics counted by ranks: the chunks that one process reads, each once, and the same sums."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from lit_edit.devices.ranks import Ranks
from lit_edit.models.adapter import ModelAdapter
from lit_edit.stats.corpus import DocumentText, SampledText
from lit_edit.stats.second_moment import KeyStatistics, accumulate
from lit_edit.testing import tiny_model, tiny_tokenizer
from tests.ranks.together import Found, raised, together
from tests.stats.test_second_moment import DOCUMENTS, LAYERS, Forwards, Interrupted, stop_after

SIZES = [2, 3]
EXACT = {"rtol": 1e-12, "atol": 1e-12}  # sums of the same numbers in another order, in float64
CORPORA: dict[str, SampledText | DocumentText] = {
    "sampled": SampledText(rows=4, length=16),
    "documents": DocumentText(DOCUMENTS * 4, "docs", rows=3),
}
BUDGETS = {"sampled": [1, 64, 500], "documents": [1, 300, 560]}


def adapter_of(ranks: Ranks, **how: bool) -> ModelAdapter:
    adapter = ModelAdapter(tiny_model())
    adapter.ranks = replace(ranks, **how)
    return adapter


def tokens_in(path: Path) -> int:
    with safe_open(path, "pt") as file:
        return int(file.metadata()["tokens"])


def read_chunks(corpus: SampledText | DocumentText) -> list[int]:
    """Note which chunks are read of a corpus."""
    asked: list[int] = []
    chunk = corpus.chunk

    def noting(index: int, *args: Any) -> list[list[int]]:
        asked.append(index)
        return chunk(index, *args)

    corpus.chunk = noting
    return asked


def count(ranks: Ranks, folder: str) -> Found:
    """All corpora and budgets, one after another; alone, with others, and in lockstep."""
    found: Found = {}
    for name, corpus in CORPORA.items():
        for budget in BUDGETS[name]:
            for how in ({}, {"lockstep": True}) if ranks.together else ({},):
                case = f"{name} {budget} {how}"
                adapter, own, progress = adapter_of(ranks, **how), Path(folder) / case, []
                copied = replace_corpus(corpus)
                asked, forwards = read_chunks(copied), Forwards(adapter)
                skip_first = budget == 64
                arguments = (adapter, tiny_tokenizer(), LAYERS, copied, budget, skip_first, own)
                moments = accumulate(*arguments, lambda *step, progress=progress: progress.append(step))
                found |= {f"{case} {layer}": moment for layer, moment in moments.items()}
                found[f"{case} layers"] = sorted(moments)
                found[f"{case} asked"], found[f"{case} progress"] = asked, progress
                found[f"{case} forwards"] = forwards.counts
                ranks.gather(None)  # the leader has written
                files = sorted(path.name for path in own.iterdir())
                found[f"{case} files"] = files
                found[f"{case} tokens"] = [tokens_in(own / file) for file in files]
    return found


def replace_corpus(corpus: SampledText | DocumentText) -> SampledText | DocumentText:
    """A corpus of its own to patch."""
    made = object.__new__(type(corpus))
    made.__dict__.update(vars(corpus))
    return made


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Found:
    (found,) = together(1, count, str(tmp_path_factory.mktemp("alone")))
    return found


@pytest.fixture(scope="module", params=SIZES)
def everyone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    return together(request.param, count, str(tmp_path_factory.mktemp("together")))


def test_moments_are_those_of_one_process(everyone: list[Found], alone: Found) -> None:
    for name, budgets in BUDGETS.items():
        for budget in budgets:
            one = f"{name} {budget} {{}}"
            for how in ({}, {"lockstep": True}):
                case = f"{name} {budget} {how}"
                for layer in LAYERS:
                    torch.testing.assert_close(everyone[0][f"{case} {layer}"], alone[f"{one} {layer}"], **EXACT)
                    if how:
                        assert torch.equal(everyone[0][f"{case} {layer}"], alone[f"{one} {layer}"])
                for rank, found in enumerate(everyone):
                    assert found[f"{case} layers"] == ([] if rank else list(LAYERS))
                    assert found[f"{case} tokens"] == alone[f"{one} tokens"]
                    assert found[f"{case} files"] == [f"layer{layer}.safetensors" for layer in LAYERS]
                    assert found[f"{case} progress"] == everyone[0][f"{case} progress"]
                    assert found[f"{case} progress"][-1] == [budget, budget]


def test_each_chunk_is_read_by_one_rank(everyone: list[Found], alone: Found) -> None:
    size = len(everyone)
    for name, budgets in BUDGETS.items():
        for budget in budgets:
            case, lockstep = f"{name} {budget} {{}}", f"{name} {budget} {{'lockstep': True}}"
            one = alone[f"{case} asked"]
            assert one == list(range(len(one)))
            rounds = -(-len(one) // size)
            for rank, found in enumerate(everyone):
                assert found[f"{case} asked"] == [rank + size * number for number in range(rounds)]
                assert found[f"{lockstep} asked"] == one
                assert found[f"{lockstep} forwards"] == alone[f"{case} forwards"]
            if name == "documents":  # sampling runs the model for chunks that are not needed any more
                forwards = torch.tensor([found[f"{case} forwards"] for found in everyone]).sum(0)
                assert forwards.tolist() == alone[f"{case} forwards"]
    asked = [len(alone[f"{name} {budgets[2]} {{}} asked"]) for name, budgets in BUDGETS.items()]
    assert min(asked) > 3  # more than a round of three ranks
    assert any(count % size for count in asked)  # and the last round is not needed whole


# ---- too little text -------------------------------------------------------------------------------------------------


def too_short(ranks: Ranks, folder: str) -> Found:
    found: Found = {}
    for documents in (1, 7, 8, len(DOCUMENTS)):
        corpus = DocumentText(DOCUMENTS[:documents], "docs", rows=3)
        arguments = (adapter_of(ranks), tiny_tokenizer(), LAYERS, corpus, 100_000, False)
        found[str(documents)] = raised(
            lambda args=arguments: accumulate(*args, Path(folder) / str(len(args[3].documents)))
        )
    corpus = DocumentText(DOCUMENTS[:8], "docs", rows=3)
    adapter = adapter_of(ranks)
    whole = sum(len(row) for index in range(3) for row in corpus.chunk(index, adapter, tiny_tokenizer()))
    arguments = (adapter, tiny_tokenizer(), LAYERS, corpus)
    found["all of it"] = len(accumulate(*arguments, whole, False, Path(folder) / "whole"))
    found["one more"] = raised(lambda: accumulate(*arguments, whole + 1, False, Path(folder) / "more"))
    return found | {"whole": whole, "after": ranks.gather(ranks.rank)}


@pytest.mark.parametrize("size", SIZES)
def test_too_little_text_is_an_error_on_all_ranks(size: int, tmp_path: Path) -> None:
    (alone,) = together(1, too_short, str(tmp_path / "alone"))
    for rank, found in enumerate(together(size, too_short, str(tmp_path / "together"))):
        for name in ("1", "7", "8", str(len(DOCUMENTS)), "one more"):
            assert found[name] == alone[name]
            assert found[name][0] == "DataError"
        assert f"the corpus has {found['whole']} tokens; key statistics need" in found["one more"][1]
        assert found["all of it"] == (0 if rank else 2)
        assert found["after"] == list(range(size))


# ---- going on --------------------------------------------------------------------------------------------------------


def cut_off(ranks: Ranks, folder: str, name: str, rounds: int) -> Found:
    arguments = (adapter_of(ranks), tiny_tokenizer(), LAYERS, CORPORA[name], BUDGETS[name][-1], False, Path(folder))
    found = {"error": raised(lambda: accumulate(*arguments, stop_after(rounds), save_every=0))}
    ranks.gather(None)
    return found | {"files": [path.name for path in Path(folder).iterdir()]}


def go_on(ranks: Ranks, folder: str, name: str) -> Found:
    corpus, seen = replace_corpus(CORPORA[name]), []
    asked = read_chunks(corpus)
    arguments = (adapter_of(ranks), tiny_tokenizer(), LAYERS, corpus, BUDGETS[name][-1], False, Path(folder))
    moments = accumulate(*arguments, lambda *step: seen.append(step))
    ranks.gather(None)
    files = sorted(Path(folder).iterdir())
    found: Found = {str(layer): moment for layer, moment in moments.items()}
    return found | {"asked": asked, "seen": seen, "files": [p.name for p in files], "tokens": [*map(tokens_in, files)]}


@pytest.mark.parametrize("name", sorted(CORPORA))
@pytest.mark.parametrize(("first", "then", "rounds", "done"), [(2, 3, 1, 2), (3, 2, 1, 3), (1, 2, 1, 1), (2, 1, 2, 4)])
def test_another_number_of_ranks_goes_on(
    name: str, first: int, then: int, rounds: int, done: int, alone: Found, tmp_path: Path
) -> None:
    for found in together(first, cut_off, str(tmp_path), name, rounds):
        assert found == {"error": [Interrupted.__name__, ""], "files": ["partial-1-2.safetensors"]}
    case = f"{name} {BUDGETS[name][-1]} {{}}"
    everyone = together(then, go_on, str(tmp_path), name)
    assert done < len(alone[f"{case} asked"])  # there is something left to do
    for rank, found in enumerate(everyone):
        assert found["asked"][0] == done + rank
        assert found["seen"][0][0] > 0
        assert found["seen"] == everyone[0]["seen"]
        assert found["files"] == alone[f"{case} files"]
        assert found["tokens"] == alone[f"{case} tokens"]
    for layer in LAYERS:
        torch.testing.assert_close(everyone[0][str(layer)], alone[f"{case} {layer}"], **EXACT)


# ---- the cache -------------------------------------------------------------------------------------------------------


def use_cache(ranks: Ranks, folder: str, text: str) -> Found:
    """Only the leader may see the cache: the others may be on other machines."""
    settings = KeyStatistics(text, cache=f"{folder}/cache" if ranks.leads else f"{folder}/nothing here")
    found: Found = {}

    def compute(name: str, settings: KeyStatistics, layers: tuple[int, ...]) -> dict[int, Tensor]:
        adapter = adapter_of(ranks)
        forwards = Forwards(adapter)
        moments = settings.compute(adapter, tiny_tokenizer(), layers)
        found[f"{name} forwards"], found[f"{name} layers"] = forwards.counts, sorted(moments)
        found.update({f"{name} {layer}": moment for layer, moment in moments.items()})
        return moments

    compute("first", settings, (1,))
    compute("second", settings, (1,))
    compute("more", settings, (1, 2))
    compute("forced", replace(settings, force=True), (1, 2))
    found["is cached"] = settings.is_cached(adapter_of(ranks), (1, 2)) == ranks.leads
    if ranks.leads:
        for path in Path(folder, "cache").rglob("layer2.safetensors"):
            path.write_bytes(b"")
    compute("damaged", settings, (1, 2))
    compute("mended", settings, (1, 2))
    return found


@pytest.mark.parametrize("size", SIZES)
def test_the_cache_is_the_leaders(size: int, tmp_path: Path) -> None:
    text = tmp_path / "docs.txt"
    text.write_text("\n".join(DOCUMENTS * 30))
    (alone,) = together(1, use_cache, str(tmp_path / "alone"), str(text))
    everyone = together(size, use_cache, str(tmp_path / "together"), str(text))
    assert not (tmp_path / "together" / "nothing here").exists()
    computed = {"first": (1,), "more": (2,), "forced": (1, 2), "damaged": (2,)}
    for name, layers in (
        ("first", (1,)),
        ("second", (1,)),
        ("more", LAYERS),
        ("forced", LAYERS),
        ("damaged", LAYERS),
        ("mended", LAYERS),
    ):
        for rank, found in enumerate(everyone):
            assert found[f"{name} layers"] == ([] if rank else list(layers)), name
            assert found["is cached"]
        forwards = torch.tensor([found[f"{name} forwards"] for found in everyone]).sum(0).tolist()
        assert forwards == alone[f"{name} forwards"]
        last = max(computed[name]) if name in computed else -1
        assert [n > 0 for n in forwards] == [layer <= last for layer in range(4)], name
        for layer in layers:
            torch.testing.assert_close(
                everyone[0][f"{name} {layer}"], alone[f"first {layer}" if layer == 1 else f"more {layer}"], **EXACT
            )
