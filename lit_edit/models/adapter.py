"""Reading a model: structure, weights, and forward passes cut where editing needs them cut."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_edit.devices.algebra import for_algebra
from lit_edit.devices.ranks import Ranks
from lit_edit.errors import ArgumentError, UserError
from lit_edit.models.families import SPECS
from lit_edit.models.memory import Memory, Patch, Route
from lit_edit.models.products import Products, bfloat16_pays, choose_kernel, use_kernel
from lit_edit.models.shards import is_sharded, lend, stand_ins, whole, written_class
from lit_edit.models.spec import ArchSpec

CACHE_NAMES = ("past_key_values", "layer_past")
"""What layers call the cache of attention keys and values."""


class UnknownArchitectureError(UserError):
    """The model's family is not described, or its description does not fit the model."""


class _StopForward(Exception):  # noqa: N818 - a signal, not an error
    """Raised by a hook to leave a forward pass early; never reaches the caller."""


@dataclass
class Trace:
    """What one forward pass left behind, enough to continue it from a layer.

    Attributes:
        hidden: ``(batch, time, d_model)``, the input of layer :attr:`at` (the output of layer ``at - 1``).
        at: The layer that :attr:`hidden` enters.
        calls: Keyword arguments with which the model called each layer ``>= at`` (masks, positions, rotary tables).
        attention_mask: ``(batch, time)``, 1 for tokens and 0 for padding.
    """

    hidden: Tensor
    at: int
    calls: dict[int, dict[str, Any]]
    attention_mask: Tensor


