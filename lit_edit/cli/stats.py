"""``stats``: key statistics ahead of a run."""

from __future__ import annotations

import sys

from lit_edit.console.arguments import make_parser


def run_stats(args: list[str]) -> None:
    """Compute the second moments of the keys, or find them in the cache, and show their size."""
    parser = make_parser(
        "stats", "Compute the second moments of the keys ahead of a run; they are kept and found again."
    )
    parser.add_model()
    parser.add_layers("layers; by default the model's preset")
    text = "'sampled', a text file, or a hub data set id"
    parser.add_argument("--corpus", aliases=("--model.statistics.corpus",), default="sampled", help=text)
    parser.add_argument(
        "--tokens", type=int, default=20_000, help="tokens to read; never fewer than ten per key dimension"
    )
    parser.add_seed("seed of sampled text")
    parser.add_argument("--force", action="store_true", help="compute anew even if kept")
    options = parser.parse_args(args)

    from time import perf_counter

    from tqdm import tqdm

    from lit_edit.errors import ArgumentError
    from lit_edit.models import LanguageModel, ModelAdapter
    from lit_edit.models.presets import edit_layers
    from lit_edit.stats.second_moment import KeyStatistics

    try:
        statistics = KeyStatistics(options.corpus, options.tokens, options.seed, force=options.force)
    except ValueError as error:
        raise ArgumentError(str(error)) from error
    model, tokenizer = LanguageModel(options.model).load()
    adapter = ModelAdapter(model)
    layers = sorted(set(options.layers)) if options.layers else list(edit_layers(adapter))
    for layer in layers:
        adapter.check_layer(layer)
    kept = statistics.is_cached(adapter, layers)
    start = perf_counter()
    with tqdm(desc="key statistics", unit="token", disable=kept) as bar:

        def show(done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.refresh()

        moments = statistics.compute(adapter, tokenizer, layers, show)
    spent = perf_counter() - start
    what = "found in the cache" if kept else f"computed in {spent:.0f} s"
    sys.stdout.write(f"Key statistics of {options.model}, layers {', '.join(map(str, layers))}: {what}\n")
    for layer, moment in moments.items():
        eigenvalues = moment.diagonal()
        sys.stdout.write(
            f"  layer {layer}: {len(moment)} dimensions, mean square {eigenvalues.mean():.4g}, "
            f"largest {eigenvalues.max():.4g}\n"
        )
