"""The sums that the output head returns, and how their means are shown, both from the table of the loss's terms.

The table itself is in :mod:`dskd.config.loss_terms`, because the configuration's checks read it, too.
"""

from dskd.config.loss_terms import TERMS as TERMS
from dskd.config.loss_terms import minimised_terms as minimised_terms

DENOMINATORS = {term.name: term.mean_over for term in TERMS}
SUMS = (*(term.name for term in TERMS), "hinges")  # all sums that the head returns, in this order

LOSS_METRIC, LOSS_LABEL = "train/loss", "loss"  # the weighted sum of the terms


def labels() -> dict[str, str]:
    """Returns {metric: label} of the loss, its terms and their parts."""
    return {LOSS_METRIC: LOSS_LABEL} | {term.metric: term.label for term in TERMS}


def curve_titles() -> dict[str, str]:
    """Returns {metric: label} of the loss and its terms, the curves that a run shows."""
    return {LOSS_METRIC: LOSS_LABEL} | {term.metric: term.label for term in minimised_terms()}
