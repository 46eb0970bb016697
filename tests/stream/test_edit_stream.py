"""EditStream under Lightning: counting, checkpoints, resume, refusal."""

from __future__ import annotations

import csv
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lit_edit.callbacks import LayerNorms, Retention
from torch.utils.data import DataLoader

from lit_edit import EditStream, LanguageModel
from lit_edit.editors import ROME, Proposal
from lit_edit.errors import ArgumentError
from lit_edit.files.trees import load_tree
from lit_edit.ledger.edit_ledger import EditRefusedError, LayerUpdate
from lit_edit.testing import tiny_model, tiny_tokenizer
from tests.streams import FixedStatistics, make_data, make_stream, make_trainer, state_of


class StopAfter(Callback):
    """Ends a run as if the process had died after so many commits."""

    def __init__(self, edits: int) -> None:
        self.edits = edits

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if len(pl_module.ledger) == self.edits:
            raise RuntimeError("power cut")


def checkpoint(folder: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder / "checkpoints", **{"every_n_train_steps": 1, "save_top_k": -1, **options})


def read_metrics(folder: Path) -> list[dict[str, str]]:
    """All rows without the times, which no two runs share."""
    with (folder / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in csv.DictReader(file)]


def fit(folder: Path, stream: EditStream | None = None, **options: Any) -> EditStream:
    stream = stream or make_stream()
    trainer = make_trainer(folder, options.pop("callbacks", None), **options)
    trainer.fit(stream, make_data())
    return stream


def test_global_step_counts_commits(tmp_path: Path) -> None:
    stream = fit(tmp_path)
    assert stream.trainer.global_step == len(stream.ledger) == 6


def test_a_step_of_several_edits_is_one_commit(tmp_path: Path) -> None:
    stream, trainer = make_stream(), make_trainer(tmp_path)
    trainer.fit(stream, make_data(batch_size=4))
    assert trainer.global_step == 2
    assert [entry.id for entry in stream.ledger.entries] == list("012345")


@pytest.mark.parametrize("window", [1, 3, 6])
def test_the_window_does_not_change_the_result(tmp_path: Path, window: int) -> None:
    streams = []
    for size in (2, window):
        stream = make_stream()
        make_trainer(tmp_path / str(len(streams))).fit(stream, make_data(target_window=size))
        streams.append(stream)
    for name, delta in streams[0].ledger.deltas.items():
        # Other batches, other rounding of float32 targets: about 1e-6, amplified by Adam.
        torch.testing.assert_close(delta, streams[1].ledger.deltas[name], rtol=1e-3, atol=1e-4)


def test_weights_are_edited_and_nothing_else(tmp_path: Path) -> None:
    stream = make_stream()
    before = {name: value.clone() for name, value in stream.language_model.load()[0].state_dict().items()}
    fit(tmp_path, stream)
    changed = {name for name, value in stream.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(stream.ledger.names.values())


def test_model_checkpoint_writes_what_it_should(tmp_path: Path) -> None:
    fit(tmp_path, callbacks=[checkpoint(tmp_path, every_n_train_steps=2)])
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        f"epoch=0-step={step}.ckpt" for step in (2, 4, 6)
    ]


def test_checkpoints_hold_tensors_and_primitives_and_no_model(tmp_path: Path) -> None:
    stream = fit(tmp_path, callbacks=[checkpoint(tmp_path, every_n_train_steps=6)])
    (path,) = (tmp_path / "checkpoints").iterdir()
    saved = load_tree(path)
    assert saved["state_dict"] == {}
    assert set(saved["lit_edit"]["ledger"]["deltas"]) == set(stream.ledger.names.values())


@pytest.mark.parametrize("cut", range(1, 6))
def test_a_cut_run_resumes_as_if_nothing_had_happened(tmp_path: Path, cut: int) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def callbacks(folder: Path) -> list[Any]:
        return [LayerNorms(), Retention(every=2, sample=2), checkpoint(folder)]

    expected = fit(whole, callbacks=callbacks(whole))
    with pytest.raises(RuntimeError, match="power cut"):
        fit(broken, callbacks=[*callbacks(broken), StopAfter(cut + 1)])
    path = broken / "checkpoints" / f"epoch=0-step={cut}.ckpt"
    resumed = make_stream()
    trainer = make_trainer(broken, callbacks(broken))
    trainer.fit(resumed, make_data(), ckpt_path=str(path), weights_only=True)

    assert trainer.global_step == 6
    left, right = state_of(expected), state_of(resumed)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert resumed.results == expected.results
    assert resumed.ledger.entries == expected.ledger.entries
    one, other = expected.summary(), resumed.summary()
    assert {k: v for k, v in one.items() if k != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}
    assert read_metrics(broken) == read_metrics(whole)


