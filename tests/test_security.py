"""Nothing that a run reads or leaves can run, and nothing that a record says leads out of the run folder."""

from __future__ import annotations

import ast
import io
import json
import logging
import os
import pickle
import pickletools
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_edit.cli.main import main
from lit_edit.ledger.journal import Journal
from lit_edit.runs.continuing import carry_over
from lit_edit.runs.files import journal_path
from lit_edit.runs.reading import read_history
from tests.cli.test_main import FAST
from tests.test_imports import MODULES, every_module, imports, tree

# ---- no pickle in files ----------------------------------------------------------------------------------------------


def is_pickle(data: bytes) -> bool:
    """Tell whether bytes could be unpickled: a pickle, or an archive, which torch and numpy keep pickles in."""
    if zipfile.is_zipfile(io.BytesIO(data)):
        return True
    if data[:1] == b"\x80" and data[1:2] <= b"\x05":
        try:
            list(pickletools.genops(data))
        except Exception:
            return False
        return True
    return data[:1] in (b"(", b"c", b"]", b"}") and data.rstrip().endswith(b".") and b"\n" in data[:200]


def old_pickle() -> bytes:
    return pickle.dumps({"a": [1, 2]}, protocol=0)


def archive() -> bytes:
    file = io.BytesIO()
    torch.save({"a": torch.ones(3)}, file)
    return file.getvalue()


@pytest.mark.parametrize("data", [pickle.dumps([1]), pickle.dumps([1], protocol=2), old_pickle(), archive()])
def test_the_scanner_sees_what_it_looks_for(data: bytes) -> None:
    assert is_pickle(data)


