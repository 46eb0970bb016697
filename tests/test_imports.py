"""The shape of the library: imports run downward, one module writes weights, nothing is hidden in globals."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The floors of the house, low to high: a file may import what stands on its own floor and below. A file that belongs
# elsewhere than its folder is named; the longest name counts.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("lit_edit.errors",),
    ("lit_edit.files.*", "lit_edit.devices.*", "lit_edit.text.buckets"),
    ("lit_edit.data.*", "lit_edit.ledger.journal", "lit_edit.ledger.history", "lit_edit.ledger.shared_journal"),
    ("lit_edit.text.*", "lit_edit.testing"),
    ("lit_edit.models.*",),
    ("lit_edit.solvers.*", "lit_edit.targets.*", "lit_edit.stats.*"),
    ("lit_edit.ledger.*", "lit_edit.metrics.*"),
    ("lit_edit.editors.*", "lit_edit.ability.*"),
    ("lit_edit.export.*", "lit_edit.planning.*"),
    ("lit_edit.stream.*", "lit_edit.training.*", "lit_edit.loggers.*"),
    ("lit_edit.runs.*",),
    ("lit_edit.report.*",),
    ("lit_edit.callbacks.*",),
    ("lit_edit.console.*",),
    ("lit_edit.sweeps.*",),
    ("lit_edit.studies.*",),
    ("lit_edit.cli.*",),
    ("lit_edit", "lit_edit.__main__"),
)
# May use none of these packages, neither themselves nor through what they import.
FORBIDDEN = {
    "lit_edit.solvers": {"transformers", "lightning", "torchmetrics", "datasets", "wandb"},
    "lit_edit.data.request": {"torch", "transformers", "lightning", "tokenizers"},
    "lit_edit.data.formats": {"torch", "transformers", "lightning", "tokenizers"},
    "lit_edit.models": {"lightning"},
    "lit_edit.targets": {"lightning"},
    "lit_edit.stats": {"lightning"},
    "lit_edit.ledger": {"lightning", "datasets"},
    "lit_edit.ledger.journal": {"lightning", "transformers", "datasets"},
    "lit_edit.stream.session": {"lightning", "wandb"},
    "lit_edit.stream.edit": {"lightning", "wandb"},
    "lit_edit.metrics": {"lightning", "wandb"},
    "lit_edit.ability": {"lightning", "wandb"},
    "lit_edit.editors": {"lightning", "wandb", "torchmetrics"},
    "lit_edit.export.delta": {"lightning", "wandb", "torchmetrics"},
    "lit_edit.export.lora": {"lightning", "wandb", "peft"},
    "lit_edit.errors": {"torch"},
    "lit_edit.text.buckets": {"torch", "transformers", "lightning", "numpy"},
    "lit_edit.cli.main": set(),
}


def _sources() -> Iterator[tuple[str, Path]]:
    for path in sorted(ROOT.glob("lit_edit/**/*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path
    for path in sorted(ROOT.glob("callbacks/*.py")):
        yield "lit_edit.callbacks" + ("" if path.stem == "__init__" else f".{path.stem}"), path


MODULES = dict(_sources())
every_module = pytest.mark.parametrize("module", MODULES)


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text("utf-8"))


def floor_of(module: str) -> int:
    """The floor whose pattern fits best: the longest one."""
    fitting = [
        (len(pattern), index)
        for index, patterns in enumerate(FLOORS)
        for pattern in patterns
        if module == pattern or (pattern.endswith(".*") and f"{module}.".startswith(pattern[:-1]))
    ]
    assert fitting, f"{module} has no place in the table of floors; give it one"
    return max(fitting)[1]


def imports(module: str, eager: bool = False, typing: bool = True) -> set[str]:
    """All modules that one imports: of ours by full name, of others the top-level package.

    Args:
        module: Which.
        eager: Only what is imported when the module is, not inside functions.
        typing: Also what stands under ``if TYPE_CHECKING``.
    """
    found: set[str] = set()
    for node in _nodes(tree(module), eager, typing):
        if isinstance(node, ast.Import):
            found |= {_known(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(module, node)
            found |= {_known(f"{base}.{alias.name}", base) for alias in node.names}
    return found - {module, "__future__"}


def _nodes(node: ast.AST, eager: bool, typing: bool) -> Iterator[ast.AST]:
    if eager and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return
    if not typing and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _nodes(child, eager, typing)


def _absolute(module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = module if MODULES[module].stem == "__init__" else module.rpartition(".")[0]
    for _ in range(node.level - 1):
        package = package.rpartition(".")[0]
    return f"{package}.{node.module}" if node.module else package


def _known(name: str, otherwise: str = "") -> str:
    if name in MODULES:
        return name
    name = otherwise or name
    return name if name in MODULES else name.partition(".")[0]


@cache
def reached(module: str) -> frozenset[str]:
    """Everything that importing and using a module can load, its packages' ``__init__`` included."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in MODULES and name != "lit_edit":  # its names are loaded when they are asked for
            waiting += imports(name, typing=False)
            parent = name.rpartition(".")[0]
            waiting += [parent] if parent in MODULES else []
    return frozenset(seen)