@pytest.mark.parametrize("when", ["before the commit", "after the commit"])
def test_a_run_cut_inside_a_step_resumes_as_if_nothing_had_happened(tmp_path: Path, when: str) -> None:
    class Cut(EditStream):
        def apply_edit(self, proposal: Proposal) -> None:
            fourth = proposal.requests[0].id == "3"
            if fourth and when == "before the commit":
                raise RuntimeError("power cut")
            super().apply_edit(proposal)
            if fourth:
                raise RuntimeError("power cut")

    expected = fit(tmp_path / "whole")
    base, folder = make_stream(), tmp_path / "broken"
    with pytest.raises(RuntimeError, match="power cut"):
        fit(
            folder,
            Cut(base.language_model, base.editor, base.statistics),
            callbacks=[checkpoint(folder, every_n_train_steps=100, save_last=True, save_on_exception=True)],
        )
    resumed = make_stream()
    trainer = make_trainer(folder)
    trainer.fit(resumed, make_data(), ckpt_path=str(folder / "checkpoints" / "last.ckpt"), weights_only=True)
    assert [entry.id for entry in resumed.ledger.entries] == list("012345")
    assert trainer.global_step == 6
    left, right = state_of(expected), state_of(resumed)
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert resumed.results == expected.results


def test_resuming_a_finished_run_measures_and_edits_nothing(tmp_path: Path) -> None:
    expected = fit(tmp_path, callbacks=[checkpoint(tmp_path, every_n_train_steps=6)])
    (path,) = (tmp_path / "checkpoints").iterdir()
    again = make_stream()
    trainer = make_trainer(tmp_path / "again")
    trainer.fit(again, make_data(), ckpt_path=str(path), weights_only=True)
    assert len(again.ledger) == 6
    assert again.finish()["final"] == expected.finish()["final"]


def test_a_failing_edit_leaves_the_last_commit(tmp_path: Path) -> None:
    class Failing(EditStream):
        def apply_edit(self, proposal: Proposal) -> None:
            if len(self.ledger) == 3:
                bad = LayerUpdate(1, self.ledger.names[1], torch.full_like(proposal.updates[0].delta, torch.nan))
                proposal = Proposal(proposal.requests, (bad, *proposal.updates[1:]), proposal.entries, proposal.pending)
            super().apply_edit(proposal)

    base = make_stream()
    stream = Failing(base.language_model, base.editor, base.statistics)
    with pytest.raises(EditRefusedError, match=r"edit '3' would write NaN"):
        fit(tmp_path, stream)
    assert len(stream.ledger) == 3
    for layer in stream.ledger.layers:
        solver = stream.editor.solvers[layer]
        assert solver.blocks == 3
        assert torch.equal(stream.adapter.weight(layer), stream.ledger.edited_weight(layer, solver.delta))


def test_order_of_calls(tmp_path: Path) -> None:
    calls: list[str] = []

    class Recording(EditStream):
        def configure_model(self) -> None:
            calls.append("configure_model")
            super().configure_model()

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            calls.append("load")
            super().on_load_checkpoint(checkpoint)

        def on_fit_start(self) -> None:
            calls.append("fit_start")
            super().on_fit_start()

        def on_train_start(self) -> None:
            calls.append("train_start")
            super().on_train_start()

        def apply_edit(self, proposal: Proposal) -> None:
            calls.append(f"commit {proposal.requests[0].id}")
            super().apply_edit(proposal)

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            calls.append(f"save {len(self.ledger)}")
            super().on_save_checkpoint(checkpoint)

    def recording() -> EditStream:
        base = make_stream()
        return Recording(base.language_model, base.editor, base.statistics)

    trainer = make_trainer(tmp_path, [checkpoint(tmp_path)])
    trainer.fit(recording(), make_data(2))
    assert calls == ["configure_model", "fit_start", "train_start", "commit 0", "save 1", "commit 1", "save 2"]
    calls.clear()
    path = tmp_path / "checkpoints" / "epoch=0-step=1.ckpt"
    make_trainer(tmp_path).fit(recording(), make_data(2), ckpt_path=str(path), weights_only=True)
    assert calls == ["configure_model", "load", "configure_model", "fit_start", "train_start", "commit 1"]


