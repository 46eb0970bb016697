"""Models cut over ranks, layer by layer, against the whole model: every pass, every view, every write."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lit_edit.devices.ranks import Ranks
from lit_edit.ledger.edit_ledger import EditLedger, LayerUpdate
from lit_edit.metrics.scoring import score_continuations
from lit_edit.models.adapter import ModelAdapter
from lit_edit.models.described import check_passes
from lit_edit.models.language_model import LanguageModel
from lit_edit.models.packed import TokenRows
from lit_edit.models.sharded_loading import load_in_parts
from lit_edit.models.shards import is_sharded, own_part, part_of, whole, write_
from lit_edit.stats.corpus import DocumentText
from lit_edit.stats.second_moment import accumulate, weights_hash
from lit_edit.targets.optimize import Target, TargetSettings, optimise_targets
from lit_edit.targets.problem import build_problem
from lit_edit.testing import tiny_model, tiny_requests, tiny_tokenizer
from tests.ranks.together import Found, raised, together

FAMILIES = ["llama", "qwen2", "gpt2", "gptj", "gemma2", "opt", "gpt_neox", "phi3"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CPU = torch.device("cpu")
TEMPLATES = (("{}",), ("I say. {}",))
ROWS = [[5, 9, 13, 7, 200], [5, 9, 13], [40, 41, 42, 43, 44, 45, 46], [5]]
SETTINGS = TargetSettings(steps=5, probability=0.2, plain_first=True)


def save_model(family: str, dtype: torch.dtype, folder: Path, **settings: Any) -> Path:
    """A model folder; what is generated is drawn as its own ``generation_config.json`` says."""
    model = tiny_model(family, dtype, initializer_range=0.2, **settings)
    model.generation_config.temperature = 0.5
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def mesh_of(ranks: Ranks) -> DeviceMesh:
    return init_device_mesh("cpu", (ranks.size,))


def cut_adapter(ranks: Ranks, folder: Path) -> ModelAdapter:
    adapter = ModelAdapter(load_in_parts(folder, mesh_of(ranks), CPU, None, None))
    adapter.ranks = replace(ranks, lockstep=True, alike=not adapter.packs)
    adapter.products = "torch"
    return adapter


def whole_adapter(folder: Path) -> ModelAdapter:
    model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    return ModelAdapter(model, products="torch")


def batch(side: str) -> tuple[Tensor, Tensor]:
    longest = max(map(len, ROWS))
    ids, mask = torch.zeros(len(ROWS), longest, dtype=torch.long), torch.zeros(len(ROWS), longest, dtype=torch.long)
    for number, row in enumerate(ROWS):
        at = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[number, at], mask[number, at] = torch.tensor(row), 1
    return ids, mask


def resharded(adapter: ModelAdapter) -> bool:
    """Whether this rank holds nothing but its parts of the layers."""
    return all(isinstance(parameter, DTensor) for layer in adapter.layers for parameter in layer.parameters())


def changed(weight: Tensor, seed: int) -> Tensor:
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    return (weight.float() + 0.1 * noise).to(weight.dtype)


@torch.no_grad()
def passes(adapter: ModelAdapter, texts: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Everything that is read of a model, the texts that it writes among it."""
    ids, mask = batch("right")
    real = mask.bool()
    hidden = adapter.last_hidden(ids, mask)
    yield "last hidden", hidden[real]
    yield "logits", adapter.logits(hidden)[real]
    left_ids, left_mask = batch("left")
    yield "left padded", adapter.last_hidden(left_ids, left_mask)[left_mask.bool()]
    for layer, keys in adapter.read_keys(ids, mask, (1, 2)).items():
        yield f"keys {layer}", keys[real]
    first, calls = adapter.record_calls(ids, mask)
    yield "first", first[real]
    yield "run on", adapter.run_layers(first, calls, 0, 3)[real]
    yield "whole way", adapter.finish(adapter.run_layers(first, calls, 0, adapter.n_layers))[real]
    line = TokenRows(adapter, ROWS, 0).line()
    found: dict[int, Tensor] = {}
    states = line.run(line.hidden, 0, adapter.n_layers, keys=found)
    yield "line", states
    yield "line keys", found[2]
    residuals = torch.linspace(-1, 1, adapter.shape(2)[0] * 2, dtype=torch.float64).view(-1, 2)
    yield "weight residual", adapter.to_weight_residual(2, found[2][:2], residuals)
    if texts:
        prompts = torch.tensor([[5, 9], [40, 41], [5, 9]])
        yield "sample", adapter.sample(prompts, 6, 5, seed=3)
        settings = {"do_sample": True, "top_k": 20, "max_new_tokens": 6, "pad_token_id": 0}
        yield "generate", adapter.generate(prompts, seed=3, **settings)


