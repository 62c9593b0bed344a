"""
Scores that say which weights of a matrix to remove, smaller first: OBS and OBD (arXiv 2301.00774), their sum ISC
(arXiv 2310.09499, eq. 4), Wanda's (arXiv 2306.11695) and plain magnitude.
"""

import torch

from .hessian import InverseFactor

SWEPT = ("isc", "obs", "obd", "isc-b", "isc-c")  # the weights that stay make up for those that go
UNCOMPENSATED = ("wanda", "magnitude")
SCORES = (*SWEPT, *UNCOMPENSATED)


def column_weights(score: str, factor: InverseFactor) -> torch.Tensor:
    """
    What the squared weights of each input column count, (C,): saliency = w^2 * this.

    H_mm is the damped diagonal of the Hessian H, U the upper Cholesky factor of its inverse, so that U_mm^2 is the inverse's
    diagonal for the columns that are not processed yet.

    `obs` 1 / U_mm^2 (eq. 2); `obd` H_mm; `isc` their sum, eq. 4 in the order of the sweep; `isc-b` H_mm + 1 / [H^-1]_mm with
    the whole inverse; `isc-c` H_mm + 1 / U_mm, as the authors' code has it, which depends on the activations' unit.
    """
    obs, obd = factor.upper.diagonal().square().reciprocal(), factor.diagonal
    if score == "obs":
        return obs
    if score == "obd":
        return obd
    if score == "isc":
        return obd + obs
    if score == "isc-b":
        return obd + factor.inverse_diagonal.reciprocal()
    assert score == "isc-c", score
    return obd + factor.upper.diagonal().reciprocal()
