"""D4S: Dump for Sequence."""

from __future__ import annotations

from lit_edit.editors.closed_form import ClosedFormEditor


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

    on_original = True
    memory = True