def scores(adapter: ModelAdapter) -> list[float]:
    pairs = [(request.text, request.target_new) for request in tiny_requests()]
    return [score.nll for score in score_continuations(adapter, tiny_tokenizer(), pairs)]


def targets_of(adapter: ModelAdapter) -> list[Target]:
    problems = [build_problem(tiny_tokenizer(), request, TEMPLATES) for request in tiny_requests()[:3]]
    return optimise_targets(adapter, problems, 1, SETTINGS)


def look(ranks: Ranks, folder: str) -> Found:
    """The whole model and the cut one side by side."""
    found: Found = {"resharded": [], "alike": []}
    one, cut = whole_adapter(Path(folder)), cut_adapter(ranks, Path(folder))
    assert (cut.sharded, one.sharded) == (True, False)
    assert (cut.device, cut.dtype, cut.n_layers) == (one.device, one.dtype, one.n_layers)
    assert cut.packs == one.packs

    def compare(kind: str, mine: ModelAdapter, theirs: ModelAdapter) -> None:
        texts = kind in ("as loaded", "view")
        for (name, expected), (_, value) in zip(passes(theirs, texts), passes(mine, texts), strict=True):
            found[f"{kind}: {name}: whole"], found[f"{kind}: {name}: cut"] = expected, value
            found["resharded"].append(resharded(cut))

    compare("as loaded", cut, one)
    found["hash"] = [weights_hash(one.model), weights_hash(cut.model)]
    found["dtypes"] = [{n: str(p.dtype) for n, p in a.model.named_parameters()} for a in (one, cut)]
    found["buffers"] = [{n: [str(b.dtype), list(b.shape)] for n, b in a.model.named_buffers()} for a in (one, cut)]
    for (name, expected), (_, value) in zip(one.model.named_buffers(), cut.model.named_buffers(), strict=True):
        assert torch.equal(expected, value), name
    assert not any(parameter.requires_grad for parameter in cut.model.parameters())
    assert not cut.model.training

    own = sum(p.to_local().numel() for layer in cut.layers for p in layer.parameters() if isinstance(p, DTensor))
    stored = sum(p.to_local().untyped_storage().nbytes() for layer in cut.layers for p in layer.parameters())
    everything = [p for layer in one.layers for p in layer.parameters()]
    found["share"] = own / sum(p.numel() for p in everything)
    found["stored"] = stored / sum(p.numel() * p.element_size() for p in everything)

    lent = {one.weight_name(layer): changed(one.weight(layer), layer) for layer in (1, 3)}
    view, whole_view = cut.with_weights(lent), one.with_weights(lent)
    for layer in range(4):
        assert torch.equal(view.weight(layer), whole_view.weight(layer))
        assert cut.shape(layer) == one.shape(layer)
    compare("view", view, whole_view)
    compare("after the view", cut, one)
    found["hash of a view"] = [weights_hash(one.model, lent), weights_hash(cut.model, lent)]
    found["scores"] = [scores(one), scores(cut), scores(whole_view), scores(view)]
    check_passes(cut)

    for number, (theirs, mine) in enumerate(zip(targets_of(whole_view), targets_of(view), strict=True)):
        for name in ("base", "delta"):
            found[f"target {number} {name}: whole"] = getattr(theirs, name)
            found[f"target {number} {name}: cut"] = getattr(mine, name)
        found[f"target {number} steps"] = [len(theirs.trace), len(mine.trace)]
    found["resharded"].append(resharded(cut))
    corpus = DocumentText([request.text for request in tiny_requests()] * 4, "docs", rows=6)
    moments = [
        accumulate(adapter, tiny_tokenizer(), (1, 2), corpus, 100, False, Path(folder) / f"stats-{ranks.rank}-{number}")
        for number, adapter in enumerate((one, cut))
    ]
    for layer, moment in moments[1].items():
        found[f"moment {layer}: whole"], found[f"moment {layer}: cut"] = moments[0][layer], moment

    for layer in (0, 2):
        value = changed(one.weight(layer), 10 + layer)
        write_(one.own_weight(layer), value)
        write_(cut.own_weight(layer), value)
        assert torch.equal(whole(cut.own_weight(layer)), value)
        assert torch.equal(cut.own_weight(layer).to_local(), part_of(cut.own_weight(layer), value))
    compare("written", cut, one)
    found["hash of the written"] = [weights_hash(one.model), weights_hash(cut.model)]
    return found


