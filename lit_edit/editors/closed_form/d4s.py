"""D4S: Dump for Sequence."""

from __future__ import annotations

from lit_edit.editors.base import EditorInfo
from lit_edit.editors.closed_form.engine import ClosedFormEditor


class D4S(ClosedFormEditor):
    r"""Sequential editing as one growing batch (D4S, arXiv 2410.23843, section 4).

    After edit :math:`t` the weight is :math:`W_0 + \Delta_t` with
    :math:`\Delta_t = \big(\sum_{i \le t} r_i k_i^\top\big) \big(\lambda C + \sum_{i \le t} k_i k_i^\top\big)^{-1}`:
    the joint least-squares solution for all edits so far, relative to the original weights. The history is two sums
    per layer, whatever the number of edits. Targets and residuals are those of the original model, so earlier edits
    neither move them nor are written again.

    ``residual: shared`` with the published target settings is the released algorithm to the number
    (``configs/method/d4s_paper.yaml``); the default repairs its over-counted residual.

    By its nature D4S averages two edits of one and the same fact.
    """

    about = EditorInfo(
        title="D4S, Dump for Sequence",
        paper="Reasons and Solutions for the Decline in Model Performance after Editing, arXiv 2410.23843",
        kind="closed form",
        cost="target optimisation; d_in^2 + d_in d_out per layer",
        state="2 d_in^2 + d_in d_out per layer, whatever the number of edits",
        undo="exact",
        lora=True,
        devices=True,
        lacks="averages two edits of the same fact, unless the earlier one is taken out (on_conflict: replace)",
    )
    on_original = True
    memory = True
