r"""The hyper-network of MEND (arXiv 2110.11309): from the factors of a gradient to those of a better update.

The gradient of a linear layer is a sum over the tokens that are read,
:math:`\nabla_W L = \sum_t \delta_t u_t^\top`, with the layer's input :math:`u_t` and the gradient :math:`\delta_t` at
its output. The network maps each pair of factors to another (the paper's section 3.1, equation 3),
:math:`z = [\bar u; \bar\delta]` normalised by mean and deviation over what has been seen in training:

.. math::

    h = z + \sigma(s^1_\ell \odot (U_1 V_1 z + b_1) + o^1_\ell), \qquad
    [\tilde u; \tilde\delta] = h + s^2_\ell \odot (U_2 V_2 h + b_2) + o^2_\ell,

and the edit is :math:`W_\ell - \alpha_\ell \sum_t \tilde\delta_t \tilde u_t^\top`. All layers of one shape share
:math:`U, V, b`; scale :math:`s_\ell`, offset :math:`o_\ell` and rate :math:`\alpha_\ell` are a layer's own.
:math:`U` begins at zero and :math:`s_\ell` at one: a new network, which has seen nothing to normalise by, makes a plain
gradient step. Once it has seen something it maps normalised factors to factors of that scale, as published.

As in the released code: one hidden layer, rank 1920, ReLU on the hidden layer only (the paper's equation has one on the
last layer as well), no edit where an input or a gradient is zero, and no counting of it either. Different: each layer
has a normaliser of its own, where the released code has one for all layers of a shape, and a block of tokens is counted
at once; only down projections are edited, where the paper edits other matrices of the MLPs as well; entries that have
never varied become zero.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lit_edit.errors import ArgumentError, check_least, check_positive
from lit_edit.files.checksum import checksum
from lit_edit.files.paths import write_atomically
from lit_edit.files.tensor_files import save_tensors
from lit_edit.solvers.functional import FactsError
from lit_edit.solvers.lifelong_normalization import RunningMoments, merge_moments, normalise

if TYPE_CHECKING:
    from lit_edit.models.adapter import ModelAdapter

FORMAT = "lit-edit MEND network 1"
HOW_TO_TRAIN = "lit-edit fit --config train/mend --data.path counterfact.json --run_name mend"


@dataclass(frozen=True)
class NetworkOrigin:
    """The model that a network was trained for.

    Attributes:
        model: Its name, for people.
        model_type: Of its config.
        n_layers: How many decoder layers it has.
        shapes: By edited layer, ``(d_out, d_in)``.
        weights: By edited layer, a checksum of the original weight, rounded to bfloat16: the type that a model is
            loaded in makes no difference.
    """

    model: str
    model_type: str
    n_layers: int
    shapes: dict[int, tuple[int, int]]
    weights: dict[int, str]

    @classmethod
    def of(cls, adapter: ModelAdapter, layers: Sequence[int], name: str) -> NetworkOrigin:
        """Describe a model that has not been edited."""
        for layer in layers:
            adapter.check_layer(layer)
        return cls(
            name,
            adapter.model.config.model_type,
            adapter.n_layers,
            {layer: adapter.shape(layer) for layer in layers},
            {layer: fingerprint(adapter.weight(layer)) for layer in layers},
        )

    @classmethod
    def from_dict(cls, known: Mapping[str, Any]) -> NetworkOrigin:
        """Restore what ``dataclasses.asdict`` and JSON have made of one."""
        shapes = {int(layer): (int(rows), int(columns)) for layer, (rows, columns) in known["shapes"].items()}
        weights = {int(layer): str(value) for layer, value in known["weights"].items()}
        return cls(str(known["model"]), str(known["model_type"]), int(known["n_layers"]), shapes, weights)

    def check_shapes(self, adapter: ModelAdapter) -> None:
        """Raise :class:`ArgumentError` if a model is of another kind or size."""
        found: tuple[Any, ...] = (adapter.model.config.model_type, adapter.n_layers)
        same = found == (self.model_type, self.n_layers)
        if not same or any(adapter.shape(layer) != shape for layer, shape in self.shapes.items()):
            rows, columns = next(iter(self.shapes.values()))
            raise ArgumentError(
                f"the network was trained for {self.model} ({self.model_type}, {self.n_layers} layers, down "
                f"projections {rows} x {columns}), this model is {found[0]}, {found[1]} layers, down projections "
                f"{' x '.join(map(str, adapter.shape(adapter.editable[0])))}: train one for it ({HOW_TO_TRAIN})"
            )

    def check_weights(self, weights: Mapping[int, Tensor]) -> None:
        """Raise :class:`ArgumentError` if the original weights, by layer, are not those of the training."""
        other = [layer for layer, known in self.weights.items() if fingerprint(weights[layer]) != known]
        if other:
            raise ArgumentError(
                f"the network was trained for {self.model}, and this model has other weights in layer "
                f"{', '.join(map(str, other))}: train one for it ({HOW_TO_TRAIN}), or set same_weights to false to try "
                "this one, if the model is a fine-tuned or edited one of the same kind"
            )


def fingerprint(weight: Tensor) -> str:
    """Return a checksum of a weight that does not depend on whether it was loaded in a longer type than bfloat16."""
    return checksum(weight.detach().to(torch.bfloat16))


class Normaliser(nn.Module):
    """Mean and deviation of all rows ``(n, size)`` seen in training, as buffers; without any, rows stay as they are."""

    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("squares", torch.zeros(size))

    @property
    def moments(self) -> RunningMoments:
        """What has been seen."""
        return RunningMoments(int(self.count), self.mean, self.squares)

    @torch.no_grad()
    def observe(self, rows: Tensor) -> None:
        """Count some rows ``(n, size)``."""
        if len(rows):
            moments = merge_moments(self.moments, rows.to(self.mean))
            self.count = self.count + len(rows)
            self.mean, self.squares = moments.mean, moments.squares

    def forward(self, rows: Tensor) -> Tensor:
        """Return rows ``(n, size)``, centred and scaled."""
        return normalise(rows, self.moments) if int(self.count) else rows


class LowRankResidual(nn.Module):
    r"""One layer of the network, :math:`x + \sigma(s_m \odot (U V x + b) + o_m)`, the identity at first.

    ``modes`` layers of the model share it; :math:`\sigma` is ReLU where ``hidden``, for the last layer is linear.
    """

    def __init__(self, size: int, rank: int, modes: int, hidden: bool) -> None:
        super().__init__()
        self.hidden = hidden
        self.up = nn.Parameter(torch.zeros(size, rank))
        self.down = nn.Parameter(nn.init.xavier_uniform_(torch.empty(rank, size)))
        self.bias = nn.Parameter(torch.zeros(size))
        self.scale = nn.Parameter(torch.ones(modes, size))
        self.offset = nn.Parameter(torch.zeros(modes, size))

    def forward(self, rows: Tensor, mode: int) -> Tensor:
        """Map rows ``(n, size)`` of one of the model's layers."""
        moved = self.scale[mode] * (rows @ self.down.T @ self.up.T + self.bias) + self.offset[mode]
        # Not relu: its slope at zero is zero, and zero is where everything begins.
        return rows + (moved.clamp(min=0) if self.hidden else moved)


