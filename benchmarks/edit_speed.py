"""Seconds per edit: the engine at several windows, and turbo, against a textbook D4S written plainly in this file.

    python benchmarks/edit_speed.py --data counterfact.json --json edit_speed.json
    python benchmarks/edit_speed.py --edits 8                # the built-in facts

All variants make the same edits with the same settings, in one process, taking turns edit by edit. The textbook makes
one edit at a time: a forward pass of the whole model over all rows per step with the logits of every token, one whole
forward pass per layer for the keys, a dense float64 solve of size d_in. It runs twice: with PyTorch's default matrix
products, as one gets them, and with the kernel that lit-edit has measured to be the fastest exact one. The largest
relative difference between its final weights and the engine's is printed with the times.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from common import add_model, load_model, make_edits, make_parser, read_data, write_result
from torch import Tensor

from lit_edit import D4S, KeyStatistics
from lit_edit.console.configs import find_config
from lit_edit.data.request import EditRequest
from lit_edit.editors.base import Stopwatch
from lit_edit.ledger.edit_ledger import EditLedger
from lit_edit.models import ModelAdapter
from lit_edit.targets.contexts import group_weights
from lit_edit.targets.optimize import TargetSettings
from lit_edit.targets.problem import TargetProblem, build_problem
from lit_edit.text.tokens import pad_right, pad_token

PHASES = ("targets", "keys", "solve")
TEXTBOOKS = ("textbook", "textbook, same products")


class TextbookD4S:
    """D4S as one writes it down from the paper: correct, and in no hurry."""

    def __init__(self, adapter: ModelAdapter, tokenizer: Any, editor: D4S, moments: dict[int, Tensor]) -> None:
        self.model, self.adapter, self.tokenizer = adapter.model, adapter, tokenizer
        self.layers, self.settings, self.templates = editor.resolve_layers(adapter), editor.target, editor.templates
        self.prior = {layer: editor.covariance_weight * moments[layer].double() for layer in self.layers}
        self.gram = {layer: torch.zeros_like(prior) for layer, prior in self.prior.items()}
        self.cross = {n: torch.zeros(*adapter.shape(n), dtype=torch.float64) for n in self.layers}
        self.base = {layer: adapter.own_weight(layer).detach().clone() for layer in self.layers}

    def edit(self, request: EditRequest, watch: Stopwatch) -> None:
        problem = build_problem(self.tokenizer, request, self.templates)
        edited = {layer: self.adapter.own_weight(layer).detach().clone() for layer in self.layers}
        with watch("targets"):
            self._write(self.base)  # targets are those of the original model
            state, delta = self._target(problem)
        for index, layer in enumerate(self.layers):
            with watch("keys"):  # lower layers hold this edit by now, the others are original
                key, reached = self._key(problem, layer)
            with watch("solve"):
                residual = (state + delta - reached).double() / (len(self.layers) - index)
                self.gram[layer] += torch.outer(key, key)
                self.cross[layer] += torch.outer(residual, key)
                solved = torch.linalg.solve(self.prior[layer] + self.gram[layer], self.cross[layer].T).T
                edited[layer] = (self.base[layer].double() + self.adapter.to_layout(layer, solved)).float()
                self._write({layer: edited[layer]})

    def _target(self, problem: TargetProblem) -> tuple[Tensor, Tensor]:
        rows = [prompt.ids + problem.target[:-1] for prompt in problem.prompts] + [problem.essence.ids]
        lookups = [prompt.lookup for prompt in problem.prompts] + [problem.essence.lookup]
        ids, mask = pad_right(rows, pad_token(self.tokenizer), self.adapter.device)
        settings: TargetSettings = self.settings
        delta = torch.zeros(self.model.config.hidden_size, requires_grad=True)
        optimizer = torch.optim.Adam([delta], lr=settings.lr)
        found: dict[str, Tensor] = {}
        every = torch.arange(len(rows))

        def add_delta(module: Any, args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            if "h0" not in found:
                found["h0"] = hidden[0, lookups[0]].detach().clone()
            moved = torch.zeros_like(hidden)
            moved[every, lookups] = delta.expand(len(rows), -1)
            hidden = hidden + moved
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        hook = self.adapter.layers[self.layers[-1]].register_forward_hook(add_delta)
        target = torch.tensor(problem.target)
        for step in range(settings.steps):
            optimizer.zero_grad()
            logp = torch.log_softmax(self.model(input_ids=ids, attention_mask=mask).logits, -1)
            nlls, said = [], True
            for row, text in enumerate(rows[:-1]):
                here = logp[row, len(text) - len(target) : len(text)]
                nlls.append(-here.gather(1, target[:, None]).mean())
                said = said and bool((here.argmax(1) == target).all())
            nll = torch.stack(nlls)
            essence = logp[-1, lookups[-1]]
            found.setdefault("essence", essence.detach().clone())
            kl = settings.kl_factor * (essence.exp() * (essence - found["essence"])).sum()
            loss = nll.mean() + kl + settings.weight_decay * delta.norm() / found["h0"].norm() ** 2
            probability = torch.exp(-nll).mean().item()
            if loss.item() < settings.loss_threshold or (
                settings.probability and said and probability >= settings.probability
            ):
                break
            if step < settings.steps - 1:
                loss.backward()
                optimizer.step()
                radius = settings.clamp * found["h0"].norm()
                if delta.norm() > radius:
                    delta.data *= radius / delta.norm()
        hook.remove()
        return found["h0"], delta.detach()

    @torch.no_grad()
    def _key(self, problem: TargetProblem, layer: int) -> tuple[Tensor, Tensor]:
        ids, mask = pad_right([p.ids for p in problem.prompts], pad_token(self.tokenizer), self.adapter.device)
        lookups = [prompt.lookup for prompt in problem.prompts]
        found: dict[str, Any] = {}
        hooks = [
            self.adapter.down_proj(layer).register_forward_pre_hook(lambda m, args: found.update(key=args[0])),
            self.adapter.layers[self.layers[-1]].register_forward_hook(lambda m, args, out: found.update(out=out)),
        ]
        self.model(input_ids=ids, attention_mask=mask)
        for hook in hooks:
            hook.remove()
        keys = found["key"].view(*ids.shape, -1)[torch.arange(len(lookups)), lookups].double()
        key = (torch.tensor(group_weights(self.templates), dtype=torch.float64)[:, None] * keys).sum(0)
        out = found["out"][0] if isinstance(found["out"], tuple) else found["out"]
        return key, out[0, lookups[0]]

    @torch.no_grad()
    def _write(self, weights: dict[int, Tensor]) -> None:
        for layer, weight in weights.items():
            self.adapter.own_weight(layer).copy_(weight)


def read_editor(name: str) -> D4S:
    """Make the D4S editor of a shipped config."""
    settings = yaml.safe_load(Path(find_config(name)).read_text(encoding="utf-8"))["model"]["editor"]["init_args"]
    return D4S(**settings | {"target": TargetSettings(**settings["target"])})


def run_textbook(
    textbook: TextbookD4S, requests: Sequence[EditRequest], same_products: bool, seconds: dict[str, float]
) -> Iterator[int]:
    watch = Stopwatch(seconds)
    for number, request in enumerate(requests, 1):
        with textbook.adapter.fast_products() if same_products else nullcontext():
            textbook.edit(request, watch)
        yield number


def run_engine(
    editor: D4S, ledger: EditLedger, requests: Sequence[EditRequest], window: int, seconds: dict[str, float]
) -> Iterator[int]:
    for number, spent in enumerate(make_edits(editor, ledger, requests, window), 1):
        for phase, value in spent.items():
            seconds[phase] = seconds.get(phase, 0.0) + value
        yield number


def main() -> None:
    parser = make_parser(__doc__, edits=20)
    add_model(parser)
    parser.add_argument("--windows", type=int, nargs="+", default=[32, 1, 8], help="the first is the default window")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    requests = read_data(options.data, options.edits).requests[: options.edits]
    adapter, tokenizer = load_model(options.model)
    moments = KeyStatistics(tokens=options.tokens).compute(adapter, tokenizer, D4S().resolve_layers(adapter))

    seconds: dict[str, dict[str, float]] = {}
    variants: dict[str, Iterator[int]] = {}
    first = D4S()
    first.prepare(EditLedger(adapter, first.resolve_layers(adapter)), tokenizer, moments)
    for name in TEXTBOOKS:
        textbook = TextbookD4S(adapter, tokenizer, first, moments)
        variants[name] = run_textbook(textbook, requests, name != "textbook", seconds.setdefault(name, {}))
    editors = {f"engine, window {window}": (D4S(), window) for window in options.windows}
    editors["turbo"] = (read_editor("method/d4s_turbo"), options.windows[0])
    for name, (editor, window) in editors.items():
        ledger = EditLedger(adapter, editor.resolve_layers(adapter))
        editor.prepare(ledger, tokenizer, moments)
        variants[name] = run_engine(editor, ledger, requests, window, seconds.setdefault(name, {}))

    # Every variant has weights of its own; they take turns, the one with the fewest edits first.
    layers = first.resolve_layers(adapter)
    weights = {name: {n: adapter.own_weight(n).detach().clone() for n in layers} for name in variants}
    done = dict.fromkeys(variants, 0)
    while min(done.values()) < len(requests):
        name = min(done, key=lambda v: done[v])
        with torch.no_grad():
            for layer in layers:
                adapter.own_weight(layer).copy_(weights[name][layer])
        done[name] = next(variants[name])
        weights[name] = {n: adapter.own_weight(n).detach().clone() for n in layers}
        if name == "textbook":
            print(f"edit {done[name]}/{len(requests)}", flush=True)

    per_edit = {name: {p: spent.get(p, 0.0) / len(requests) for p in PHASES} for name, spent in seconds.items()}
    total = {name: sum(phases.values()) for name, phases in per_edit.items()}
    reference = weights["textbook"]

    def difference(name: str, base: dict[int, Tensor]) -> float:
        pairs = [(weights[name][n] - base[n], reference[n] - base[n]) for n in layers]
        return max(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in pairs)

    nothing = {n: torch.zeros_like(weight) for n, weight in reference.items()}  # else of updates
    titles = [*PHASES, "all", "ratio", "same products", "weights differ", "updates differ"]
    print(f"\n{'seconds per edit':26s}" + "".join(f"{title:>16s}" for title in titles))
    for name, phases in per_edit.items():
        times = "".join(f"{phases[phase]:16.3f}" for phase in PHASES)
        ratios = "".join(f"{total[book] / total[name]:15.1f}x" for book in TEXTBOOKS)
        differ = "".join(f"{difference(name, base):16.1e}" for base in (nothing, textbook.base))
        print(f"{name:26s}{times}{total[name]:16.3f}{ratios}{differ}")
    engines = [name for name in editors if name != "turbo"]

    def ratios_to(book: str, suffix: str) -> dict[str, float | None]:
        return {
            f"engine_ratio{suffix}": total[book] / total[engines[0]],
            f"engine_window1_ratio{suffix}": total[book] / total["engine, window 1"] if 1 in options.windows else None,
            f"turbo_ratio{suffix}": total[book] / total["turbo"],
        }

    result = {
        "model": options.model,
        "edits": len(requests),
        "threads": torch.get_num_threads(),
        "seconds_per_edit": {name: {**phases, "all": total[name]} for name, phases in per_edit.items()},
        **ratios_to("textbook", ""),
        **ratios_to("textbook, same products", "_same_products"),
        "max_relative_difference": max(difference(name, nothing) for name in engines),
        "max_relative_difference_of_updates": max(difference(name, textbook.base) for name in engines),
    }
    write_result(options.json, result)


if __name__ == "__main__":
    main()
