"""RLSEdit: recursive least squares with an anchor."""

from __future__ import annotations

from dataclasses import replace

from lit_edit.editors.closed_form.memit import MEMITSeq


class RLSEdit(MEMITSeq):
    r"""Recursive least-squares editing (RLSEdit, arXiv 2601.15686, eq. 5).

    Minimises :math:`\sum_t \lVert W K_t - V_t \rVert^2 + \lambda^2 \lVert W - W_0 \rVert^2
    + \mu^2 \operatorname{tr} (W - W_0) C (W - W_0)^\top` over all steps so far: MEMIT with memory
    (:class:`lit_edit.editors.MEMITSeq`) and its prior, with :math:`\lambda^2` as ``frobenius`` and :math:`\mu^2` times
    the anchor's weight as ``covariance_weight``. The paper's targets :math:`V_t` are outputs; its released code hands
    residuals where outputs belong, and divides them by the number of layers left. Here they are outputs.
    """

    about = replace(
        MEMITSeq.about,
        title="RLSEdit",
        paper="Beyond Hard Writes and Rigid Preservation, arXiv 2601.15686",
    )