class MENDNetwork(nn.Module):
    """What makes MEND's edits; see :mod:`lit_edit.editors.gradient.mend_network`.

    Args:
        origin: The model it is for.
        rank: Of the products in each layer of the network; never more than a row has entries.
        hidden: Hidden layers.
        rate: What each layer's rate begins with.
    """

    def __init__(self, origin: NetworkOrigin, rank: int = 1920, hidden: int = 1, rate: float = 1e-4) -> None:
        super().__init__()
        check_least(1, rank=rank)
        check_least(0, hidden=hidden)
        check_positive(rate=rate)
        self.origin, self.rank, self.hidden = origin, rank, hidden
        self.layers = tuple(sorted(origin.shapes))
        self.rates = nn.Parameter(torch.full((len(self.layers),), float(rate)))
        by_shape: dict[tuple[int, int], list[int]] = {}
        for layer in self.layers:
            by_shape.setdefault(origin.shapes[layer], []).append(layer)
        self._modes = {layer: own.index(layer) for own in by_shape.values() for layer in own}
        self.normalisers = nn.ModuleDict({str(layer): Normaliser(sum(origin.shapes[layer])) for layer in self.layers})
        self.mlps = nn.ModuleDict()
        for shape, own in by_shape.items():
            size, last = sum(shape), hidden
            self.mlps[_name(shape)] = nn.ModuleList(
                LowRankResidual(size, min(rank, size), len(own), place < last) for place in range(hidden + 1)
            )

    def observe(self, layer: int, inputs: Tensor, gradients: Tensor) -> None:
        """Count what a layer has been given in training; arguments as of :meth:`forward`."""
        normaliser: Any = self.normalisers[str(layer)]
        normaliser.observe(torch.cat([inputs, gradients], 1)[_says_something(inputs, gradients)])

    def forward(self, layer: int, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return the factors of the update: :math:`\tilde u` and :math:`-\alpha_\ell \tilde\delta`.

        They are ``(tokens, d_in)`` and ``(tokens, d_out)``, as inputs and gradients of the layer are; their product is
        what is added to the weight.

        Raises:
            FactsError: If something is not finite.
        """
        dtype = self.rates.dtype
        inputs, gradients = inputs.to(dtype), gradients.to(dtype)
        for name, value in (("inputs", inputs), ("gradients", gradients)):
            if not torch.isfinite(value).all():
                raise FactsError(f"{name} hold NaN or infinite values; the edit is refused and the weights stay")
        rows = self.normalisers[str(layer)](torch.cat([inputs, gradients], 1))
        blocks: Any = self.mlps[_name(self.origin.shapes[layer])]
        for block in blocks:
            rows = block(rows, self._modes[layer])
        # A token that asks for nothing gets nothing: centred and shifted, its zeros are none any more.
        rows = rows * _says_something(inputs, gradients)[:, None].to(rows)
        width = inputs.shape[1]
        return rows[:, :width], -self.rates[self.layers.index(layer)] * rows[:, width:]

    def update(self, layer: int, inputs: Tensor, gradients: Tensor) -> Tensor:
        """Return what is added to a layer's weight, ``(d_out, d_in)``; arguments as of :meth:`forward`."""
        inputs, values = self(layer, inputs, gradients)
        return values.T @ inputs

    @property
    def digest(self) -> str:
        """Digits that tell this network from others."""
        parts = [f"{name} {checksum(value.reshape(-1, 1))}" for name, value in sorted(self.state_dict().items())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]

    def save(self, path: Path, notes: Mapping[str, Any] | None = None) -> None:
        """Write the network, with all that is needed to use it, as safetensors; ``notes`` (JSON) are for people."""
        about = {"origin": asdict(self.origin), "rank": self.rank, "hidden": self.hidden, "notes": dict(notes or {})}
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        metadata = {"format": FORMAT, "network": json.dumps(about)}
        write_atomically(path, lambda target: save_tensors(tensors, target, metadata))

    @classmethod
    def load(cls, path: Path) -> MENDNetwork:
        """Read a network that :meth:`save` has written, from a file or a run folder, on the CPU, frozen.

        Raises:
            ArgumentError: If there is none; says how to train one.
        """
        path = path / "network.safetensors" if path.is_dir() else path
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ArgumentError(f"{path} holds no MEND network: train one with {HOW_TO_TRAIN}")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            about = json.loads(metadata["network"])
            network = cls(NetworkOrigin.from_dict(about["origin"]), int(about["rank"]), int(about["hidden"]))
            network.to(tensors["rates"].dtype).load_state_dict(tensors)
        except FileNotFoundError:
            raise ArgumentError(f"{path}: no such file; train a network with {HOW_TO_TRAIN}") from None
        except (SafetensorError, KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
            raise ArgumentError(f"{path} is no MEND network, or a damaged one ({error}): {HOW_TO_TRAIN}") from error
        return network.requires_grad_(False).eval()


def _says_something(inputs: Tensor, gradients: Tensor) -> Tensor:
    """Tell which tokens have both an input and a gradient, ``(tokens,)``."""
    return (inputs != 0).any(1) & (gradients != 0).any(1)


def _name(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"
