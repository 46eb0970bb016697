"""docs/python.md: its code runs, block after block, as one program."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lit_edit.stats.corpus import SampledText

PAGE = Path(__file__).parents[2] / "docs" / "python.md"


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
def test_the_page_runs(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(SampledText.__init__, "__defaults__", (0, 256, 64, 50, ("The", "A")))
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    exec(compile("\n".join(blocks), str(PAGE), "exec"), {"__name__": "page"})  # noqa: S102 - the page's own code
    said = capsys.readouterr().out
    assert "('lm_head.weight',)" in said
    assert "Jules Verne" in said
