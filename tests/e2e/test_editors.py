"""Every method on the real model: ten CounterFact edits in a row, each measured right after it was made.

Takes about ten minutes: ``pytest -m slow tests/e2e/test_editors.py``. The figures are in docs/editors.md.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lit_edit.cli.main import main
from lit_edit.console.configs import shipped_configs

NETWORKS = {"method/serac": "train/serac", "method/mend": "train/mend"}
"""Methods that need a network, and how it is trained."""
METHODS = [name for name in shipped_configs() if name.startswith("method/")]


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize("method", METHODS)
def test_ten_edits_take(method: str, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = ["--data.path", str(shared_data / "counterfact_2000.json")]
    data = [*path, "--data.limit", "10"]
    if method in NETWORKS:
        assert main(["fit", "--config", NETWORKS[method], *path, "--run_name", "network"]) == 0
        data += ["--model.editor.init_args.network", "runs/network"]
    status = main(["fit", "--config", "counterfact", "--config", method, *data, "--run_name", "ten"])
    assert status == 0
    summary = json.loads((tmp_path / "runs" / "ten" / "summary.json").read_text())
    assert summary["immediate"]["efficacy"]["success"] >= 0.9
    assert summary["final"]["locality"]["success"] > 0.3
