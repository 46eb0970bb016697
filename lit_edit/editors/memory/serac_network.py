"""What SERAC has learnt before the first edit: which prompts an edit is about, and how a stated edit is answered."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lit_edit.errors import ArgumentError
from lit_edit.files.checksum import checksum
from lit_edit.files.paths import write_atomically
from lit_edit.files.tensor_files import save_tensors

if TYPE_CHECKING:
    from lit_edit.models.adapter import ModelAdapter

NETWORK = "network.safetensors"

HOW_TO_TRAIN = (
    "train one with 'lit-edit fit --config train/serac --data.path counterfact.json --run_name serac' and name its run "
    "folder with --model.editor.init_args.network runs/serac"
)


def stated(edit: str, target: str) -> str:
    r"""Return an edit as the counterfactual model reads it before a prompt.

    Example:
        >>> stated("The capital of Italy is", "Vienna") + "Italy's capital is"
        "The capital of Italy is Vienna\nItaly's capital is"
    """
    return f"{edit.strip()} {target.strip()}\n"


def record_number(text: str) -> int:
    """Return a number that stands for a training record in the list of those a network has seen."""
    return int.from_bytes(hashlib.sha256(text.strip().encode()).digest()[:8], "big", signed=True)


def fingerprint(weight: Tensor) -> str:
    """Return digits for a weight that are the same in whatever type it was loaded."""
    return checksum(weight.detach().to(torch.bfloat16).float())


class ScopeClassifier(nn.Module):
    """Tells from two sentence embeddings, ``width`` wide, whether a prompt is in the scope of an edit.

    A hidden layer over the two embeddings, their distance and their product, by element.
    """

    def __init__(self, width: int, hidden: int = 64) -> None:
        super().__init__()
        self.width, self.hidden = width, hidden
        self.inner, self.outer = nn.Linear(4 * width, hidden), nn.Linear(hidden, 1)

    def forward(self, prompts: Tensor, edits: Tensor) -> Tensor:
        """Return logits ``(pairs,)`` for embeddings ``(pairs, width)`` of prompts and of edits."""
        features = torch.cat([prompts, edits, (prompts - edits).abs(), prompts * edits], 1)
        logits: Tensor = self.outer(torch.relu(self.inner(features * self.width**0.5)))[:, 0]
        return logits

    @torch.no_grad()
    def table(self, prompts: Tensor, edits: Tensor, pairs: int = 16_384) -> Tensor:
        """Return the probabilities ``(prompts, edits)`` that each prompt is in the scope of each edit."""
        rows = max(1, pairs // max(len(edits), 1))
        found = [
            torch.sigmoid(self(part.repeat_interleave(len(edits), 0), edits.repeat(len(part), 1))).view(len(part), -1)
            for part in prompts.split(rows)
        ]
        return torch.cat(found)


class SeracNetwork(nn.Module):
    """A scope classifier, and what turns a small model into the counterfactual one.

    The counterfactual model is the small one with an update of low rank on the down projections of a few layers.

    Args:
        width: Of the sentence embeddings.
        hidden: Of the classifier.
        shapes: Of those down projections, ``(d_out, d_in)`` by layer.
        rank: Of the updates.
    """

    def __init__(self, width: int, hidden: int, shapes: Mapping[int, tuple[int, int]], rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.classifier = ScopeClassifier(width, hidden)
        self.down = nn.ParameterDict({str(i): torch.randn(rank, d_in) / d_in**0.5 for i, (_, d_in) in shapes.items()})
        self.up = nn.ParameterDict({str(i): torch.zeros(d_out, rank) for i, (d_out, _) in shapes.items()})

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that are updated, ascending."""
        return tuple(sorted(int(layer) for layer in self.up))

    def weights(self, adapter: ModelAdapter) -> dict[str, Tensor]:
        """Return the down projections of the counterfactual model, by name."""
        found = {}
        for layer in self.layers:
            weight = adapter.weight(layer)
            update = self.up[str(layer)] @ self.down[str(layer)]
            found[adapter.weight_name(layer)] = weight + adapter.to_layout(layer, update).to(weight)
        return found

    def save(self, path: Path, settings: Mapping[str, Any], seen: Iterable[int] = ()) -> None:
        """Write the network into one file, with the settings (JSON) of its training.

        The edits it has ``seen`` are told by their :func:`record_number`.
        """
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        sizes = {"hidden": self.classifier.hidden, "width": self.classifier.width, "rank": self.rank}
        known = {"editor": "SERAC", **sizes, **settings}
        tensors["seen"] = torch.tensor(sorted(seen), dtype=torch.int64)
        write_atomically(path, lambda target: save_tensors(tensors, target, {"serac": json.dumps(known)}))

    @classmethod
    def load(cls, path: Path) -> tuple[SeracNetwork, dict[str, Any], frozenset[int]]:
        """Read a network, the settings it was trained with, and the numbers of the edits it was trained on.

        The path is the file, or the run folder that has it; an :class:`ArgumentError` if there is none.
        """
        file = path / NETWORK if path.is_dir() else path
        if not file.is_file():
            raise ArgumentError(f"network={path}: there is no {file.name} here; {HOW_TO_TRAIN}")
        try:
            with safe_open(file, "pt") as opened:
                known = json.loads((opened.metadata() or {})["serac"])
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
            shapes = {
                int(name.partition(".")[2]): (len(value), tensors[f"down.{name.partition('.')[2]}"].shape[1])
                for name, value in tensors.items()
                if name.startswith("up.")
            }
            network = cls(known["width"], known["hidden"], shapes, known["rank"])
            seen = tensors.pop("seen")
            network.load_state_dict(tensors)
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise ArgumentError(
                f"network={path}: {file.name} is no network of SERAC ({error}); {HOW_TO_TRAIN}"
            ) from None
        return network.eval().requires_grad_(False), known, frozenset(seen.tolist())
