"""What a person sees while a session works."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

if TYPE_CHECKING:
    from typing_extensions import Self


class Shown:
    """Bars for a piece of work in steps; none unless ``shown``.

    Args:
        shown: Whether there are any.
        steps: How many steps there are.
        unit: What a step is called.
    """

    def __init__(self, shown: bool, steps: int, unit: str) -> None:
        self._bar: Any = tqdm(total=steps, unit=unit, disable=not shown, leave=False)
        self._counted: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.close()
        if self._counted is not None:
            self._counted.close()

    def step(self) -> None:
        """Go on by a step."""
        self._bar.update()

    def status(self, message: str) -> None:
        """Say what is going on."""
        self._bar.set_description_str(message)

    def count(self, done: int, total: int) -> None:
        """Show how much of something larger is done, on a bar of its own."""
        if self._counted is None:
            self._counted = tqdm(
                total=total, unit="token", desc="key statistics", disable=self._bar.disable, leave=False
            )
        self._counted.update(done - self._counted.n)
