r"""Fine-tuning: FT, FT-L and FT-M, the baselines of the field.

Adam on the down projection :math:`W` of one layer (or several), at most 25 steps from the current weights, none once
the loss is below 0.01. Three methods go by the name:

* **FT** (constrained or not, as released with ROME, 2202.05262, and in EasyEdit as ``prompt_last``):

  .. math:: L = -\frac{1}{T} \sum_{t=1}^{T} \log p(y_t \mid x),

  every token :math:`y_t` of the target is read from the distribution after the last token of the prompt :math:`x`. For
  a target of one token that is the usual loss. For more it is wrong: all tokens are taught at the first place, none of
  them after those before it, and the model begins to stutter.
* **FT-L** (Zhu et al., 2012.00363, as in ROME): the same loss, and after every step
  :math:`\lVert W - W_0 \rVert_\infty \le \epsilon`.
* **FT-M** (EasyEdit, 2308.07269, ``target_new``): cross entropy on the target alone, each token after those before it,

  .. math:: L = -\frac{1}{T} \sum_{t=1}^{T} \log p(y_t \mid x, y_{<t}).

Published code clamps FT-L around the weights that an edit finds, so that the ball wanders along a stream and bounds
nothing; here it stays around the original ones. It also puts a space before a target unless the *whole* text begins
with one; here targets are tokenised as they follow the prompt.

By nature these methods have no regard for what else the weights say: nothing protects other facts but the few steps
(and the ball). An edit is memorised for its own wording.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from lit_edit.data.request import EditRequest
from lit_edit.editors.base import EditorInfo
from lit_edit.editors.gradient.engine import GradientEditor
from lit_edit.editors.layer_choice import Published
from lit_edit.editors.lessons import Lesson, Loss, target_lesson
from lit_edit.errors import check_one_of, check_positive
from lit_edit.text.tokens import continuation


class FT(GradientEditor):
    """Unconstrained fine-tuning of a layer; see :mod:`lit_edit.editors.gradient.ft`.

    Args:
        loss: ``prompt_last``, as published, reads all tokens of the target from the last token of the prompt: wrong for
            targets of several tokens. ``target`` is the loss of :class:`FTM`.
        kwargs: As for :class:`GradientEditor`.
    """

    about: ClassVar[EditorInfo] = EditorInfo(
        title="FT",
        paper="Fine-tuning as in ROME, 2202.05262",
        kind="fine-tuning",
        cost="steps x passes of the layers above the edited one",
        state="the weights; on record one matrix per step and layer",
        undo="approximate",
        lacks="regard for anything but the edit; targets of several tokens (loss prompt_last)",
    )
    published: ClassVar[Published[tuple[int, ...]]] = {
        ("gpt2", 48, 1600): (1,),  # GPT2-XL, ROME
        ("gptj", 28, 4096): (21,),  # GPT-J-6B, ROME
        ("llama", 32, 4096): (21,),  # Llama-2-7B, Llama-3-8B, EasyEdit
    }
    depends_on = "loss"

    def __init__(self, loss: Loss = "prompt_last", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_one_of(("prompt_last", "target"), loss=loss)
        self.loss: Loss = loss

    def lessons(self, request: EditRequest) -> list[Lesson]:
        """Return the prompt with its target."""
        return [target_lesson(*continuation(self.tokenizer, request.text, request.target_new), self.loss)]


class FTL(FT):
    r"""Fine-tuning inside a ball around the original weights; see :mod:`lit_edit.editors.gradient.ft`.

    Args:
        epsilon: Radius: no entry of a weight leaves :math:`W_0 \pm \epsilon`, however long the stream.
        kwargs: As for :class:`FT`. Transforms are applied to what is written, which may leave the ball.
    """

    about: ClassVar[EditorInfo] = replace(
        FT.about,
        title="FT-L",
        paper="Modifying Memories in Transformer Models, 2012.00363",
        state="the weights, never further than epsilon from the original ones; on record one matrix per step and layer",
        lacks="room for many edits: the ball is small; targets of several tokens (loss prompt_last)",
    )
    published: ClassVar[Published[tuple[int, ...]]] = {
        **FT.published,
        ("gpt2", 48, 1600): (0,),  # GPT2-XL, ROME
        ("gptj", 28, 4096): (0,),  # GPT-J-6B, ROME
    }
    depends_on = "epsilon"

    def __init__(self, epsilon: float = 5e-4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_positive(epsilon=epsilon)
        self.epsilon = epsilon

    def bounded(self, delta: Tensor) -> Tensor:
        r"""Return the nearest update with :math:`\lVert \Delta \rVert_\infty \le \epsilon`."""
        return delta.clamp(-self.epsilon, self.epsilon)


class FTM(FT):
    """Fine-tuning on the target alone, token after token; see :mod:`lit_edit.editors.gradient.ft`.

    Args:
        kwargs: As for :class:`GradientEditor`.
    """

    about: ClassVar[EditorInfo] = replace(
        FT.about, title="FT-M", paper="EasyEdit, 2308.07269", lacks="regard for anything but the edit"
    )

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(loss="target", **kwargs)
