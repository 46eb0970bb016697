"""Targets of attention and MLP together (PMET), against a loop over the whole model with hooks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_edit import TargetSettings
from lit_edit.models.adapter import ModelAdapter
from lit_edit.targets.optimize import optimise_targets
from lit_edit.targets.problem import TargetProblem, build_problem
from lit_edit.testing import tiny_model, tiny_requests, tiny_tokenizer

LAYER = 1
SETTINGS = TargetSettings(steps=6, moved="modules", kl_factor=0.2, weight_decay=0.3, loss_threshold=-1.0)
TEMPLATES = (("{}",), ("Well. {}", "So it is. {}"))
FAMILIES = ("gpt2", "llama", "gpt_neox", "opt", "phi3", "gptj")
NAMES = {
    "gpt2": "attn",
    "llama": "self_attn",
    "gpt_neox": "attention",
    "opt": "self_attn",
    "phi3": "self_attn",
    "gptj": "attn",
}


def naive(model: Any, family: str, problem: TargetProblem, settings: TargetSettings) -> tuple[Tensor, Tensor]:
    """Return the MLP's vector and output, fitted by running everything at every step, row by row."""
    adapter = ModelAdapter(model)
    layer = adapter.layers[LAYER]
    mlp, attention = adapter.down_proj(LAYER), layer.get_submodule(NAMES[family])
    width = adapter.shape(LAYER)[0]
    vectors = torch.zeros(2, width, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([vectors], lr=settings.lr)
    seen: dict[str, Tensor] = {}

    def run(ids: tuple[int, ...], lookup: int) -> Tensor:
        def hook(which: int, name: str) -> Any:
            def add(module: Any, inputs: Any, output: Any) -> Any:
                own = output[0] if isinstance(output, tuple) else output
                flat = own.reshape(-1, width)
                seen.setdefault(name, flat[lookup].detach())
                at = torch.zeros(len(flat), 1, dtype=own.dtype)
                at[lookup] = 1
                moved = (flat + at * vectors[which]).view_as(own)
                return (moved, *output[1:]) if isinstance(output, tuple) else moved

            return add

        hooks = [mlp.register_forward_hook(hook(0, "mlp")), attention.register_forward_hook(hook(1, "attention"))]
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for handle in hooks:
            handle.remove()
        return logits

    base: Tensor | None = None
    for step in range(settings.steps):
        nll = torch.zeros((), dtype=torch.float64)
        for prompt in problem.prompts:
            logp = run(prompt.ids + problem.target[:-1], prompt.lookup)
            said = logp[len(prompt.ids) - 1 :]
            nll = nll - said.gather(1, torch.tensor(problem.target)[:, None]).mean() / len(problem.prompts)
        now = run(problem.essence.ids, problem.essence.lookup)[problem.essence.lookup]
        base = now.detach() if base is None else base
        kl = (now.exp() * (now - base)).sum()
        lengths = torch.stack([seen["mlp"].norm(), seen["attention"].norm()])
        norms = torch.stack([v.norm() if v.detach().norm() > 0 else v.sum() * 0 for v in vectors])
        loss = nll + settings.kl_factor * kl + settings.weight_decay * (norms / lengths**2).sum()
        if step == settings.steps - 1:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for vector, length in zip(vectors, lengths, strict=True):
                vector *= min(1.0, float(settings.clamp * length / vector.norm()))
    return vectors[0].detach(), seen["mlp"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("clamp", [0.5, 100.0])
def test_both_modules_are_moved_as_by_hooks_on_the_whole_model(family: str, clamp: float) -> None:
    model = tiny_model(family, torch.float64)
    settings = replace(SETTINGS, clamp=clamp)
    problems = [build_problem(tiny_tokenizer(), request, TEMPLATES) for request in tiny_requests()[:2]]
    targets = optimise_targets(ModelAdapter(model), problems, LAYER, settings)
    for problem, target in zip(problems, targets, strict=True):
        vector, output = naive(model, family, problem, settings)
        # Some families normalise and rotate in float32, in other orders for other shapes.
        loose = {"rtol": 1e-9, "atol": 1e-9} if family in ("gpt2", "opt", "gpt_neox") else {"rtol": 2e-3, "atol": 1e-4}
        torch.testing.assert_close(target.base, output, **loose)
        torch.testing.assert_close(target.delta, vector, **loose)
        assert float(target.delta.norm()) > 0
        assert len(target.trace) == settings.steps
