"""Whose a model is, and whether its weights are still those that its ledger left.

A model has one ledger. It says so itself, in an attribute, so that whoever comes next finds the edits that it holds;
and before anything is written, the weights are compared with what the ledger left: what somebody else has written
(another library, fine-tuning, an assignment) is neither overwritten nor mistaken for the original.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from lit_edit.errors import ArgumentError
from lit_edit.files.checksum import checksum
from lit_edit.models.shards import held

Changed = Literal["refuse", "adopt", "restore"]
"""What to do about a model that is not as its ledger left it: refuse it, take it as a new base, or put it right."""

MARK = "lit_edit"
"""What the config of an exported model, and the model itself, know the edits by."""

_ATTRIBUTE = "_lit_edit"
_WIDTH, _BLOCK = 1024, 16_384  # words in a row, rows at a time


class WeightsChangedError(ArgumentError):
    """A model whose weights are not what its ledger left, or the work of another one; nothing was done to it.

    Attributes:
        names: The parameters that differ, if it is known which.
    """

    def __init__(self, message: str, names: Collection[str] = ()) -> None:
        super().__init__(message)
        self.names = tuple(names)


class Ledger(Protocol):
    """What a model has to know of its ledger (:class:`~lit_edit.ledger.edit_ledger.EditLedger`)."""

    @property
    def held(self) -> int:
        """How many edits the model holds."""

    def rewrite(self) -> None:
        """Put the weights back as the ledger left them."""

    def restore_base(self) -> None:
        """Put the original weights back and forget all edits."""


class Owner:
    """Stands in a model and says whose it is. A copy of the model knows how many edits it holds, and no ledger."""

    def __init__(self, ledger: Ledger | None, holder: Any = None, copied: int = 0) -> None:
        self.ledger, self.holder, self._copied = ledger, holder, copied

    @property
    def edits(self) -> int:
        """How many edits the model holds."""
        return self._copied if self.ledger is None else self.ledger.held

    def __reduce__(self) -> tuple[Any, ...]:  # of copies and pickles alike
        return Owner, (None, None, self.edits)


def owner_of(model: nn.Module) -> Owner | None:
    """Return what a model knows of its ledger; ``None`` where it never had one."""
    found = vars(model).get(_ATTRIBUTE)
    return found if isinstance(found, Owner) else None


def claim(model: nn.Module, ledger: Ledger, adopt: bool = False) -> None:
    """Make a model that of a ledger.

    Raises:
        WeightsChangedError: If it holds edits that the ledger does not know of, which it would take for the original.
    """
    owner = owner_of(model)
    if not adopt:
        if owner is not None and (edits := owner.edits):
            whose = "made by another stream or call" if owner.ledger is not None else "it is a copy of an edited model"
            raise WeightsChangedError(
                f"this model holds {_edits(edits)} already ({whose}), and a second ledger would take its weights for "
                f"the original ones. {_WAYS.format(restore='take the edits out first, by undo or reset')}"
            )
        exported = getattr(getattr(model, "config", None), MARK, None)
        if owner is None and isinstance(exported, Mapping):
            raise WeightsChangedError(
                f"this model was exported with {_edits(exported.get('edits', 0))} in it, made on "
                f"{exported.get('base', 'another model')!r}, and its weights would be taken for the original ones. "
                + _WAYS.format(restore="load the base model, or go on in the run that was exported")
            )
    vars(model)[_ATTRIBUTE] = Owner(ledger)


def put_right(model: nn.Module) -> None:
    """Give a model its original weights back, if a ledger of this process has changed them.

    Raises:
        WeightsChangedError: If others were written as well, of which no copy is kept.
    """
    owner = owner_of(model)
    if owner is not None and owner.ledger is not None:
        owner.ledger.rewrite()
        owner.ledger.restore_base()


_WAYS = (
    "Three ways on: adopt these weights as the new original ones (changed='adopt'; on the command line "
    "--model.changed adopt), restore ({restore}), or leave the model as it is"
)


def _edits(count: int) -> str:
    return f"{count} edit{'' if count == 1 else 's'}"


def difference(names: Sequence[str], restorable: bool) -> str:
    """Say which weights somebody else has written, and the ways on."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    restore = (
        "restore what the ledger left (changed='restore')"
        if restorable
        else "restore: load the model again and take its edits up (of weights that are not edited no copy is kept)"
    )
    return (
        f"the weights are not those that the ledger left: somebody else (fine-tuning, another library, by hand) has "
        f"written {', '.join(names[:3])}{more}; nothing was done. Three ways on: adopt them as the new original "
        "weights (changed='adopt': the edits that hold become part of them and cannot be taken out any more), "
        f"{restore}, or leave the model as it is"
    )


