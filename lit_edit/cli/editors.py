"""``editors``: which methods there are, and what each does, costs and lacks."""

from __future__ import annotations

import re
import sys
from typing import Any

import yaml

from lit_edit.console.arguments import make_parser
from lit_edit.console.catalogue import HOME, KnownEditor, known_editors, settings_told
from lit_edit.console.configs import config_root
from lit_edit.console.tables import print_whole, table_of
from lit_edit.console.terminal import write_json
from lit_edit.errors import ArgumentError, nearest, shorten


def run_editors(args: list[str]) -> None:
    """List the editors, or show one."""
    parser = make_parser("editors", "List the editing methods, or show one: what it does, costs, keeps and lacks.")
    text = "the class of an editor, for example D4S"
    parser.add_argument("name", nargs="?", metavar="NAME", help=text, complete=editor_names)
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")
    options = parser.parse_args(args)
    editors = known_editors()
    chosen = editors if options.name is None else [find_editor(options.name, editors)]
    if options.json:
        found = [as_data(editor) for editor in chosen]
        write_json(found if options.name is None else found[0])
    elif options.name is None:
        _list(chosen)
    else:
        _show(chosen[0])


def editor_names() -> list[str]:
    """Return the names of all editors."""
    return [editor.name for editor in known_editors()]


def find_editor(name: str, editors: list[KnownEditor]) -> KnownEditor:
    """Return the editor of a name in any case; the :class:`ArgumentError` names those that come near."""
    by_name = {editor.name.lower(): editor for editor in editors}
    wanted = name.rpartition(".")[2].lower()
    if wanted in by_name:
        return by_name[wanted]
    titles = {editor.about["title"].lower(): editor for editor in editors}
    near = [by_name[word].name for word in nearest(wanted, by_name)]
    near += [titles[word].name for word in nearest(name, titles)]
    meant = f"did you mean {' or '.join(dict.fromkeys(near))}?" if near else "lit-edit editors lists them"
    raise ArgumentError(f"there is no editor {shorten(repr(name))}; {meant}")


def as_data(editor: KnownEditor) -> dict[str, Any]:
    """Return all that is known of an editor, for JSON."""
    known = {"name": editor.name, "class_path": f"{HOME}.{editor.name}", **editor.about, "summary": editor.summary}
    return {**known, "settings": editor.settings, "configs": configs_of(editor.name)}


def configs_of(name: str) -> list[str]:
    """Return the configs of ``configs/method`` that choose an editor."""
    root, found = config_root(), []
    for path in sorted((root / "method").glob("*.yaml")):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        chosen = ((content.get("model") or {}).get("editor") or {}).get("class_path", "")
        if str(chosen).rpartition(".")[2] == name:
            found.append(f"method/{path.stem}")
    return found


def _list(editors: list[KnownEditor]) -> None:
    rows = []
    for editor in editors:
        about = editor.about
        paper = "\n".join(re.findall(r"arXiv [\d.]*\d", about["paper"])) or about["paper"]
        can = (_yes(about["batch"]), about["undo"], _yes(about["lora"]), _yes(about["devices"]))
        rows.append((editor.name, about["title"], paper, about["kind"], *can))
    headings = ("name", "method", "paper", "kind", "batch", "undo", "LoRA\nexport", "several\ndevices")
    print_whole(table_of(headings, rows, whole=True, title="Editors; lit-edit editors NAME shows one in full"))


def _show(editor: KnownEditor) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    about, configs = editor.about, configs_of(editor.name)
    facts = Table.grid(padding=(0, 2))
    facts.add_column(no_wrap=True, style="bold")
    facts.add_column()
    for name, value in (
        ("method", about["title"]),
        ("paper", about["paper"]),
        ("kind", about["kind"]),
        ("cost of an edit", about["cost"]),
        ("state", about["state"]),
        ("several edits in a step", _yes(about["batch"])),
        ("undo", about["undo"]),
        ("LoRA export", _yes(about["lora"])),
        ("several devices", _yes(about["devices"])),
        ("lacks", about["lacks"] or "–"),
        ("class", f"{HOME}.{editor.name}"),
        ("configs", ", ".join(configs) or "none ships"),
    ):
        facts.add_row(name, Text(value))
    settings = "\n".join(settings_told(editor, width=min(100, Console().width)))
    use = f"lit-edit fit --config counterfact --config {configs[0]}" if configs else ""
    print_whole(Padding(Text(editor.summary), (0, 0, 1, 0)), Padding(facts, (0, 0, 1, 0)))
    sys.stdout.write(f"Settings, below model.editor.init_args\n{settings}\n\n{use}\n".rstrip("\n") + "\n")


def _yes(value: bool) -> str:
    return "yes" if value else "no"
