"""``models``: which models are known, what is cached, and the configs that ship."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from lit_edit.console.arguments import check_model, make_parser
from lit_edit.console.terminal import write_json
from lit_edit.errors import ArgumentError


def _describe(options: argparse.Namespace) -> None:
    """Say what was found of a model."""
    name = check_model(options.describe)

    import yaml

    from lit_edit.files.paths import write_text
    from lit_edit.models import LanguageModel, ModelAdapter
    from lit_edit.models.description import describe_model

    model, _ = LanguageModel(name, trust_remote_code=options.trust_remote_code).load()
    found = describe_model(ModelAdapter(model))
    settings = {"model": {"language_model": {"name": name, "arch": found["arch"]}}}
    if options.out is not None:
        text = yaml.safe_dump(settings, sort_keys=False)
        write_text(options.out, f"# What lit-edit models --describe has found of {name}.\n{text}")
    if options.json:
        write_json({"model": name, **found})
        return
    sys.stdout.write(_words(name, found))
    if options.out is not None:
        sys.stdout.write(f"\nWritten as a config to {options.out}: lit-edit fit --config {options.out}\n")


def _words(name: str, found: dict[str, Any]) -> str:
    layers, down, behind = found["layers"], found["down_projection"], found["behind_it"]
    edited, paths = found["edited_by_default"], down["path"]
    widths = ", ".join(f"{width['inner']} to {width['stream']}" for width in down["widths"])
    without = layers["count"] - len(layers["with_down_projection"])
    lines = {
        "model": f"{name} ({found['family']}, found {found['found']})",
        "layers": f"{layers['path']}, {layers['count']}" + (f"; {without} without an MLP" if without else ""),
        "down projection": f"{paths if isinstance(paths, str) else ', '.join(paths)} ({widths})",
        "behind it": ", ".join(f"{part} {value}" for part, value in behind.items() if value) or "nothing: it is added",
        "logits": found["logits"],
        "rows": found["rows"],
        "edited by default": f"layers {', '.join(map(str, edited['layers']))} ({edited['why']})",
        "proven": "yes: layer by layer it says what it says itself, and what its MLP says is what reaches the stream"
        if found["proven"]
        else f"NO: {found['fault']}",
    }
    return "".join(f"{word:<19}{text}\n" for word, text in lines.items())


def run_models(args: list[str]) -> None:
    """Show models, architectures and configs."""
    parser = make_parser("models", "List known models, what is cached, and the configs that ship.")
    text = "load a model, and say where its parts are, how that is known, and whether it is proven"
    parser.add_argument("--describe", metavar="NAME", default=None, help=text)
    parser.add_out("with --describe: write it as a config there, to be corrected and given with --config")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="with --describe: let it bring code of its own"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    options = parser.parse_args(args)
    if options.describe is not None:
        _describe(options)
        return
    if options.out is not None or options.trust_remote_code:
        raise ArgumentError("--out and --trust-remote-code belong to --describe NAME")

    from rich.console import Console

    from lit_edit.console.configs import shipped_configs
    from lit_edit.console.tables import table_of
    from lit_edit.files.paths import cache_dir
    from lit_edit.models.families import SPECS
    from lit_edit.models.packaged import ENCODERS, PACKAGED
    from lit_edit.models.presets import PUBLISHED

    models = (*PACKAGED.values(), *ENCODERS.values())
    if options.json:
        packaged = [{n: getattr(m, n) for n in ("name", "title", "licence", "size", "is_cached")} for m in models]
        write_json({"packaged": packaged, "families": [spec.family for spec in SPECS], "configs": shipped_configs()})
        return
    console = Console()
    rows = [(m.name, m.title, m.licence, "yes" if m.is_cached else f"no ({m.size})") for m in models]
    console.print(table_of(("name", "what", "licence", "cached"), rows, title="Packaged models"))
    families: dict[str, list[Any]] = {}
    for (kind, depth, width), layers in PUBLISHED.items():
        families.setdefault(kind, []).append(f"{depth} layers of {width}: {layers[0]}–{layers[-1]}")
    sizes = [(spec.family, "; ".join(families.get(spec.family, []))) for spec in SPECS]
    title = "Architectures (any hub id or folder of these)"
    console.print(table_of(("family", "sizes with published edit layers"), sizes, title=title))
    console.print(f"cache: {cache_dir()}", highlight=False)
    published = [name.split("/")[1:] for name in shipped_configs() if name.startswith("published/")]
    rest = [name for name in shipped_configs() if not name.startswith("published/")]
    console.print(f"configs: {', '.join(rest)}", highlight=False)
    for place in dict.fromkeys(place for place, _ in published):
        methods = ", ".join(method for at, method in published if at == place)
        console.print(f"published/{place}/: {methods}", highlight=False)
