"""``models``: which models are known, what is cached, and the configs that ship."""

from __future__ import annotations

from typing import Any

from lit_edit.console.arguments import make_parser
from lit_edit.console.terminal import write_json


def run_models(args: list[str]) -> None:
    """Show models, architectures and configs."""
    parser = make_parser("models", "List known models, what is cached, and the configs that ship.")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    options = parser.parse_args(args)

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