def find_spec(model: nn.Module) -> ArchSpec:
    """Return the description of a model's family.

    Raises:
        UnknownArchitectureError: If no family fits; the message lists the model's modules and says what to write.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    for spec in SPECS:
        if model_type in spec.model_types:
            return spec
    known = ", ".join(sorted(spec.family for spec in SPECS))
    raise UnknownArchitectureError(
        f"architecture {model_type!r} is not described (known: {known}).\n{_describe(model)}"
    )


def _describe(model: nn.Module) -> str:
    names = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "{}", name) for name, _ in model.named_modules() if name)
    listing = "\n".join(f"  {name}" for name in names)
    return (
        f"The modules of this model ({{}} stands for the layer number):\n{listing}\n"
        "Describe it in YAML and pass the file with --config:\n"
        "  model:\n    language_model:\n      arch:\n"
        "        family: my-family\n        layers: <path to the list of decoder layers>\n"
        "        down_proj: <path from one layer to the MLP down projection>\n"
        "        norm: <path to the final norm, or null>"
    )


class ModelAdapter:
    """A causal language model as editors see it.

    The adapter reads and never writes. To look at the model with other weights (the original ones, or an update that
    is not committed yet) make a view of it with :meth:`with_weights`.

    Args:
        model: A decoder-only Hugging Face model in evaluation mode.
        spec: Its family's description; found by ``config.model_type`` when not given.
        weights: Parameters to use in place of the model's own, by full name.
        products: Which kernel multiplies float32 matrices on a CPU (:mod:`lit_edit.models.products`).

    Attributes:
        ranks: The processes that share the work on this model; whoever starts several says so here.
        sharded: Whether they hold a part of each layer each.
        memory: What the model computes with beside its weights; whoever keeps one says so here.

    Raises:
        UnknownArchitectureError: If the family is unknown or ``spec`` names modules that the model does not have.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        spec: ArchSpec | None = None,
        weights: Mapping[str, Tensor] | None = None,
        products: Products = "auto",
    ) -> None:
        self.model = model
        self.products = products
        self._bfloat16: bool | None = None
        self.rounded_to: torch.dtype | None = None
        self.head_weight: Tensor | None = None
        self.ranks = Ranks()
        self.memory: Memory | None = None
        self.sharded = any(is_sharded(parameter) for parameter in model.parameters())
        self.spec = spec or find_spec(model)
        self.weights = dict(weights or {})
        self.layers = list(self._module(self.spec.layers))
        if not self.layers:
            raise UnknownArchitectureError(f"{self.spec.layers!r} holds no layers.\n{_describe(model)}")
        self.norm = self._optional(self.spec.norm)
        self.post_norm = self._optional(self.spec.post_norm)
        self.head = self._module(self.spec.head) if self.spec.head else model.get_output_embeddings()
        self.down_proj(0)
        self._backbone: nn.Module = model.base_model
        self._backbone_prefix = next(f"{n}." if n else "" for n, m in model.named_modules() if m is self._backbone)
        self._signatures: dict[int, inspect.Signature] = {}
        code = sys.modules[written_class(self.layers[0]).__module__].__dict__
        # Whether attention goes through transformers' interface, where a line of tokens can be told apart into rows.
        self.packs = (
            "ALL_ATTENTION_FUNCTIONS" in code
            and "eager_attention_forward" in code
            and not getattr(model.config, "reorder_and_upcast_attn", False)
        )
        self.attention = "eager" if model.config._attn_implementation == "eager" else "sdpa"  # in passes of our own
        self._returns_tuples = not self.packs  # so do the older layers, and only those
        self.layer_configs = list(
            {id(m.config): m.config for layer in self.layers for m in layer.modules() if hasattr(m, "config")}.values()
        )

    # ---- structure ----------------------------------------------------------------------------------------------

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def device(self) -> torch.device:
        """Device of the first edited-layer weight; inputs go there."""
        return self.own_weight(0).device

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the weights."""
        return self.own_weight(0).dtype

    def down_proj(self, layer: int) -> nn.Module:
        """Return the MLP down projection of a layer.

        Raises:
            ValueError: If the model has no such layer.
            UnknownArchitectureError: If the layer has no such module, or the module is neither Linear nor Conv1D.
        """
        self.check_layer(layer)
        try:
            module = self.layers[layer].get_submodule(self.spec.down_proj)
        except AttributeError:
            raise UnknownArchitectureError(
                f"layer {layer} has no module {self.spec.down_proj!r}.\n{_describe(self.model)}"
            ) from None
        if not isinstance(module, (nn.Linear, Conv1D)):
            raise UnknownArchitectureError(
                f"{self.spec.down_proj!r} of layer {layer} is a {type(module).__name__}; "
                "editing needs torch.nn.Linear or transformers' Conv1D (quantised layers cannot be edited: load the "
                "model in float32 or bfloat16)"
            )
        return module

    def check_layer(self, layer: int) -> None:
        """Raise :class:`ArgumentError` unless ``layer`` counts one of the model's layers."""
        if not 0 <= layer < self.n_layers:
            raise ArgumentError(
                f"layer {layer} does not exist: this model has layers 0 to {self.n_layers - 1}; "
                "choose others (the editor's setting layers, or layer)"
            )

    def weight_name(self, layer: int) -> str:
        """Return the full name of the edited parameter of a layer, as in ``model.named_parameters()``."""
        return f"{self.spec.layers}.{layer}.{self.spec.down_proj}.weight"

    def project(self, layer: int, keys: Tensor) -> Tensor:
        """Return what a layer's down projection makes of its inputs ``(n, d_in)``, in this view: ``(n, d_out)``."""
        bias = self.down_proj(layer).bias
        values = torch.nn.functional.linear(keys, self.to_layout(layer, self.weight(layer)))
        return values + whole(bias) if isinstance(bias, Tensor) else values

    def mlp_output(self, layer: int, keys: Tensor) -> Tensor:
        """Return what a layer's MLP adds to the stream, from the inputs of its down projection ``(n, d_in)``."""
        return self._output_norm(layer)(self.project(layer, keys))

    def _output_norm(self, layer: int) -> Callable[[Tensor], Tensor]:
        """Return what stands between a layer's down projection and the residual stream; mostly nothing does."""
        if self.spec.output_norm is None:
            return lambda states: states
        module = self.layers[layer].get_submodule(self.spec.output_norm)
        own = {name: whole(parameter) for name, parameter in module.named_parameters()}

        def norm(states: Tensor) -> Tensor:
            normalised: Tensor = functional_call(module, own, (states,))
            return normalised

        return norm

    def attention_module(self, layer: int) -> nn.Module:
        """Return the attention of a layer: its one module whose class is called so.

        Raises:
            UnknownArchitectureError: If there is none, or more than one.
        """
        self.check_layer(layer)
        found = [m for m in self.layers[layer].modules() if type(m).__name__.endswith("Attention")]
        if len(found) != 1:
            raise UnknownArchitectureError(
                f"layer {layer} has {len(found)} modules whose class ends in 'Attention'; expected one"
            )
        return found[0]

    def weight(self, layer: int) -> Tensor:
        """Return the edited weight of a layer in this view, in the layout the model stores it in."""
        lent = self.weights.get(self.weight_name(layer))
        return whole(self.own_weight(layer)) if lent is None else lent

    def own_weight(self, layer: int) -> nn.Parameter:
        """Return the edited parameter of a layer as the model itself holds it."""
        weight = self.down_proj(layer).weight
        assert isinstance(weight, nn.Parameter)  # noqa: S101 - Linear and Conv1D have no other
        return weight

    def shape(self, layer: int) -> tuple[int, int]:
        """Return ``(d_out, d_in)`` of a layer's down projection, whatever its layout."""
        module = self.down_proj(layer)
        rows, columns = self.own_weight(layer).shape
        return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)

    def to_layout(self, layer: int, delta: Tensor) -> Tensor:
        """Turn a ``(d_out, d_in)`` matrix into the layout of the layer's weight.

        Decided by the module's type: ``Conv1D`` stores ``(d_in, d_out)``, ``Linear`` stores ``(d_out, d_in)``.
        """
        return delta.T if isinstance(self.down_proj(layer), Conv1D) else delta

    def to_weight_residual(self, layer: int, keys: Tensor, residuals: Tensor) -> Tensor:
        r"""Turn what the residual stream lacks into what the down projection's output lacks.

        The same thing for most families. Gemma normalises that output, :math:`N(x) = s \odot x / \mathrm{rms}(x)`,
        before it is added: the output is then to point where :math:`N(x) + r` does, at its old length (only the
        direction passes through the norm).

        Args:
            layer: The edited layer.
            keys: ``(n, d_in)``, the inputs of the down projection.
            residuals: ``(d_out, n)``, in the residual stream, float64.

        Returns:
            ``(d_out, n)``, before the norm.
        """
        if self.spec.output_norm is None:
            return residuals
        norm = self._output_norm(layer)
        weight = self.to_layout(layer, self.weight(layer))  # (d_out, d_in)
        output = keys.to(weight) @ weight.T  # (n, d_out)
        scale = for_algebra(norm(torch.ones_like(output[0])))  # the norm of ones is its scale
        wanted, output = for_algebra(norm(output)) + residuals.T, for_algebra(output)
        direction = wanted / torch.where(scale.abs() < 1e-6, torch.full_like(scale, 1e-6), scale)
        length = torch.linalg.vector_norm(output, dim=1, keepdim=True)
        aimed = direction / torch.linalg.vector_norm(direction, dim=1, keepdim=True) * length
        return (aimed - output).T.to(residuals)

    def with_weights(self, weights: Mapping[str, Tensor]) -> ModelAdapter:
        """Return a view of the same model that computes with other parameters; the model itself is not touched."""
        view = object.__new__(ModelAdapter)
        view.__dict__.update(self.__dict__)
        view.weights = {**self.weights, **weights}
        return view

    def with_memory(self, memory: Memory | None) -> ModelAdapter:
        """Return a view of the same model that computes with a memory, or without the one it has."""
        view = self.with_weights({})
        view.memory = memory
        return view

    @contextmanager
    def patched(self, layer: int | None = None) -> Iterator[None]:
        """Let the model itself compute with this view's memory, in one layer or in all.

        All passes of the view do so anyway. For your own calls of the model: ``with adapter.patched(): model(...)``.
        """
        with ExitStack() as stack:
            for index, patch in ({} if self.memory is None else self.memory.patches()).items():
                if layer is None or layer == index:
                    hook = _patching(patch)
                    stack.callback(self.down_proj(index).register_forward_hook(hook).remove)
            yield

    def routes(self, prompts: Sequence[str]) -> list[Route[ModelAdapter]]:
        """Return how this view answers each prompt."""
        found = None if self.memory is None else self.memory.routes(prompts)
        return [Route() for _ in prompts] if found is None else found

    def rounded(self, dtype: torch.dtype, start: int) -> ModelAdapter:
        """Return a view that multiplies in a shorter type from some layer on: faster, and no longer exact.

        The matrices of those layers and of the head are rounded once; norms, sums and the residual stream stay as they
        are.

        Args:
            dtype: Type of the products.
            start: The first layer whose matrices are rounded.
        """
        if self.sharded:  # its matrices are nowhere whole
            return self
        prefixes = tuple(f"{self.spec.layers}.{layer}." for layer in range(start, self.n_layers))
        matrices = {name: p for name, p in self.model.named_parameters() if name.startswith(prefixes) and p.dim() == 2}
        view = self.with_weights({name: self.weights.get(name, p).detach().to(dtype) for name, p in matrices.items()})
        view.rounded_to, view.head_weight = dtype, self.head.weight.detach().to(dtype)
        return view

    def bfloat16_pays(self) -> bool:
        """Tell whether this device multiplies in bfloat16 clearly faster than in float32."""
        if self.sharded:
            return False
        if self._bfloat16 is not None:
            return self._bfloat16
        if self.device.type == "cpu":
            return bfloat16_pays(torch.get_num_threads())
        return self.device.type == "cuda" and torch.cuda.is_bf16_supported()

    def kernels(self) -> dict[str, Any]:
        """Return what decides about round-off on this machine, as primitives for :meth:`pin_kernels`."""
        threads = torch.get_num_threads()
        exact = self.device.type != "cpu" or self.dtype != torch.float32
        kernel = self.products if self.products != "auto" or exact else choose_kernel(threads)
        return {"products": kernel, "bfloat16": self.bfloat16_pays(), "threads": threads, "device": self.device.type}

    def pin_kernels(self, kernels: Mapping[str, Any]) -> None:
        """Multiply as an earlier process did, whatever a measurement would say now."""
        self.products, self._bfloat16 = kernels["products"], kernels["bfloat16"]

    def _module(self, path: str) -> Any:
        try:
            return self.model.get_submodule(path)
        except AttributeError:
            raise UnknownArchitectureError(
                f"the description of family {self.spec.family!r} names {path!r}, which this "
                f"{type(self.model).__name__} does not have.\n{_describe(self.model)}"
            ) from None

    def _optional(self, path: str | None) -> nn.Module | None:
        if path is None:
            return None
        parent, _, name = path.rpartition(".")
        return getattr(self._module(parent), name, None) if parent else self._module(name)

    # ---- forward passes -----------------------------------------------------------------------------------------

    def fast_products(self) -> AbstractContextManager[None]:
        """Return a context in which matrices are multiplied as this view wants it.

        By default by the fastest kernel that is exact in float32; in a view that is :meth:`rounded`, in its type.
        """
        if self.rounded_to is not None:
            return torch.autocast(self.device.type, self.rounded_to)
        if self.device.type != "cpu" or self.dtype != torch.float32:
            return nullcontext()
        return use_kernel(choose_kernel(torch.get_num_threads()) if self.products == "auto" else self.products)

    def trace(self, input_ids: Tensor, attention_mask: Tensor, at: int, stop: int | None = None) -> Trace:
        """Run the model and record how to continue from layer ``at``.

        Args:
            input_ids: ``(batch, time)`` token ids.
            attention_mask: ``(batch, time)``, padding on either side.
            at: Record the hidden state entering this layer (``n_layers`` records what leaves the last one).
            stop: Record the calls of layers ``at .. stop - 1`` and leave the pass when layer ``stop - 1`` is about to
                run; by default run to the end.

        Returns:
            The trace; its tensors carry gradients only if grad mode is on.
        """
        calls: dict[int, dict[str, Any]] = {}
        found: dict[str, Tensor] = {}

        def before(index: int) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                hidden, call = self._bind(index, args, kwargs)
                calls[index] = call
                if index == at:
                    found["hidden"] = hidden
                if stop is not None and index == stop - 1:
                    raise _StopForward

            return hook

        def after_last(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            found["hidden"] = _first(output)

        with ExitStack() as stack:
            for index in range(at, stop if stop is not None else self.n_layers):
                # Before those of FSDP: a pass that is left then has gathered nothing that would stay.
                handle = self.layers[index].register_forward_pre_hook(before(index), prepend=True, with_kwargs=True)
                stack.callback(handle.remove)
            if at == self.n_layers:
                stack.callback(self.layers[-1].register_forward_hook(after_last).remove)
            with suppress(_StopForward):
                self._run_backbone(input_ids, attention_mask)
        return Trace(found["hidden"], at, calls, attention_mask)

    def record_calls(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, dict[int, dict[str, Any]]]:
        """Return the first layer's input and how the model would call each of its layers, without running them.

        Args:
            input_ids: ``(batch, time)`` token ids.
            attention_mask: ``(batch, time)``, padding on either side.

        Returns:
            ``(batch, time, d_model)``, and by layer the keyword arguments (masks, positions, rotary tables).
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
                return (hidden,) if self._returns_tuples else hidden

            return forward

        for index in range(self.n_layers):
            self._signature(index)
        with ExitStack() as stack, suppress(_StopForward):
            if self.sharded:  # the layers themselves would gather their weights
                stack.enter_context(stand_ins(self._module(self.spec.layers), stand_in))
            for index, layer in enumerate(self.layers if not self.sharded else ()):
                if "forward" in vars(layer):  # somebody else's, as accelerate puts there
                    stack.callback(vars(layer).__setitem__, "forward", vars(layer)["forward"])
                else:
                    stack.callback(vars(layer).pop, "forward")
                layer.forward = stand_in(index)  # shadows the method of the class
            self._run_backbone(input_ids, attention_mask)
        return first[0], calls

    def run_layers(self, hidden: Tensor, calls: Mapping[int, Mapping[str, Any]], start: int, stop: int) -> Tensor:
        """Continue a pass: layers ``start .. stop - 1`` on ``hidden`` ``(batch, time, d_model)``."""
        for index in range(start, stop):
            hidden = self.run_layer(index, hidden, calls[index])
        return hidden

    def record_keys(self, layers: Sequence[int], stop_after_last: bool = False) -> _KeyRecorder:
        """Record the down-projection inputs of layers during passes run inside this context.

        Args:
            layers: The layers to listen to.
            stop_after_last: Leave the pass as soon as the highest of them has been read.
        """
        modules = {layer: self.down_proj(layer) for layer in layers}
        last = self.layers[max(layers)] if self.sharded else None
        return _KeyRecorder(modules, stop_after_last, last)

    def last_hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the final, normalised hidden states ``(batch, time, d_head)``: what the head reads."""
        return self._run_backbone(input_ids, attention_mask).last_hidden_state

    def read_keys(self, input_ids: Tensor, attention_mask: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
        """Return ``{layer: (batch, time, d_in)}`` of one pass that stops at the highest layer asked for."""
        with self.record_keys(layers, stop_after_last=True) as keys, suppress(_StopForward):
            self._run_backbone(input_ids, attention_mask)
        return {layer: key.reshape(*input_ids.shape, -1) for layer, key in keys.items()}

    @torch.no_grad()
    def generate(self, input_ids: Tensor, seed: int | None = None, **settings: Any) -> Tensor:
        """Continue rows of equal length with transformers' ``generate``, with the weights of this view.

        Args:
            input_ids: ``(batch, time)``, without padding.
            seed: Seeds sampling; the global random state is left as it was.
            settings: Passed to ``generate``.

        Returns:
            ``(batch, longer time)``, the rows with their continuations.
        """
        settings |= {"attention_mask": torch.ones_like(input_ids), "max_length": None}
        weights = {f"model.{name}": weight for name, weight in self.weights.items()}
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices, enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            if self.sharded:
                with self._lent():
                    continued: Tensor = _Generate(self.model)(input_ids, **settings)
                return continued
            with self.patched():
                rows: Tensor = functional_call(_Generate(self.model), weights, (input_ids,), settings)
        return rows

    @torch.no_grad()
    def sample(self, input_ids: Tensor, new: int, top_k: int, seed: int) -> Tensor:
        """Let the model go on with rows of equal length, each token drawn from its ``top_k`` most probable ones.

        Much faster than ``generate`` for many rows, which draws from the whole vocabulary.

        Args:
            input_ids: ``(batch, time)``, without padding.
            new: Tokens to add to each row.
            top_k: Draw from this many.
            seed: Seeds the drawing; the global random state is left as it was.

        Returns:
            ``(batch, time + new)``.
        """
        generator = torch.Generator(device=self.device).manual_seed(seed)

        def draw(logits: Tensor, step: int) -> Tensor:
            likely = logits.topk(min(top_k, logits.shape[-1]))
            choice = torch.multinomial(torch.softmax(likely.values, -1), 1, generator=generator)
            return likely.indices.gather(1, choice)

        return self.go_on(input_ids, new, draw)

    @torch.no_grad()
    def go_on(self, input_ids: Tensor, new: int, choose: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Let the model go on with rows of equal length; no token ends a row.

        Args:
            input_ids: ``(batch, time)``, without padding.
            new: Tokens to add to each row.
            choose: Returns the next tokens ``(batch, 1)`` from logits ``(batch, vocab)`` and the number of the step.

        Returns:
            ``(batch, time + new)``.
        """
        cache, rows, step = DynamicCache(config=self.model.config), input_ids, input_ids
        for number in range(new):
            with self.fast_products():
                states = self._run_backbone(step, torch.ones_like(rows), cache).last_hidden_state[:, -1]
                logits = self.logits(states)
            step = choose(logits, number)
            rows = torch.cat([rows, step], 1)
        return rows

    def finish(self, hidden: Tensor) -> Tensor:
        """Apply final norm (and what follows it) to the output of the last layer."""
        if self.norm is not None:
            hidden = self.norm(hidden)
        return hidden if self.post_norm is None else self.post_norm(hidden)

    def logits(self, normalised: Tensor) -> Tensor:
        """Apply the head to :meth:`finish`-ed states ``(..., d_head)``; returns ``(..., vocab)``, at least float32."""
        if self.head_weight is None:
            logits = self.head(normalised)
        else:
            logits = functional_call(self.head, {"weight": self.head_weight}, (normalised,))
        cap = getattr(self.model.config, self.spec.logit_softcap, None) if self.spec.logit_softcap else None
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()

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
        if self.spec.family == "opt":  # OPT derives its positions from the mask, with an offset of its own.
            del kwargs["position_ids"]
        if self.sharded:
            with self._lent():
                return self._backbone(**kwargs)
        local = {name.removeprefix(self._backbone_prefix): value for name, value in self.weights.items()}
        with self.patched():
            return functional_call(self._backbone, local, (), kwargs) if local else self._backbone(**kwargs)

    def run_layer(self, index: int, hidden: Tensor, call: Mapping[str, Any]) -> Tensor:
        """Run one layer on ``hidden`` ``(batch, time, d_model)``."""
        if self.sharded:
            with self._lent(index):
                return _first(self.layers[index](hidden, **call))
        prefix = f"{self.spec.layers}.{index}."
        local = {n.removeprefix(prefix): w for n, w in self.weights.items() if n.startswith(prefix)}
        layer = self.layers[index]
        with self.patched(index):
            output = functional_call(layer, local, (hidden,), dict(call)) if local else layer(hidden, **call)
        return _first(output)

    @contextmanager
    def _lent(self, layer: int | None = None) -> Iterator[None]:
        """Let the down projections of a model in parts (of one layer, or all) compute with this view's weights."""
        with ExitStack() as stack:
            for index in range(self.n_layers) if layer is None else (layer,):
                if (weight := self.weights.get(self.weight_name(index))) is not None:
                    stack.enter_context(lend(self.down_proj(index), weight))
            yield

    def _signature(self, index: int) -> inspect.Signature:
        if index not in self._signatures:
            self._signatures[index] = inspect.signature(self.layers[index].forward)
        return self._signatures[index]

    def mask_like(self, allowed: Tensor) -> Tensor:
        """Turn booleans into the mask that the model's attention takes: additive floats for eager attention."""
        if self.attention != "eager":
            return allowed
        return torch.zeros_like(allowed, dtype=self.dtype).masked_fill(~allowed, torch.finfo(self.dtype).min)

    def _bind(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Name the positional arguments of a layer call; return the hidden states and the rest."""
        arguments = dict(self._signature(index).bind(*args, **kwargs).arguments)
        arguments.update(arguments.pop("kwargs", {}))
        hidden = arguments.pop("hidden_states")
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
        """Return the continued rows."""
        rows: Tensor = self.model.generate(ids, **settings)
        return rows


class _KeyRecorder:
    """Context that collects the inputs of some modules, by layer."""

    def __init__(self, modules: Mapping[int, nn.Module], stop_after_last: bool, layer: nn.Module | None) -> None:
        self._modules = modules
        self._last = max(modules) if stop_after_last else None
        self._layer = layer  # the last one, if it is to run to its end: FSDP then puts its weights away
        self._stack = ExitStack()

    def __enter__(self) -> dict[int, Tensor]:
        keys: dict[int, Tensor] = {}

        def reader(layer: int) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                keys[layer] = args[0]
                if layer == self._last and self._layer is None:
                    raise _StopForward

            return hook

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            raise _StopForward

        if self._last is not None and self._layer is not None:
            self._stack.callback(self._layer.register_forward_hook(leave).remove)

        for layer, module in self._modules.items():
            self._stack.callback(module.register_forward_pre_hook(reader(layer)).remove)
        return keys

    def __exit__(self, *exception: object) -> None:
        self._stack.close()


def _patching(patch: Patch) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    """Return a patch as a hook of the module behind which it stands."""
    return lambda module, args, output: patch(args[0], output)


def _first(output: Any) -> Tensor:
    """Decoder layers return a tensor or a tuple that starts with one, depending on family and release."""
    return output[0] if isinstance(output, tuple) else output