def files_in(folder: Path) -> Iterator[Path]:
    yield from (path for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def hostile(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run whose records are full of paths."""
    folder = tmp_path_factory.mktemp("hostile") / "deep" / "work"
    folder.mkdir(parents=True)
    outside = folder.parent.parent / "outside"
    rows = [
        {"id": "../../outside/x", "prompt": "The capital of ../../outside is", "subject": "../../outside"},
        {"id": f"{outside}/y", "prompt": "The capital of Peru is", "subject": "Peru", "target_new": "/etc/passwd"},
        {"id": "..\\..\\outside\\z", "prompt": "Acme <script> makes", "subject": "Acme <script>"},
        {"id": "~/outside", "prompt": "The river of {0} is", "subject": "{0}"},
    ]
    facts = folder / "facts.jsonl"
    facts.write_text("".join(json.dumps({"target_new": "Rome", **row}) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LIT_EDIT_CACHE", str(folder / "cache"))
        patch.setattr(logging.root, "handlers", list(logging.root.handlers))
        args = ["fit", "--config", "quickstart", f"--model.language_model.name={tiny_folder}", *FAST]
        data = ["--data.source=facts", f"--data.path={facts}"]
        assert main([*args, *data, "--trainer.accelerator=cpu", "--run_name=x"]) == 0
        assert main(["undo", "--run=runs/x", "--id=../../outside/x", f"--id={outside}/y"]) == 0
        assert main(["redo", "--run=runs/x", "--id=../../outside/x"]) == 0
        assert main(["log", "--run=runs/x"]) == 0
        for kind, where in (("model", "out/model"), ("delta", "out/delta.safetensors"), ("lora", "out/lora")):
            assert main(["export", "--run=runs/x", "--as", kind, "--to", where]) == 0
        rest = ["--continue=runs/x", "--run_name=y", "--data.source=builtin", "--data.limit=1"]
        assert main([*args, "--config", "callbacks/minimal", *rest, "--trainer.accelerator=cpu"]) == 0
    return folder


def test_no_file_of_a_run_or_of_the_cache_is_a_pickle(hostile: Path) -> None:
    kinds = {path.suffix for path in files_in(hostile)}
    assert {".ckpt", ".safetensors", ".yaml", ".csv", ".json", ".jsonl", ".png"} <= kinds  # it has looked at something
    assert [str(path) for path in files_in(hostile) if is_pickle(path.read_bytes())] == []
    assert [str(path) for path in files_in(hostile) if path.suffix in (".pkl", ".pt", ".pth", ".bin", ".npz")] == []


def test_what_records_say_leads_nowhere(hostile: Path) -> None:
    """Ids, subjects and targets are texts, never parts of a path."""
    root = hostile.parent.parent
    assert {path.name for path in root.iterdir()} == {"deep"}
    assert {path.name for path in (root / "deep").iterdir()} == {"work"}
    assert {path.name for path in hostile.iterdir()} == {"facts.jsonl", "runs", "cache", "out"}
    assert {path.name for path in (hostile / "runs").iterdir()} == {"x", "y"}
    assert not Path("~/outside").expanduser().exists()
    names = {path.name for path in files_in(hostile)}
    assert not [name for name in names if "outside" in name or "passwd" in name or "script" in name]
    ids = [entry.id for entry in read_history(hostile / "runs" / "y").made]
    assert ids[0] == "x/../../outside/x"  # as text it is kept as it is
    assert len(ids) == 5


def test_a_journal_that_another_has_written_leads_nowhere(hostile: Path, tmp_path: Path) -> None:
    source = tmp_path / "in" / "x"
    journal = Journal(journal_path(source))
    entry = {"id": "../../../up", "subject": "a", "prompt": "b", "target_new": "c", "facts": {}, "number": 1}
    journal.append(
        {"kind": "edit", "entries": [{**entry, "request": {"id": "/up"}}], "facts": False}, {"../../up": torch.ones(1)}
    )
    journal.append({"kind": "continued", "from": "../../..", "facts": False})
    journal.append({"kind": "refused", "ids": ["/etc/up"], "reason": "..", "facts": False})
    before = set(tmp_path.rglob("*"))
    assert carry_over(source, tmp_path / "out" / "y") == 1
    new = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path not in before}
    assert new == {"out", "out/y", "out/y/ledger", "out/y/ledger/journal"}
    history = read_history(tmp_path / "out" / "y")
    assert [entry.id for entry in history.made] == ["x/../../../up"]
    assert history.refused == [("x//etc/up", "..")]


@pytest.mark.parametrize("name", ["../up", "/up", "a/b", "..", ".", "a\\b", "", "\x00", "~root"])
def test_names_of_runs_that_lead_out_are_refused(name: str, tmp_path: Path, capsys: Any) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"run_name": name, "data": {"limit": 1}}))
    assert main(["fit", "--config", "quickstart", "--config", str(config), f"--runs_dir={tmp_path}/runs"]) == 2
    assert "lit-edit: error:" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


# ---- no pickle in the code -------------------------------------------------------------------------------------------

MODULES_THAT_RUN_DATA = {
    *("pickle", "_pickle", "cPickle", "copyreg", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle"),
    *("dbm", "code", "runpy", "imp"),
}
CALLS_THAT_RUN_DATA = {
    *("torch.save", "torch.load", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter"),
    *("np.load", "numpy.load", "np.save", "pd.read_pickle", "yaml.load", "yaml.unsafe_load", "yaml.full_load"),
    *("os.system", "os.popen", "eval", "exec", "compile", "__import__"),
}


def calls_that_run_data(source: ast.Module) -> list[str]:
    """Calls that could run what is in a file, whatever their arguments."""
    called = [node for node in ast.walk(source) if isinstance(node, ast.Call)]
    return [
        ast.unparse(node)
        for node in called
        if ast.unparse(node.func) in CALLS_THAT_RUN_DATA
        or any(k.arg in ("allow_pickle", "pickle_module") for k in node.keywords)
    ]


@every_module
def test_no_module_pickles(module: str) -> None:
    """More than test_imports asks for: not even what would be safe to read is written."""
    assert calls_that_run_data(tree(module)) == []
    assert not imports(module) & MODULES_THAT_RUN_DATA


@pytest.mark.parametrize(
    "line",
    ["torch.save(a, b)", "torch.load(a, weights_only=True)", "np.load(a)", "f(a, allow_pickle=False)", "eval('1')"],
)
def test_calls_are_seen(line: str) -> None:
    assert calls_that_run_data(ast.parse(line))
    assert len(MODULES) > 60


def test_nothing_is_unpickled_at_work(tmp_path: Path, tiny_folder: Path) -> None:
    """Python tells of every name that an unpickler looks up: there is none from the first edit to the export."""
    args = ["fit", "--config", "quickstart", f"--model.language_model.name={tiny_folder}", *FAST, "--data.limit=2"]
    args += ["--trainer.accelerator=cpu", "--run_name=x", "--config", "callbacks/minimal"]
    args += ["--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint"]
    code = f"""
import sys
import lit_edit.console.edit_cli, lit_edit.callbacks, lit_edit.cli.export
from lit_edit.cli.main import main
seen = []
sys.addaudithook(lambda event, given: seen.append(given) if event.startswith("pickle.") else None)
args = {args!r}
assert main([*args, "--trainer.max_steps=1"]) == 0
assert main([*args, "--trainer.max_steps=-1", "--resume=auto"]) == 0
assert main(["undo", "--run=runs/x", "--last=1"]) == 0
assert main(["ask", "--run=runs/x", "Hello there", "--tokens=1"]) == 0
assert main(["export", "--run=runs/x", "--as=delta", "--to=out.safetensors"]) == 0
told = list(map(str, seen))
import pickle
pickle.loads(pickle.dumps(main))
assert len(seen) > len(told), "the hook sees nothing"
print("SEEN", told)
"""
    environment = {"LIT_EDIT_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "SEEN []"
