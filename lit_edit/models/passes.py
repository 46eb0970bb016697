"""Forward passes, cut where editing needs them cut: parts of them, what layers read on the way, texts that follow."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import DynamicCache, PreTrainedModel

from lit_edit.models.kernels import Kernels
from lit_edit.models.shards import stand_ins

CACHE_NAMES = ("past_key_values", "layer_past")
"""What layers call the cache of attention keys and values."""


class _StopForward(Exception):  # noqa: N818 - a signal, not an error
    """Raised by a hook to leave a forward pass early; never reaches the caller."""


class Passes(Kernels):
    """The passes of a view: with its weights, its memory and its kernels."""

    _signatures: list[inspect.Signature]
    _returned: list[Any]

    def record_calls(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, dict[int, dict[str, Any]]]:
        """Return the first layer's input ``(batch, time, d_model)``, and how the model would call each of its layers.

        No layer is run: the keyword arguments (masks, positions, rotary tables) are by layer. Padding may be on either
        side.
        """
        calls: dict[int, dict[str, Any]] = {}
        first: list[Tensor] = []

        def stand_in(index: int) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, calls[index] = self._bind(index, args, kwargs)
                if index == 0:
                    first.append(hidden)
                if index == self.n_layers - 1:
                    raise _StopForward
                return self._as_output(hidden)

            return forward

        with ExitStack() as stack, suppress(_StopForward):
            if self.spec.tail == "model":
                self._as_output(torch.empty(0))  # seen before the layers are replaced
            self._replace_layers(stack, stand_in)
            self._run_backbone(input_ids, attention_mask)
        return first[0], calls

    def run_layers(self, hidden: Tensor, calls: Mapping[int, Mapping[str, Any]], start: int, stop: int) -> Tensor:
        """Continue a pass: layers ``start .. stop - 1`` on ``hidden`` ``(batch, time, d_model)``."""
        for index in range(start, stop):
            hidden = self.run_layer(index, hidden, calls[index])
        return hidden

    @contextmanager
    def record_keys(self, layers: Sequence[int], stop_after_last: bool = False) -> Iterator[dict[int, Tensor]]:
        """Record the down-projection inputs of layers, by layer, during passes run inside this context.

        A pass may be left as soon as the highest of them has been read.
        """
        keys: dict[int, Tensor] = {}
        last = max(layers) if stop_after_last else None

        def reader(layer: int) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                keys[layer] = args[0]
                if layer == last and not self.sharded:
                    raise _StopForward

            return hook

        def leave(*_: Any) -> None:
            raise _StopForward

        with ExitStack() as stack:
            if last is not None and self.sharded:  # the layer runs to its end: FSDP then puts its weights away
                stack.callback(self.layers[last].register_forward_hook(leave).remove)
            for layer in layers:
                stack.callback(self.down_proj(layer).register_forward_pre_hook(reader(layer)).remove)
            yield keys

    def _as_output(self, hidden: Tensor) -> Any:
        """Return states as the layers of this model return them: as a tensor, or as the first of several things."""
        if self.spec.tail == "parts":
            return hidden if self.packs else (hidden,)
        if not self._returned:  # one token is run to see it
            hook = self.layers[0].register_forward_hook(lambda module, args, output: self._returned.append(output))
            try:
                one = torch.zeros(1, 1, dtype=torch.long, device=self.device)
                with torch.no_grad():
                    self._run_backbone(one, torch.ones_like(one))
            finally:
                hook.remove()
        form = self._returned[0]
        return type(form)((hidden, *[None] * (len(form) - 1))) if isinstance(form, (tuple, list)) else hidden

    def last_hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the final, normalised hidden states ``(batch, time, d_head)``: what :meth:`logits` are made of."""
        if self.spec.tail == "parts":
            return self._run_backbone(input_ids, attention_mask).last_hidden_state
        found: list[Tensor] = []
        hook = self.layers[-1].register_forward_hook(lambda module, args, output: found.append(first_of(output)))
        try:
            self._run_backbone(input_ids, attention_mask)
        finally:
            hook.remove()
        return found[0]

    def read_keys(self, input_ids: Tensor, attention_mask: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
        """Return ``{layer: (batch, time, d_in)}`` of one pass that stops at the highest layer asked for."""
        with self.record_keys(layers, stop_after_last=True) as keys, suppress(_StopForward):
            self._run_backbone(input_ids, attention_mask)
        return {layer: key.reshape(*input_ids.shape, -1) for layer, key in keys.items()}

    @torch.no_grad()
    def generate(self, input_ids: Tensor, seed: int | None = None, **settings: Any) -> Tensor:
        """Continue rows of equal length, without padding, with transformers' ``generate`` and this view's weights.

        A seed is for sampling; the global random state is left as it was. Returns the rows with their continuations,
        ``(batch, longer time)``.
        """
        settings |= {"attention_mask": torch.ones_like(input_ids), "max_length": None}
        weights = {} if self.sharded else {f"model.{name}": weight for name, weight in self.weights.items()}
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices, enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            with self.lent() if self.sharded else self.patched():
                rows: Tensor = functional_call(_Generate(self.model), weights, (input_ids,), settings)
        return rows

    @torch.no_grad()
    def sample(self, input_ids: Tensor, new: int, top_k: int, seed: int) -> Tensor:
        """Let the model go on with rows of equal length, each token drawn from its ``top_k`` most probable ones.

        Much faster than ``generate`` for many rows, which draws from the whole vocabulary. Returns
        ``(batch, time + new)``; the global random state is left as it was.
        """
        generator = torch.Generator(device=self.device).manual_seed(seed)

        def draw(logits: Tensor, step: int) -> Tensor:
            likely = logits.topk(min(top_k, logits.shape[-1]))
            choice = torch.multinomial(torch.softmax(likely.values, -1), 1, generator=generator)
            return likely.indices.gather(1, choice)

        return self.go_on(input_ids, new, draw)

    @torch.no_grad()
    def go_on(self, input_ids: Tensor, new: int, choose: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Let the model go on with rows of equal length, to ``(batch, time + new)``; no token ends a row.

        ``choose`` returns the next tokens ``(batch, 1)`` from logits ``(batch, vocab)`` and the number of the step.
        """
        cache, rows, step = DynamicCache(config=self.model.config), input_ids, input_ids
        for number in range(new):
            with self.fast_products():
                if self.spec.tail == "model":  # whose caches are of many kinds
                    states = self.last_hidden(rows, torch.ones_like(rows))[:, -1]
                else:
                    states = self._run_backbone(step, torch.ones_like(rows), cache).last_hidden_state[:, -1]
                logits = self.logits(states)
            step = choose(logits, number)
            rows = torch.cat([rows, step], 1)
        return rows

    def finish(self, hidden: Tensor) -> Tensor:
        """Apply final norm (and what follows it) to the output of the last layer, if :meth:`logits` do not."""
        if self.norm is not None:
            hidden = self.norm(hidden)
        return hidden if self.post_norm is None else self.post_norm(hidden)

    def logits(self, normalised: Tensor) -> Tensor:
        """Apply the head to :meth:`finish`-ed states ``(..., d_head)``; returns ``(..., vocab)``, at least float32."""
        if self.spec.tail == "model":
            logits = self._tail(normalised.reshape(-1, 1, normalised.shape[-1])).view(*normalised.shape[:-1], -1)
        elif self.head_weight is None:
            logits = self.head(normalised)
        else:
            logits = functional_call(self.head, {"weight": self.head_weight}, (normalised,))
        cap = getattr(self.model.config, self.spec.logit_softcap, None) if self.spec.logit_softcap else None
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()

    def _tail(self, hidden: Tensor) -> Tensor:
        """Return what the model, run without its layers, makes of the output of the last ``(rows, 1, d_model)``."""
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)

        def stand_in(index: int) -> Any:
            return lambda *args, **kwargs: self._as_output(hidden)

        self._as_output(hidden)
        with ExitStack() as stack:
            self._replace_layers(stack, stand_in)
            logits: Tensor = self.model(**self._accepted(self.model, {"input_ids": ids, "use_cache": False})).logits
        return logits

    def _replace_layers(self, stack: ExitStack, stand_in: Callable[[int], Any]) -> None:
        """Let functions stand for the layers until the stack ends."""
        if self.sharded:  # the layers themselves would gather their weights
            stack.enter_context(stand_ins(self._module(self.spec.layers), stand_in))
            return
        for index, layer in enumerate(self.layers):
            if "forward" in vars(layer):  # somebody else's, as accelerate puts there
                stack.callback(vars(layer).__setitem__, "forward", vars(layer)["forward"])
            else:
                stack.callback(vars(layer).pop, "forward")
            layer.forward = stand_in(index)  # shadows the method of the class

    @staticmethod
    def _accepted(module: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments that a module's forward has a name for, or takes without one."""
        known: Mapping[str, inspect.Parameter | None] = inspect.signature(module.forward).parameters
        if any(p is not None and p.kind is p.VAR_KEYWORD for p in known.values()):
            known = {**known, **dict.fromkeys(("input_ids", "attention_mask", "position_ids", "use_cache"))}
        return {name: value for name, value in arguments.items() if name in known}

    def _run_backbone(self, input_ids: Tensor, attention_mask: Tensor, cache: DynamicCache | None = None) -> Any:
        positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        kwargs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            # Positions count tokens, not padding: left padding must not move them.
            "position_ids": positions[:, -input_ids.shape[1] :],
            "use_cache": cache is not None,
            "past_key_values": cache,
        }
        if self.spec.family == "opt" or self.whole:  # derive positions from the mask, or from the rows' beginning
            del kwargs["position_ids"]
        if self.spec.tail == "model":
            kwargs = self._accepted(self.backbone, kwargs)
        if self.sharded:
            with self.lent():
                return self.backbone(**kwargs)
        local = {name.removeprefix(self.backbone_prefix): value for name, value in self.weights.items()}
        with self.patched():
            return functional_call(self.backbone, local, (), kwargs) if local else self.backbone(**kwargs)

    def run_layer(self, index: int, hidden: Tensor, call: Mapping[str, Any]) -> Tensor:
        """Run one layer on ``hidden`` ``(batch, time, d_model)``."""
        if self.sharded:
            with self.lent(index):
                return first_of(self.layers[index](hidden, **call))
        prefix = self.layer_prefix(index)
        local = {n.removeprefix(prefix): w for n, w in self.weights.items() if n.startswith(prefix)}
        layer = self.layers[index]
        with self.patched(index):
            output = functional_call(layer, local, (hidden,), dict(call)) if local else layer(hidden, **call)
        return first_of(output)

    def mask_like(self, allowed: Tensor) -> Tensor:
        """Turn booleans into the mask that the model's attention takes: additive floats for eager attention."""
        if self.attention != "eager":
            return allowed
        return torch.zeros_like(allowed, dtype=self.dtype).masked_fill(~allowed, torch.finfo(self.dtype).min)

    def _bind(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Name the positional arguments of a layer call; return the hidden states and the rest."""
        arguments = dict(self._signatures[index].bind(*args, **kwargs).arguments)
        arguments.update(arguments.pop("kwargs", {}))
        hidden = arguments.pop(next(iter(self._signatures[index].parameters)))
        for name in CACHE_NAMES:
            if name in arguments:
                arguments[name] = None
        if "use_cache" in arguments:
            arguments["use_cache"] = False
        return hidden, arguments


class _Generate(nn.Module):
    """``generate`` as a forward pass, so that ``functional_call`` can lend it other weights."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, ids: Tensor, **settings: Any) -> Tensor:
        rows: Tensor = self.model.generate(ids, **settings)
        return rows


def first_of(output: Any) -> Tensor:
    """Decoder layers return a tensor or a tuple that starts with one, depending on family and release."""
    return output[0] if isinstance(output, (tuple, list)) else output