@every_module
def test_imports_run_downward(module: str) -> None:
    own = floor_of(module)
    upward = sorted(n for n in imports(module) if n in MODULES and n != "lit_edit" and floor_of(n) > own)
    assert not upward, f"{module} imports upward: {', '.join(upward)}"


@every_module
def test_nothing_imports_the_top_package_from_within(module: str) -> None:
    """``from lit_edit import X`` would make every module depend on all."""
    allowed = {"lit_edit", "lit_edit.configs"}
    assert module in allowed or "lit_edit" not in imports(module)


def _circle(graph: dict[str, set[str]]) -> list[str]:
    """What is left when everything that imports only what is gone already has gone: empty where there is no circle."""
    left = dict(graph)
    while free := {name for name, known in left.items() if not known & set(left) - {name}}:
        left = {name: known for name, known in left.items() if name not in free}
    return sorted(left)


def test_files_do_not_import_each_other_in_circles() -> None:
    """Neither at the top, nor inside functions, nor for types alone: that hides a circle and does not open it."""
    assert not _circle({module: imports(module) & set(MODULES) for module in MODULES})
    assert _circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["a", "b", "c"]  # this test sees what it looks for


def _room(module: str) -> str:
    """The folder of ``lit_edit`` that a module stands in."""
    return ".".join(module.split(".")[:2])


def test_folders_do_not_import_each_other_in_circles() -> None:
    graph: dict[str, set[str]] = {}
    for module in MODULES:
        known = {_room(name) for name in imports(module) if name in MODULES and name != "lit_edit"}
        graph.setdefault(_room(module), set()).update(known - {_room(module)})
    assert not _circle(graph)


def test_what_lies_loose_is_four_files() -> None:
    loose = {path.name for path in (ROOT / "lit_edit").iterdir() if path.is_file()}
    assert loose == {"__init__.py", "__main__.py", "errors.py", "testing.py", "py.typed"}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_modules_do_without_what_they_must_not_know(package: str) -> None:
    modules = [m for m in MODULES if m == package or m.startswith(f"{package}.")]
    assert modules
    for module in modules:
        known = set(reached(module)) if module != "lit_edit.cli.main" else imports(module, eager=True)
        forbidden = FORBIDDEN[package] or {
            "torch",
            "transformers",
            "lightning",
            "lit_edit.stream.edit_stream",
            "numpy",
            "rich",
        }
        assert not known & forbidden, f"{module} reaches {sorted(known & forbidden)}"


def test_the_request_knows_neither_tokenizer_nor_model() -> None:
    ours = {name for name in reached("lit_edit.data.request") if name.startswith("lit_edit")}
    assert ours == {"lit_edit.data.request", "lit_edit.data", "lit_edit.errors", "lit_edit"}


def test_the_ledger_knows_neither_editors_nor_data() -> None:
    assert not [
        n for n in reached("lit_edit.ledger.edit_ledger") if n.startswith(("lit_edit.editors", "lit_edit.data"))
    ]


# ---- who writes weights -------------------------------------------------------------------------------------------

# The second makes random models, the third reads them from files; the last has what the ledger writes with.
WRITERS = {
    "lit_edit.ledger.edit_ledger",
    "lit_edit.testing",
    "lit_edit.models.sharded_loading",
    "lit_edit.models.shards",
}
PLAIN = {  # tensors that belong to no model
    "lit_edit.stats.second_moment": ("sums[layer].copy_(",),
    "lit_edit.devices.ranks": ("tensor.copy_(moved)", "told.copy_("),
    "lit_edit.targets.losses": ("losses.gradient.copy_(", "value.copy_(found)"),
    "lit_edit.planning.speed": ("target.copy_(source)",),
    "lit_edit.editors.gradient.engine": ("leaf.copy_(self.bounded(leaf",),  # the update that is being fitted
    "lit_edit.editors.gradient.lora_tuning": (
        "factors(layers[int(layer)])[kind].data.copy_(factor)",
    ),  # of stand-in layers
}
NOT_WRITES = {"requires_grad_", "manual_seed_"}