KINDS = ("as loaded", "view", "after the view", "written")
CASES = [(family, "float32", 2) for family in FAMILIES]
CASES += [("gptj", "float32", 3), ("gpt2", "bfloat16", 2)]
LONG = [("llama", "float32", 3), ("gemma2", "bfloat16", 3)]


@pytest.mark.parametrize(
    ("family", "dtype", "size"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in LONG)]
)
def test_a_cut_model_is_the_whole_model(tmp_path: Path, family: str, dtype: str, size: int) -> None:
    everyone = together(size, look, str(save_model(family, DTYPES[dtype], tmp_path / "model")))
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == "float32" else {"rtol": 2e-2, "atol": 2e-2}
    names = [name.removesuffix(": whole") for name in everyone[0] if name.endswith(": whole")]
    assert len(names) > 50
    differ: list[str] = []
    for rank, found in enumerate(everyone):
        for name in names:
            if f"{name}: cut" not in found:
                assert rank > 0  # statistics are the leader's
                assert name.startswith("moment ")
                continue
            expected, value = found[f"{name}: whole"], found[f"{name}: cut"]
            assert value.dtype == expected.dtype, name
            limits = {"rtol": 1e-4, "atol": 1e-4} if name.startswith("target") and dtype == "float32" else close
            if expected.shape != value.shape or not torch.allclose(expected.double(), value.double(), **limits):
                differ.append(f"{rank} {name}")
            assert torch.equal(value, everyone[0][f"{name}: cut"]), name  # all ranks the same, bit for bit
        assert all(found["resharded"])
        assert found["share"] == pytest.approx(1 / size, rel=0.25)  # rows that do not divide evenly
        assert found["stored"] == pytest.approx(1 / size, rel=0.25)
        for name in ("hash", "hash of a view", "hash of the written", "dtypes", "buffers"):
            assert found[name][0] == found[name][1], name
        assert len({found[name][0] for name in ("hash", "hash of a view", "hash of the written")}) == 3
        for one, cut in ((0, 1), (2, 3)):
            assert found["scores"][cut] == pytest.approx(found["scores"][one], abs=1e-5 if dtype == "float32" else 3e-2)
        assert found["scores"][0] != pytest.approx(found["scores"][2], abs=1e-2)
        for number in range(3):
            assert found[f"target {number} steps"][0] == found[f"target {number} steps"][1] > 1
    assert not differ
    before, view, after, written = (everyone[0][f"{kind}: logits: cut"] for kind in KINDS)
    assert torch.equal(before, after)
    assert not torch.allclose(before, view, atol=1e-2)
    assert not torch.allclose(before, written, atol=1e-2)
    assert set(everyone[0]["dtypes"][1].values()) == {f"torch.{dtype}"}
    assert sum(found["share"] for found in everyone) == pytest.approx(1.0)


# ---- files -----------------------------------------------------------------------------------------------------------


def same_weights(one: PreTrainedModel, cut: PreTrainedModel) -> list[str]:
    """Names of the weights that differ."""
    assert [name for name, _ in cut.named_parameters()] == [name for name, _ in one.named_parameters()]
    pairs = zip(one.named_parameters(), cut.parameters(), strict=True)
    return [name for (name, expected), value in pairs if not torch.equal(whole(value), expected)]