class Untouched:
    """The parameters that a ledger does not write, as they were when it looked.

    Args:
        model: The model.
        written: Full names of those that are written.

    Attributes:
        prints: Digits for the bits of each, by name.
    """

    def __init__(self, model: nn.Module, written: Collection[str]) -> None:
        self._written = frozenset(written)
        self.prints = {name: print_of(weight) for name, weight in self._of(model).items()}
        self._versions = self._now(model)

    def _of(self, model: nn.Module) -> dict[str, Tensor]:
        return {name: weight for name, weight in model.named_parameters() if name not in self._written}

    def _now(self, model: nn.Module) -> list[tuple[object, ...]]:
        """Return what changes when a parameter is replaced or written by an operation that PyTorch counts."""
        return [
            (name, id(weight), held(weight).data_ptr(), weight.dtype, _version(weight))
            for name, weight in self._of(model).items()
        ]

    @torch.no_grad()
    def changed(self, model: nn.Module, thorough: bool) -> list[str]:
        """Return the names of those that are not as they were.

        Args:
            model: The model.
            thorough: Read them all; else only where PyTorch has counted an operation that wrote, which is at once done
                and sees all but what was written through ``.data`` or another tensor of the same memory.
        """
        now = self._now(model)
        if not thorough and now == self._versions:
            return []
        prints = {name: print_of(weight) for name, weight in self._of(model).items()}
        names = [name for name in {**self.prints, **prints} if self.prints.get(name) != prints.get(name)]
        if not names:
            self._versions = now  # written, but as they were
        return names


def _version(weight: Tensor) -> int:
    return -1 if weight.is_inference() else weight._version


def other_base(
    name: str, then: Mapping[str, str] | None, now: Mapping[str, str], hashes: tuple[str, str]
) -> WeightsChangedError:
    """Return the refusal of a base model that is not the one that edits were made on.

    Args:
        name: What the model is called.
        then: Digits for the bits of its parameters when the edits were made, if they are on record.
        now: The same of the model at hand.
        hashes: Of all weights, then and now.
    """
    names = [] if then is None else [part for part in {**then, **now} if then.get(part) != now.get(part)]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    told = f"; {', '.join(names[:3])}{more} of {len(now)} parameters differ" if names else ""
    return WeightsChangedError(
        f"the edits were made on other base weights than those of {name!r} (hash {hashes[0]} against "
        f"{hashes[1]}{told}). Three ways on: restore the model that they were made on (its folder, revision and type "
        "as they were), adopt these weights as the base of a new run of another name, whose edits are made anew, or "
        "leave it",
        names,
    )


def print_of(weight: Tensor) -> str:
    """Return digits for the bits of a weight: sums of its words along rows and columns, at the speed of the memory."""
    own = held(weight).detach()
    raw = own.contiguous().view(-1).view(torch.uint8)
    whole = raw.numel() // 8 * 8
    words, rest = raw[:whole].view(torch.int64), raw[whole:]
    rows = words[: words.numel() // _WIDTH * _WIDTH].view(-1, _WIDTH)
    columns = torch.zeros(_WIDTH, dtype=torch.int64, device=own.device)
    parts = []
    for block in rows.split(_BLOCK):
        # Mixed first: in a plain sum the highest bits, which are signs, of two words cancel.
        mixed = block ^ (block >> 29)
        columns += mixed.sum(0)
        parts.append(mixed.sum(1))
    sums = torch.cat((columns, *parts, words[rows.numel() :], rest.long()))
    return f"{own.dtype}{tuple(own.shape)}{checksum(sums[None])}"