def _text(node: ast.AST) -> str:
    return ast.unparse(node)


def _writes(module: str) -> Iterator[str]:
    """Lines that could change a weight in place."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name, owner = node.func.attr, _text(node.func.value)
            in_place = name.endswith("_") and not name.endswith("__") and name not in NOT_WRITES
            if name == "copy_" or (in_place and _is_parameter(owner)):
                yield _text(node)
            if name in ("load_state_dict", "set_submodule", "register_parameter") and "model" in owner.lower():
                yield _text(node)
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AugAssign) else []
        )
        for target in targets:
            inner = target.value if isinstance(target, ast.Subscript) else target
            if (
                isinstance(inner, ast.Attribute) and (inner.attr in ("data", "weight") and _text(inner.value) != "self")
            ) or (isinstance(target, ast.Subscript) and _is_parameter(_text(inner))):
                yield _text(node)


def _is_parameter(text: str) -> bool:
    return text.endswith((".weight", ".data", "parameter", ".bias")) or "down_proj(" in text or "get_parameter(" in text


@every_module
def test_only_the_ledger_writes_weights(module: str) -> None:
    writes = [line for line in _writes(module) if not line.startswith(PLAIN.get(module, ("\0",)))]
    if module == "lit_edit.models.shards":
        assert len(writes) >= 2  # this test sees what it looks for
    if "lit_edit.models.shards" in imports(module) and module != "lit_edit.ledger.edit_ledger":
        assert "write_(" not in ast.unparse(tree(module))
    assert module in WRITERS or not writes, f"{module}: {writes}"


# ---- state, output, safety ----------------------------------------------------------------------------------------

MUTATORS = {"append", "extend", "insert", "update", "setdefault", "pop", "popitem", "clear", "add", "remove", "discard"}


def _module_names(module: str) -> set[str]:
    names: set[str] = set()
    for node in tree(module).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def _local_names(function: ast.AST) -> set[str]:
    names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return names | {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}


def _mutations(module: str) -> Iterator[str]:
    shared = _module_names(module)
    for function in ast.walk(tree(module)):
        if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        names = shared - _local_names(function)
        for node in ast.walk(function):
            if isinstance(node, ast.Global):
                yield _text(node)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
                owner = node.func.value
            elif isinstance(node, (ast.Subscript, ast.Attribute)) and not isinstance(node.ctx, ast.Load):
                owner = node.value
            else:
                continue
            if isinstance(owner, ast.Name) and owner.id in names:
                yield _text(node)


@every_module
def test_module_level_names_are_constants(module: str) -> None:
    assert not list(_mutations(module))
    odd = [
        n for n in _module_names(module) if not (n.isupper() or n.startswith("__") or n[0].isupper() or n[1:].isupper())
    ]
    assert odd in ([], ["log"]), f"{module}: module-level variables {odd}"


def _calls(module: str) -> Iterator[ast.Call]:
    yield from (node for node in ast.walk(tree(module)) if isinstance(node, ast.Call))


@every_module
def test_the_library_does_not_print(module: str) -> None:
    assert not [
        _text(c) for c in _calls(module) if isinstance(c.func, ast.Name) and c.func.id in ("print", "breakpoint")
    ]


@every_module
def test_nothing_is_unpickled_or_evaluated(module: str) -> None:
    names = {"eval", "exec", "compile", "__import__"}
    called = [_text(c) for c in _calls(module) if isinstance(c.func, ast.Name) and c.func.id in names]
    loads = [_text(c) for c in _calls(module) if _text(c.func) in ("torch.load", "yaml.load", "os.system")]
    loads = [call for call in loads if "weights_only=True" not in call]
    asked = [c for c in _calls(module) if _text(c.func) != "argcomplete.shellcode"]  # writes a script for that shell
    shell = [_text(c) for c in asked for k in c.keywords if k.arg == "shell"]
    assert not called + loads + shell
    assert not imports(module) & {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


@every_module
def test_cuda_is_named_in_checks_of_a_devices_type_only(module: str) -> None:
    allowed = {
        id(part)
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Compare) and ".type" in _text(node)
        for part in ast.walk(node)
    }
    named = [
        node.value
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("cuda")
        if id(node) not in allowed
    ]
    assert not named
    assert not [_text(c) for c in _calls(module) if _text(c.func).endswith(".cuda")]