@pytest.mark.parametrize("command", ["validate", "test"])
def test_measuring_does_not_edit(tmp_path: Path, command: str) -> None:
    stream = fit(tmp_path, callbacks=[checkpoint(tmp_path, every_n_train_steps=6)])
    (path,) = (tmp_path / "checkpoints").iterdir()
    fresh = make_stream()
    trainer = make_trainer(tmp_path / "measured")
    (measured,) = getattr(trainer, command)(fresh, make_data(), ckpt_path=str(path), weights_only=True)
    final = stream.finish()["final"]
    assert measured[f"{command}/efficacy/success"] == pytest.approx(final["efficacy"]["success"])
    assert measured[f"{command}/locality/agreement"] == pytest.approx(final["locality"]["agreement"])
    assert measured[f"{command}/perplexity"] == pytest.approx(final["perplexity"], rel=1e-6)
    assert len(fresh.ledger) == 6
    assert trainer.global_step == 0


def test_measuring_the_unedited_model(tmp_path: Path) -> None:
    stream = make_stream()
    (measured,) = make_trainer(tmp_path).validate(stream, make_data())
    assert measured["validate/locality/agreement"] == 1.0
    assert len(stream.ledger) == 0


def test_two_streams_do_not_know_of_each_other(tmp_path: Path) -> None:
    alone = state_of(fit(tmp_path / "a"))
    fit(tmp_path / "b", make_stream(covariance_weight=0.5))
    again = state_of(fit(tmp_path / "c"))
    assert [name for name in alone if not torch.equal(alone[name], again[name])] == []


def test_stopping_early_measures_what_was_edited(tmp_path: Path) -> None:
    stream = fit(tmp_path, max_steps=2)
    assert stream.finish()["edits"] == 2
    assert set(stream.results["final"]) == {"0", "1"}


def test_more_than_one_epoch_is_one_pass(tmp_path: Path) -> None:
    assert len(fit(tmp_path, max_epochs=3).ledger) == 6


def test_bf16_true_keeps_statistics_in_float64(tmp_path: Path) -> None:
    stream = fit(tmp_path, precision="bf16-true")
    for layer in stream.ledger.layers:
        solver = stream.editor.solvers[layer]
        assert {solver.gram.dtype, solver.inverse.dtype, solver.delta.dtype} == {torch.float64}
        weight = stream.adapter.weight(layer)
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, stream.ledger.edited_weight(layer, solver.delta))


def test_mixed_half_precision_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer._accelerator_connector.precision_plugin.precision = "16-mixed"  # the CPU has no such plugin
    with pytest.raises(MisconfigurationException, match="16-mixed"):
        trainer.fit(make_stream(), make_data())


def test_ordinary_loaders_are_refused(tmp_path: Path) -> None:
    loader = DataLoader([0, 1], collate_fn=list)
    with pytest.raises(MisconfigurationException, match="an ordinary DataLoader cannot resume"):
        make_trainer(tmp_path).fit(make_stream(), loader)


def test_another_stream_is_refused_on_resume(tmp_path: Path) -> None:
    fit(tmp_path, callbacks=[checkpoint(tmp_path, every_n_train_steps=2)])
    data = make_data()
    data.requests.reverse()
    with pytest.raises(MisconfigurationException, match=r"the checkpoint's edit 1 is '0', the stream's is '5'"):
        make_trainer(tmp_path).fit(
            make_stream(),
            data,
            ckpt_path=str(tmp_path / "checkpoints" / "epoch=0-step=2.ckpt"),
            weights_only=True,
        )


def test_other_base_weights_are_refused_on_resume(tmp_path: Path) -> None:
    fit(tmp_path, callbacks=[checkpoint(tmp_path, every_n_train_steps=6)])
    (path,) = (tmp_path / "checkpoints").iterdir()
    other = make_stream()
    other.language_model.load()[0].model.norm.weight.add_(1.0)
    with pytest.raises(ArgumentError, match="other base weights"):
        make_trainer(tmp_path).fit(other, make_data(), ckpt_path=str(path), weights_only=True)


def test_export_before_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="nothing to export yet"):
        make_stream().export(tmp_path / "out")


def saved_state(path: Path) -> dict[str, Any]:
    return load_tree(path)["lit_edit"]


def test_a_resume_that_fails_leaves_the_checkpoint_usable(tmp_path: Path) -> None:
    """Ctrl-C or wrong data before the editor is ready again: the exception checkpoint must not lose its state."""
    options: dict[str, Any] = {"save_on_exception": True, "save_top_k": 1, "enable_version_counter": False}
    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path, callbacks=[StopAfter(3), checkpoint(tmp_path, **options)])
    (path,) = (tmp_path / "checkpoints").glob("*step=3.ckpt")
    before = saved_state(path)

    stream = make_stream()
    stream.editor.prepare = lambda *args: (_ for _ in ()).throw(KeyboardInterrupt)  # type: ignore[method-assign]
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        make_trainer(tmp_path, [checkpoint(tmp_path, **options)]).fit(stream, make_data(), ckpt_path=str(path))
    with pytest.raises(MisconfigurationException, match="resume with the data"):
        make_trainer(tmp_path, [checkpoint(tmp_path, **options)]).fit(
            make_stream(), make_data(offset=1), ckpt_path=str(path)
        )
    after = saved_state(path)
    assert set(after["editor"]["solvers"]) == set(before["editor"]["solvers"]) != set()
    for layer, solver in before["editor"]["solvers"].items():
        assert torch.equal(after["editor"]["solvers"][layer]["keys"], solver["keys"])

    resumed = make_stream()
    make_trainer(tmp_path).fit(resumed, make_data(), ckpt_path=str(path))
    whole = fit(tmp_path / "whole")
    for name, delta in whole.ledger.deltas.items():
        assert torch.equal(delta, resumed.ledger.deltas[name])


def test_a_finished_stream_with_other_data_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, callbacks=[checkpoint(tmp_path)])
    (path,) = (tmp_path / "checkpoints").glob("*step=6.ckpt")
    with pytest.raises(MisconfigurationException, match="resume with the data"):
        make_trainer(tmp_path).fit(make_stream(), make_data(offset=1), ckpt_path=str(path))


def test_fitting_again_goes_on(tmp_path: Path) -> None:
    stream = make_stream()
    make_trainer(tmp_path / "a").fit(stream, make_data(limit=2, target_window=2))
    make_trainer(tmp_path / "b").fit(stream, make_data(target_window=2))
    whole = make_stream()
    make_trainer(tmp_path / "c").fit(whole, make_data(target_window=2))
    for name, delta in whole.ledger.deltas.items():
        assert torch.equal(delta, stream.ledger.deltas[name])
    assert {solver.blocks for solver in stream.editor.solvers.values()} == {6}


def test_an_interrupt_waits_until_an_edit_is_whole(tmp_path: Path) -> None:
    stream = make_stream()
    accept = stream.editor.accept

    def interrupted(proposal: Proposal) -> None:
        if len(stream.ledger) == 3:
            signal.raise_signal(signal.SIGINT)
        accept(proposal)

    stream.editor.accept = interrupted  # type: ignore[method-assign]
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        make_trainer(tmp_path).fit(stream, make_data())
    assert len(stream.ledger) == 3
    assert {solver.blocks for solver in stream.editor.solvers.values()} == {3}


class Refuses(EditStream):
    def apply_edit(self, proposal: Proposal) -> None:
        if proposal.requests[0].id != "1":
            super().apply_edit(proposal)


def test_a_run_that_refuses_an_edit_can_be_resumed(tmp_path: Path) -> None:
    whole = make_stream(kind=Refuses)
    make_trainer(tmp_path / "whole").fit(whole, make_data())
    assert [entry.id for entry in whole.ledger.entries] == list("02345")
    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path, make_stream(kind=Refuses), callbacks=[StopAfter(3), checkpoint(tmp_path)])
    (path,) = (tmp_path / "checkpoints").glob("*step=2.ckpt")
    resumed = make_stream(kind=Refuses)
    make_trainer(tmp_path / "b").fit(resumed, make_data(), ckpt_path=str(path))
    assert [entry.id for entry in resumed.ledger.entries] == list("02345")
    for name, delta in whole.ledger.deltas.items():
        assert torch.equal(delta, resumed.ledger.deltas[name])


def test_a_method_for_single_edits_refuses_larger_steps(tmp_path: Path) -> None:
    language_model = LanguageModel.of(tiny_model(), tiny_tokenizer())
    stream = EditStream(language_model, ROME(layers=[1]), FixedStatistics())
    with pytest.raises(MisconfigurationException, match=r"ROME makes one edit at a time, got data.batch_size=2"):
        make_trainer(tmp_path).fit(stream, make_data(batch_size=2))
    assert stream.edits_made == 0