def rename(folder: Path, old: str, new: str) -> None:
    path = folder / "model.safetensors"
    weights = {name.replace(old, new, 1) if name.startswith(old) else name: w for name, w in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


def load_variants(ranks: Ranks, root: str) -> Found:
    """Folders as they come: several files, older names, tied heads, sizes that do not divide, another type."""
    found: Found = {"differ": {}, "hash": {}, "empty": {}, "tied": {}}
    for folder in sorted(Path(root).iterdir()):
        one = whole_adapter(folder)
        cut = cut_adapter(ranks, folder)
        found["differ"][folder.name] = same_weights(one.model, cut.model)
        found["hash"][folder.name] = weights_hash(one.model) == weights_hash(cut.model)
        parts = [p for layer in cut.layers for p in layer.parameters()]
        found["empty"][folder.name] = sum(p.to_local().numel() == 0 for p in parts)
        embedding = cut.model.get_input_embeddings().weight
        found["tied"][folder.name] = cut.head.weight is embedding
        ids, mask = batch("right")
        ids = ids % cut.model.config.vocab_size
        with torch.no_grad():
            close = torch.allclose(cut.last_hidden(ids, mask), one.last_hidden(ids, mask), atol=1e-5)
        found["differ"][folder.name] += [] if close else ["last hidden"]
    folder = Path(root) / "stored in bfloat16"
    wide = load_in_parts(folder, mesh_of(ranks), CPU, torch.float32, None)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found["differ"]["as float32"] = same_weights(expected, wide)
    found["dtype"] = str(ModelAdapter(wide).dtype)
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_folders_of_every_kind_are_read(size: int, tmp_path: Path) -> None:
    model = tiny_model("llama", initializer_range=0.2)
    model.save_pretrained(tmp_path / "several files", max_shard_size="50KB")
    assert (tmp_path / "several files" / "model.safetensors.index.json").is_file()
    assert len(list((tmp_path / "several files").glob("*.safetensors"))) > 2
    rename(save_model("gpt2", torch.float32, tmp_path / "without prefix"), "transformer.", "")
    save_model("llama", torch.float32, tmp_path / "tied", tie_word_embeddings=True)
    save_model("gpt2", torch.float32, tmp_path / "untied", tie_word_embeddings=False)
    save_model("qwen2", torch.bfloat16, tmp_path / "stored in bfloat16")
    odd = {"hidden_size": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2, "intermediate_size": 7}
    save_model("llama", torch.float32, tmp_path / "odd", **odd)
    save_model("gpt2", torch.float32, tmp_path / "odd columns", n_embd=20, n_inner=37)
    for found in together(size, load_variants, str(tmp_path)):
        assert len(found["differ"]) == 8
        assert not any(found["differ"].values()), found["differ"]
        assert all(found["hash"].values()), found["hash"]
        assert found["tied"] == {name: name in ("tied", "without prefix", "odd columns") for name in found["hash"]}
        assert found["dtype"] == "torch.float32"
        empty = found["empty"]["odd"]
    assert (empty > 0) == (size == 3)  # of the last rank: four rows on three are two, two and none


def refuse(ranks: Ranks, root: str) -> Found:
    """Load what cannot be loaded, by itself and as a stream does."""
    found: Found = {}
    mesh = mesh_of(ranks)
    for folder in sorted(Path(root).iterdir()):
        found[folder.name] = raised(lambda folder=folder: load_in_parts(folder, mesh, CPU, None, None))
        model = LanguageModel(str(folder))
        found[f"{folder.name}, by name"] = raised(lambda model=model: model.load((mesh, CPU)))
    return found | {"after": ranks.gather(ranks.rank)}


def change_config(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


def test_folders_that_cannot_be_read_in_parts_are_refused_by_all(tmp_path: Path) -> None:
    for name in (
        "lacks a layer's",
        "lacks a norm",
        "other shape",
        "other head",
        "no safetensors",
        "damaged",
        "lost file",
    ):
        save_model("llama", torch.float32, tmp_path / name)
    rename(tmp_path / "lacks a layer's", "model.layers.2.mlp.down_proj", "model.layers.2.mlp.other")
    rename(tmp_path / "lacks a norm", "model.norm", "model.other")
    change_config(tmp_path / "other shape", intermediate_size=50)
    change_config(tmp_path / "other head", vocab_size=401)
    (tmp_path / "no safetensors" / "model.safetensors").unlink()
    torch.save(tiny_model().state_dict(), tmp_path / "no safetensors" / "pytorch_model.bin")
    path = tmp_path / "damaged" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    index = {"weight_map": dict.fromkeys(load_file(tmp_path / "lost file" / "model.safetensors"), "gone.safetensors")}
    (tmp_path / "lost file" / "model.safetensors.index.json").write_text(json.dumps(index))
    expected = {
        "lacks a layer's": "holds no weight 'model.layers.2.mlp.down_proj.weight': the files are those of another",
        "lacks a norm": "holds no weight 'model.norm.weight'",
        "other shape": "mlp.gate_proj.weight has shape (48, 32), the config asks for (50, 32)",
        "other head": "model.embed_tokens.weight has shape (400, 32), the config asks for (401, 32)",
        "no safetensors": "holds no safetensors files, and only these can be read in parts",
        "damaged": "",
        "lost file": "",
    }
    for found in together(2, refuse, str(tmp_path)):
        for name, message in expected.items():
            for how in (name, f"{name}, by name") if message else (f"{name}, by name",):
                kind, told = found[how]
                assert kind == "ModelUnavailableError", (how, told)
                assert message in told
                assert str(tmp_path / name) in told
        assert found["after"] == [0, 1]


# ---- the model of a stream -------------------------------------------------------------------------------------------


def load_by_name(ranks: Ranks, folder: str) -> Found:
    """As a stream loads: from a folder, and a model that is in memory already; then commits."""
    found: Found = {"differ": [], "written": []}
    mesh = mesh_of(ranks)
    reference = whole_adapter(Path(folder))
    in_memory = AutoModelForCausalLM.from_pretrained(folder)
    for language_model in (LanguageModel(folder), LanguageModel.of(in_memory, tiny_tokenizer())):
        model, tokenizer = language_model.load((mesh, CPU))
        assert tokenizer("Rome")["input_ids"] == tiny_tokenizer()("Rome")["input_ids"]
        adapter = ModelAdapter(model)
        adapter.ranks = replace(ranks, lockstep=True)
        found["differ"] += same_weights(reference.model, model)
        ledger = EditLedger(adapter, (1, 2))
        assert all(not is_sharded(weight) for weight in ledger.base.values())
        delta = torch.linspace(-1, 1, 32 * 48, dtype=torch.float64).view(32, 48)
        for layer in (1, 2):  # what the leader has computed is written
            own = delta * layer + (0.5 if not ranks.leads else 0.0)
            ledger.commit([LayerUpdate(layer, ledger.names[layer], own)], [])
            wanted = (reference.weight(layer).double() + delta * layer).float()
            found["written"].append(torch.equal(adapter.weight(layer), wanted))
        ids, mask = batch("right")
        with torch.no_grad():
            view = reference.with_weights({ledger.names[layer]: adapter.weight(layer) for layer in (1, 2)})
            found["written"].append(
                torch.allclose(adapter.last_hidden(ids, mask), view.last_hidden(ids, mask), atol=1e-5)
            )
            original = ledger.original().last_hidden(ids, mask)
            found["written"].append(torch.allclose(original, reference.last_hidden(ids, mask), atol=1e-5))
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_a_stream_loads_and_writes_its_part(size: int, tmp_path: Path) -> None:
    folder = save_model("llama", torch.float32, tmp_path / "model")
    for found in together(size, load_by_name, str(folder)):
        assert found == {"differ": [], "written": [True] * 8}


# ---- in one process --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("rows", [0, 1, 2, 4, 5, 7, 16])
def test_own_parts_are_what_torch_cuts(rows: int, dim: int, ranks: int) -> None:
    value = torch.arange(rows * 3).view(rows, 3)
    value = value.T if dim else value
    parts = [own_part(value, dim, ranks, rank) for rank in range(ranks)]
    assert torch.equal(torch.cat(parts, dim), value)
    chunks = value.chunk(ranks, dim) if rows else ()
    for rank, part in enumerate(parts):
        expected = chunks[rank] if rank < len(chunks) else value.narrow(dim, 0, 0)
        assert torch.equal(part, expected)
