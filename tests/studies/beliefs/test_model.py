"""The testbed's decoder: tokens, training, and the cache."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_edit.errors import ArgumentError
from lit_edit.metrics.scoring import score_continuations
from lit_edit.models import ModelAdapter
from lit_edit.studies.beliefs.corpus import CorpusConfig
from lit_edit.studies.beliefs.decoder import DecoderTraining, TrainingConfig
from lit_edit.studies.beliefs.documents import DocumentData, make_tokenizer, padded
from lit_edit.studies.beliefs.testbed import Testbed
from lit_edit.studies.beliefs.world import WorldConfig, generate_world
from lit_edit.text.tokens import check_tokenizer, continuation, locate

TRAINING = TrainingConfig(preset="micro", lr=1e-2, warm_up=1, batch_size=8, max_steps=12, check_every=4, target=1.0)


@pytest.fixture(scope="module")
def testbed() -> Testbed:
    """Eight facts, of which a model of two layers can learn something in a second."""
    world = generate_world(WorldConfig(subjects=2, pairs=2, whole=2, single=0))
    return Testbed(world, CorpusConfig(samples=4, shuffles=2), TRAINING)


def test_words_are_tokens_with_places_in_the_text() -> None:
    tokenizer = make_tokenizer(["Ada was born in St. Louis .", "Bo speaks Dutch is true ."])
    check_tokenizer(tokenizer)
    located = locate(tokenizer, "Ada was born in", (0, 3))
    assert tokenizer.convert_ids_to_tokens(located.ids) == ["<s>", "Ada", "was", "born", "in"]
    assert located.lookup == 1
    prompt, target = continuation(tokenizer, "Ada was born in", "St. Louis")
    assert tokenizer.convert_ids_to_tokens(target) == ["St", ".", "Louis"]
    assert (len(prompt), tokenizer.pad_token_id, tokenizer.eos_token_id) == (5, 0, 2)
    assert tokenizer.convert_ids_to_tokens(tokenizer("nobody or and")["input_ids"]) == ["<s>", "<unk>", "or", "and"]


def test_validation_is_exact_match_of_objects() -> None:
    tokenizer = make_tokenizer(["a b c d e"])
    data = DocumentData(["a b"], [("a", "b c"), ("a", "b d"), ("d", "e")], tokenizer)
    module = DecoderTraining(TRAINING, len(tokenizer))
    ids, starts = next(iter(data.val_dataloader()))
    assert starts.tolist() == [2, 2, 2]
    following = {"a": "b", "b": "c", "d": "e"}  # a model that knows nothing else

    def logits(ids: torch.Tensor) -> torch.Tensor:
        words = [[following.get(word, "a") for word in tokenizer.convert_ids_to_tokens(row)] for row in ids]
        said = torch.tensor([tokenizer.convert_tokens_to_ids(row) for row in words])
        return torch.nn.functional.one_hot(said, len(tokenizer)).float()

    module.logits = logits  # type: ignore[method-assign]
    module.validation_step((ids, starts), 0)
    assert module.hits[0].tolist() == [True, False, True]
    assert padded([[5, 6], [7]]).tolist() == [[5, 6], [7, 0]]


def test_a_model_is_trained_kept_and_found_again(testbed: Testbed, own_cache: Path) -> None:
    assert testbed.trained() is None
    torch.manual_seed(3)
    made = testbed.train()
    assert torch.initial_seed() == 3  # the global random state is no business of a training's
    assert made.folder.parent == own_cache / "beliefs"
    assert (made.steps, made.cached) == (12, False)
    assert {path.name for path in made.folder.parent.iterdir()} == {made.folder.name, f".{made.folder.name}.lock"}
    record = json.loads((made.folder / "beliefs.json").read_text())
    assert record["settings"] == json.loads(json.dumps(testbed.settings))
    assert [point["step"] for point in record["course"]] == [4, 8, 12]
    assert record["course"][-1]["accuracy"] == pytest.approx(made.accuracy)
    assert 0 < record["course"][-1]["cpu"] < made.cpu + 0.1  # it is rounded
    assert not list(made.folder.glob("*.bin"))
    model = AutoModelForCausalLM.from_pretrained(made.folder)
    tokenizer = AutoTokenizer.from_pretrained(made.folder)
    before = DecoderTraining(TRAINING, len(tokenizer))
    before.configure_model()
    assert before.model is not None
    documents = (made.folder / "corpus.txt").read_text().splitlines()
    rows = padded(DocumentData(documents, [], tokenizer).rows)
    labels = rows.masked_fill(rows == 0, -100)
    with torch.no_grad():
        losses = [float(m(input_ids=rows, labels=labels).loss) for m in (before.model, model)]
    assert losses[1] < 0.75 * losses[0]
    # the accuracy on record is that of the model in the folder
    facts = [(f"{s} {r}", testbed.world.true_object((s, r))) for s, r in testbed.world.facts]
    said = [bool(score.hits.all()) for score in score_continuations(ModelAdapter(model.eval()), tokenizer, facts)]
    assert sum(said) / len(said) == pytest.approx(made.accuracy)

    found = testbed.train()
    assert found == replace(made, cached=True)
    assert replace(testbed, training=replace(TRAINING, seed=1)).folder != made.folder
    assert replace(testbed, corpus=CorpusConfig(samples=5, shuffles=2)).folder != made.folder


def test_a_training_that_was_cut_goes_on(testbed: Testbed, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    testbed = replace(testbed, training=replace(TRAINING, seed=5))
    steps: list[int] = []
    step = DecoderTraining.training_step

    def cut(self: DecoderTraining, batch: torch.Tensor, index: int) -> torch.Tensor:
        steps.append(self.global_step)
        if len(steps) == 7:
            raise OSError("no more power")
        return step(self, batch, index)

    monkeypatch.setattr(DecoderTraining, "training_step", cut)
    with pytest.raises(OSError, match="no more power"):
        testbed.train()
    partial = testbed.folder.with_name(f"{testbed.folder.name}.partial")
    assert testbed.trained() is None
    assert [path.name for path in partial.iterdir()] == ["newest.ckpt"]
    for _ in range(2):  # each of them goes on, although the one before has used up as many minutes
        with pytest.raises(TimeoutError, match=r"the training is at step \d+ with an accuracy of .* goes on"):
            testbed.train(max_minutes=1e-9)
    assert steps[:8] == [0, 1, 2, 3, 4, 5, 6, 4]  # from the last measurement on
    assert steps[8:] == [5]
    with (
        FileLock(testbed.folder.with_name(f".{testbed.folder.name}.lock")),
        pytest.raises(ArgumentError, match="another process is training this model"),
    ):
        testbed.train()
    done = testbed.train()
    assert done.steps == 12
    course = json.loads((done.folder / "beliefs.json").read_text())["course"]
    assert [point["step"] for point in course] == [4, 5, 6, 8, 12]  # also where the minutes were over
    assert not partial.exists()


def test_sentences_come_alone_first_and_then_in_documents() -> None:
    tokenizer = make_tokenizer(["a b . c d ."])
    data = DocumentData(["a b . c d ."] * 3, [], tokenizer, 2, sentences=["a b .", "c d ."] * 4, sentence_batch=4)
    module = DecoderTraining(replace(TRAINING, alone=0.5), len(tokenizer))
    data.trainer = SimpleNamespace(current_epoch=0, lightning_module=module)  # type: ignore[assignment]

    def shapes() -> list[tuple[int, ...]]:
        return [tuple(batch.shape) for batch in data.train_dataloader()]

    assert shapes() == [(4, 5), (4, 5)]
    first = next(iter(data.train_dataloader()))
    data.trainer.current_epoch = 1  # type: ignore[union-attr, misc]
    assert not torch.equal(next(iter(data.train_dataloader())), first)  # another order in another epoch
    module.accuracy = 0.4
    module.on_train_epoch_end()
    assert not module.together
    module.accuracy = 0.5
    assert shapes() == [(4, 5), (4, 5)]  # an epoch is of one kind to its end
    module.on_train_epoch_end()
    assert shapes() == [(2, 8), (1, 8)]
    module.accuracy = 0.1  # what other texts look like at first
    module.on_train_epoch_end()
    assert module.together

    assert DecoderTraining(replace(TRAINING, alone=0.0), 9).together


def test_the_rate_rises_stays_and_falls_from_the_target_on() -> None:
    module = DecoderTraining(replace(TRAINING, warm_up=4, max_steps=100, settle=20, target=0.9), 9)
    assert [module.rate(step) for step in (0, 1, 3, 50, 80, 90, 100)] == pytest.approx([0.25, 0.5, 1, 1, 1, 0.5, 0])
    module.hits, module.together = [torch.tensor([True])], False
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign, assignment]
    module.on_validation_epoch_end()
    assert module.settling is None  # sentences alone are not what the target is about
    module.together = True
    module.on_validation_epoch_end()
    assert module.settling == 0  # of no trainer, the step is 0
    assert [module.rate(step) for step in (3, 10, 20)] == pytest.approx([0.85, 0.5, 0])
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    again = DecoderTraining(module.config, 9)
    again.on_load_checkpoint(checkpoint)
    assert (again.rate(10), again.together, again.accuracy) == (0.5, True, 1.0)
    short = DecoderTraining(replace(TRAINING, warm_up=1, max_steps=12, settle=200), 9)
    assert [short.rate(step) for step in (0, 6, 9, 12)] == pytest.approx([1, 1, 0.5, 0])  # never more than half of all


def test_subjects_are_loud_in_the_residual_stream() -> None:
    module = DecoderTraining(TRAINING, 500)
    module.configure_model()
    assert module.model is not None
    assert float(module.model.get_input_embeddings().weight.detach().std()) == pytest.approx(1, abs=0.05)


def test_settings_are_checked() -> None:
    for settings, said in (
        ({"preset": "huge"}, "preset must be one of base, small, tiny, micro"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"target": 1.5}, "target must be above 0"),
        ({"settle": 0}, "settle must be at least 1"),
        ({"alone": -0.1}, "alone must be from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=said):
            TrainingConfig(**settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="single must be from 0 to 3"):
        WorldConfig(whole=2, single=4)
    with pytest.raises(ValueError, match="samples must be at least 1"):
        CorpusConfig(samples=0)
