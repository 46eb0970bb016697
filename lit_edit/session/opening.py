"""Opening a session on a model, whatever it is called, and editing in one call."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_edit.editors.base import Editor
from lit_edit.editors.closed_form.d4s import D4S
from lit_edit.errors import ArgumentError, check_one_of, did_you_mean
from lit_edit.files.changes import refuse_changes
from lit_edit.ledger.ownership import Changed, WeightsChangedError, owner_of, put_right
from lit_edit.models.language_model import LanguageModel
from lit_edit.session.changing import Outcome, Requests
from lit_edit.session.described import describe
from lit_edit.session.session import Session
from lit_edit.stats.second_moment import DEFAULT_STATISTICS, KeyStatistics
from lit_edit.stream.conflicts import ConflictPolicy
from lit_edit.stream.session import RefusalPolicy

if TYPE_CHECKING:
    from typing import Any

Model = PreTrainedModel | LanguageModel | str
Method = Editor | type[Editor] | str


def open(
    model: Model,
    tokenizer: PreTrainedTokenizerBase | None = None,
    editor: Method | None = None,
    statistics: KeyStatistics | None = None,
    *,
    on_conflict: ConflictPolicy | None = None,
    on_refused: RefusalPolicy | None = None,
    changed: Changed = "refuse",
    progress: bool = True,
) -> Session:
    """Open a session on a model: the one that it has, if it was opened or edited before.

    Args:
        model: A causal language model, or what it is called: a packaged model, a local folder, or a hub id.
        tokenizer: Its (fast) tokenizer; of a model given by name it is loaded too.
        editor: The method: an editor, its class, or its name (``lit-edit editors`` lists them). By default the one that
            the session has, or D4S.
        statistics: Where the second moments of the keys come from; by default text that the model samples, counted
            when the first edit is made and kept in the cache that the command line uses as well.
        on_conflict: What to do about an edit of a fact that an earlier one is of: ``replace`` (the default),
            ``average``, or ``refuse``.
        on_refused: What to do about an edit that must not be written: ``stop`` (the default) or ``skip``.
        changed: What to do about a model whose weights are not what its ledger left, or that was loaded edited:
            ``refuse`` it, ``adopt`` the weights as the original ones, or ``restore`` what the ledger left.
        progress: Show bars.

    Raises:
        ArgumentError: If an argument is not what it should be, or the model is being edited with other settings.
        WeightsChangedError: If the weights are not those that the ledger left.
    """
    check_one_of(("refuse", "adopt", "restore"), changed=changed)
    check_one_of(("replace", "average", "refuse"), on_conflict=on_conflict or "replace")
    check_one_of(("stop", "skip"), on_refused=on_refused or "stop")
    method = None if editor is None else editor_of(editor)
    if statistics is not None and not isinstance(statistics, KeyStatistics):
        raise ArgumentError(f"statistics must be lit_edit.KeyStatistics, got {type(statistics).__name__}")
    language_model, loaded, tokenizer = _loaded(model, tokenizer)
    session = _session_of(loaded, changed)
    if session is None:
        return Session(
            loaded,
            tokenizer,
            D4S() if method is None else method,
            DEFAULT_STATISTICS if statistics is None else statistics,
            language_model,
            on_conflict or "replace",
            on_refused or "stop",
            progress,
            adopt=changed == "adopt",
        )
    if method is not None and method is not session.editor:
        _check_same(session, method)
    if statistics not in (None, session.statistics):
        raise ArgumentError(
            f"this model is edited with {session.statistics}, got {statistics}: leave statistics out to go on"
        )
    session.on_conflict, session.on_refused = on_conflict or session.on_conflict, on_refused or session.on_refused
    session.progress = progress
    return session


def edit(
    model: Model,
    tokenizer: PreTrainedTokenizerBase | None,
    requests: Requests,
    editor: Method | None = None,
    statistics: KeyStatistics | None = None,
    window: int = 16,
    on_conflict: ConflictPolicy | None = None,
    *,
    changed: Changed = "refuse",
    progress: bool = True,
) -> tuple[PreTrainedModel, Outcome]:
    """Edit facts in a model, in place, one after another: :func:`open` and :meth:`Session.edit` in one call.

    A second call with the same model goes on in the same session: numbers, conflicts, undo and redo are of all edits.

    Args:
        model: As of :func:`open`, and the other arguments too.
        tokenizer: Its (fast) tokenizer; ``None`` for a model given by name.
        requests: The facts: requests, or mappings with ``prompt``, ``subject`` and ``target_new``.
        editor: The method.
        statistics: Where the second moments of the keys come from.
        window: Facts whose targets are fitted together.
        on_conflict: What to do about a request of a fact that an earlier one is of.
        changed: What to do about a model that is not as its ledger left it.
        progress: Show bars.

    Returns:
        The same model, edited, and what was done. Editors that keep their edits beside the weights (GRACE, WISE, IKE,
        SERAC) leave the model as it was: ``with outcome.ledger.adapter.patched(): model(...)`` computes with the edits
        of the first two.

    Raises:
        DataError: If a request is broken; names its number. On any error the model is as it was.
        ArgumentError: If ``window`` is below 1, or as of :func:`open`.
        WeightsChangedError: If the weights are not those that the ledger left.
    """
    session = open(model, tokenizer, editor, statistics, on_conflict=on_conflict, changed=changed, progress=progress)
    return session.model, session.edit(requests, window)


def editor_of(method: Method) -> Editor:
    """Return the editor that is meant: by itself, its class, or its name, in whatever case.

    Example:
        >>> type(editor_of("memit")).__name__
        'MEMIT'
    """
    if isinstance(method, Editor):
        return method
    editors = import_module("lit_edit.editors")
    kinds = {name: kind for name in editors.__all__ if _is_editor(kind := getattr(editors, name))}
    if isinstance(method, str):
        by_case = {name.casefold(): name for name in kinds}
        found = by_case.get(method.casefold().replace("-", "").replace("_", ""))
        if found is None:
            meant = did_you_mean(method, kinds) or "."
            raise ArgumentError(f"there is no editor {method!r}{meant} There are {', '.join(kinds)}")
        method = kinds[found]
    if not _is_editor(method):
        raise ArgumentError(f"editor must be an editor, its class or its name, got {method!r}")
    try:
        return method()
    except TypeError as error:
        raise ArgumentError(f"{method.__name__} needs settings of its own: {error}; give an object of it") from error


def _is_editor(kind: Any) -> TypeGuard[type[Editor]]:
    return inspect.isclass(kind) and issubclass(kind, Editor) and hasattr(kind, "about")


def _loaded(
    model: Model, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[LanguageModel, PreTrainedModel, PreTrainedTokenizerBase]:
    """Return what a model is called, the model, and its tokenizer."""
    if isinstance(model, (str, Path)):
        model = LanguageModel(str(model))
    if isinstance(model, LanguageModel):
        loaded, own = model.load()
        return model, loaded, own if tokenizer is None else tokenizer
    if not isinstance(model, PreTrainedModel):
        raise ArgumentError(f"model must be a transformers model or the name of one, got {type(model).__name__}")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ArgumentError(f"a model that is loaded needs its tokenizer beside it, got {type(tokenizer).__name__}")
    return LanguageModel.of(model, tokenizer), model, tokenizer


def _session_of(model: PreTrainedModel, changed: Changed) -> Session | None:
    """Return the session that a model has, with its weights as its ledger left them, or as is wanted otherwise."""
    owner = owner_of(model)
    if owner is None or owner.ledger is None:
        return None
    if not isinstance(owner.holder, Session):
        if changed == "restore":
            put_right(model)
        return None
    session = owner.holder
    try:
        session.ledger.verify(thorough=True)
    except WeightsChangedError:
        if changed == "refuse":
            raise
        session.adopt() if changed == "adopt" else session.restore()
    return session


def _check_same(session: Session, method: Editor) -> None:
    """Raise :class:`ArgumentError` unless an editor would go on as the session's does."""
    then, now = describe(session.editor), describe(method)
    if then == now:
        return
    if not session.ledger.made:
        session.use(method)
        return
    old, new = ({"editor": found["class_path"].rpartition(".")[2], **found["init_args"]} for found in (then, now))
    cure = "leave editor out to go on with those, or take the edits out first (session.reset())"
    refuse_changes("this model is being edited", old, new, cure)
