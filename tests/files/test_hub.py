"""What is asked of a hub that does not answer: nothing, beyond once."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from huggingface_hub import constants

from lit_edit.data.sources import load_requests
from lit_edit.errors import UserError
from lit_edit.files.hub import reaching_hub
from lit_edit.models.encoder import SentenceEncoder
from lit_edit.models.known import find_architecture
from lit_edit.models.language_model import LanguageModel
from lit_edit.stats.corpus import open_corpus


@pytest.fixture(autouse=True)
def _nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.parametrize(
    "ask",
    [
        LanguageModel("nobody/nothing").load,
        lambda: find_architecture(LanguageModel("nobody/nothing")),
        lambda: SentenceEncoder.load("nobody/nothing"),
        lambda: load_requests("hub", "nobody/nothing"),
        lambda: open_corpus("nobody/nothing", 0),
    ],
)
def test_a_hub_that_does_not_answer_is_said_at_once(ask: Callable[[], object]) -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match="not in the hub's cache, and the hub cannot be reached") as error:
        ask()
    assert time.monotonic() - start < 10
    assert "\n" not in str(error.value)


def test_the_setting_comes_back() -> None:
    with reaching_hub():
        assert constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE
