"""The testbed's decoder: tokens, training, and the cache."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_edit.beliefs.corpus import CorpusConfig
from lit_edit.beliefs.model import DecoderTraining, DocumentData, Testbed, TrainingConfig, make_tokenizer, padded
from lit_edit.beliefs.world import WorldConfig, generate_world
from lit_edit.metrics.scoring import score_continuations
from lit_edit.models import ModelAdapter
from lit_edit.tokens import check_tokenizer, continuation, locate

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
    assert [path.name for path in made.folder.parent.iterdir()] == [made.folder.name]
    record = json.loads((made.folder / "beliefs.json").read_text())
    assert record["settings"] == json.loads(json.dumps(testbed.settings))
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


def test_a_training_that_was_cut_goes_on(testbed: Testbed, own_cache: Path) -> None:
    with pytest.raises(TimeoutError, match=r"the training is at step \d+ with an accuracy of .* goes on"):
        testbed.train(max_minutes=1e-9)
    partial = testbed.folder.with_name(f"{testbed.folder.name}.partial")
    assert testbed.trained() is None
    done = testbed.train()
    assert done.steps == 12
    assert not partial.exists()


def test_settings_are_checked() -> None:
    for settings, said in (
        ({"preset": "huge"}, "preset must be one of base, small, tiny, micro"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"target": 1.5}, "target must be above 0"),
        ({"settle": 0}, "settle must be at least 1"),
    ):
        with pytest.raises(ValueError, match=said):
            TrainingConfig(**settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="single must be from 0 to 3"):
        WorldConfig(whole=2, single=4)
    with pytest.raises(ValueError, match="samples must be at least 1"):
        CorpusConfig(samples=0)
