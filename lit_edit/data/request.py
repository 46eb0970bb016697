"""One wanted change of one fact, and the probes that tell whether it took."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lit_edit.errors import UserError, shorten


class DataError(UserError):
    """A record or file that cannot be used; the message names the place and what is wrong."""


@dataclass(frozen=True)
class Probe:
    """A prompt and the answer that is right for it."""

    prompt: str
    answer: str

    def __post_init__(self) -> None:
        for name in ("prompt", "answer"):
            if not getattr(self, name).strip():
                raise DataError(f"a probe's {name} is empty: {shorten(str(self))}")


ADDED_FIELDS = frozenset({"portability", "references", "locality", "target_id"})
"""Fields that only measurements use and that readers of earlier releases did not fill: a journal may lack them."""


@dataclass(frozen=True)
class EditRequest:
    """A fact to write: ``prompt`` about ``subject`` shall be continued with ``target_new``.

    The request knows text only: no tokenizer, no model.

    Args:
        id: Unique within a stream.
        prompt: The prompt with one ``{}`` where the subject stands, for example ``"The capital of {} is"``.
        subject: For example ``"Italy"``.
        target_new: The object to write, without a leading space.
        target_true: The object that holds in the unedited world, if known; success and magnitude need it.
        paraphrases: Other wordings, filled, for generalization.
        neighborhood: Prompts about other subjects with their answers, for locality.
        portability: Prompts that follow from the edit, with answers, by kind.
        generation: Prompts for free generation.
        relation: Name or id of the relation.
        references: Texts about ``target_new`` in this relation, which consistency compares generations with.
        locality: Further prompts that the edit must leave alone, with answers, by kind (KnowEdit, EasyEdit).
        target_id: Id of ``target_new`` where the data has one (Wikidata's, in CounterFact): published references are
            filed under it.
        place: File and line where it stands, if it came from a file; says nothing of the fact itself.

    Raises:
        DataError: If a field is missing or empty, or the subject's place is not given exactly once.

    Example:
        >>> request = EditRequest("1", "The capital of {} is", "Italy", "Vienna", target_true="Rome")
        >>> request.text
        'The capital of Italy is'
        >>> request.text[slice(*request.subject_span)]
        'Italy'
    """

    id: str
    prompt: str
    subject: str
    target_new: str
    target_true: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighborhood: tuple[Probe, ...] = ()
    portability: Mapping[str, tuple[Probe, ...]] = field(default_factory=dict)
    generation: tuple[str, ...] = ()
    relation: str = ""
    references: tuple[str, ...] = ()
    locality: Mapping[str, tuple[Probe, ...]] = field(default_factory=dict)
    target_id: str = ""
    place: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        _check_texts(prompt=self.prompt, subject=self.subject, target_new=self.target_new)
        for name in ("prompt", "subject", "target_new"):
            if not getattr(self, name).strip():
                raise DataError(f"{name} is empty")
        for name, value in ((name, value) for name, value in vars(self).items() if name != "place"):
            if fault := next((fault for text in _texts_in(value) if (fault := find_fault(text))), None):
                raise DataError(f"{name} holds {fault}")
        if self.subject.strip() == "{}":
            raise DataError("the subject is not filled in: it is {}, which stands for it in the prompt")
        if self.prompt.count("{}") != 1:
            raise DataError(
                f"prompt must have exactly one {{}} where the subject stands, got {shorten(self.prompt)!r}; "
                "use EditRequest.from_text for a prompt with the subject written out"
            )
        if self.target_true is not None and not self.target_true.strip():
            raise DataError("target_true is empty; leave it out when it is not known")
        if self.target_true is not None and self.target_true.strip() == self.target_new.strip():
            raise DataError(
                f"target_true and target_new are both {shorten(self.target_new)!r}: there is nothing to edit"
            )

    @classmethod
    def from_text(cls, id: str, prompt: str, subject: str, target_new: str, **optional: Any) -> EditRequest:
        """Make a request from a prompt with the subject written out, or with one ``{}`` in its place.

        A subject that occurs more than once is taken at its last occurrence (whole words before parts of words):
        the model has read most about it there.

        Raises:
            DataError: If the prompt does not contain the subject.

        Example:
            >>> EditRequest.from_text("1", "Ada is in Canada; Ada speaks", "Ada", "Greek").prompt
            'Ada is in Canada; {} speaks'
        """
        _check_texts(prompt=prompt, subject=subject, target_new=target_new)
        prompt, subject, target_new = prompt.strip(), subject.strip(), target_new.strip()
        if not subject:
            raise DataError("subject is empty")
        if prompt.count("{}") != 1:
            start = find_subject(prompt, subject)
            if start is None:
                raise DataError(f"the subject {shorten(subject)!r} does not occur in the prompt {shorten(prompt)!r}")
            # Other braces in the text would be taken for the subject's place.
            before, after = prompt[:start].replace("{}", ""), prompt[start + len(subject) :].replace("{}", "")
            prompt = f"{before}{{}}{after}"
        return cls(id=id, prompt=prompt, subject=subject, target_new=target_new, **optional)

    def as_dict(self) -> dict[str, Any]:
        """Return the request as primitives, without what is empty."""
        filled = {name: value for name, value in vars(self).items() if value not in (None, "", (), {})}
        return {name: _plain(value) for name, value in filled.items() if name != "place"}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> EditRequest:
        """Restore :meth:`as_dict`.

        Raises:
            DataError: If it is none.

        Example:
            >>> request = EditRequest("1", "{} is in", "Rome", "Asia", neighborhood=(Probe("Oslo is in", "Europe"),))
            >>> EditRequest.from_dict(request.as_dict()) == request
            True
        """
        try:
            fields = dict(record)
            for name in ("paraphrases", "generation", "references"):
                fields[name] = tuple(fields.get(name, ()))
            fields["neighborhood"] = tuple(Probe(**probe) for probe in fields.get("neighborhood", ()))
            for name in ("portability", "locality"):
                fields[name] = {
                    kind: tuple(Probe(**probe) for probe in probes) for kind, probes in fields.get(name, {}).items()
                }
            return cls(**fields)
        except (TypeError, AttributeError) as error:
            raise DataError(f"not a request: {error}") from None

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return self.prompt.replace("{}", self.subject)

    @property
    def subject_span(self) -> tuple[int, int]:
        """Start and end of the subject in :attr:`text`."""
        start = self.prompt.index("{}")
        return start, start + len(self.subject)


def _check_texts(**values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, str):
            raise DataError(f"{name} must be text, got {type(value).__name__}")


def _plain(value: object) -> Any:
    if isinstance(value, Probe):
        return dict(vars(value))
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, tuple) else value


def _texts_in(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Probe):
        yield from (value.prompt, value.answer)
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield from (str(name), *_texts_in(part))
    elif isinstance(value, tuple):
        for part in value:
            yield from _texts_in(part)


def find_fault(text: str) -> str | None:
    """Return what makes a text impossible to tokenise or to write to a file, or ``None``.

    Example:
        >>> find_fault("Zürich"), find_fault(chr(0))
        (None, 'a NUL character')
    """
    if "\x00" in text:
        return "a NUL character"
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        return "half a character (a lone surrogate such as \\ud800)"
    return None


def find_subject(text: str, subject: str) -> int | None:
    """Return where ``subject`` last begins in ``text``, whole words first, or ``None``.

    Example:
        >>> find_subject("Canada and Ada, Canada", "Ada"), find_subject("Canada", "ada"), find_subject("Peru", "Ada")
        (11, 3, None)
    """
    # Looked ahead for, since one occurrence may begin inside another: "New York New York New York".
    whole = [m.start() for m in re.finditer(rf"(?<!\w)(?={re.escape(subject)}(?!\w))", text)]
    if whole:
        return whole[-1]
    start = text.rfind(subject)
    return None if start < 0 else start
