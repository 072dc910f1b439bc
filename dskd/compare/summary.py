"""What is printed of a comparison, and the picture that goes with it."""

from dskd.compare.comparison import Comparison, make_comparison
from dskd.compare.pictures import draw_curves
from dskd.compare.text import format_comparison
from dskd.config import Config
from dskd.errors import UserError

PICTURE = "curves.png"


def compare(config: Config) -> str:
    """The newest run of each name, as text; saves the picture of their curves beside the artifacts.

    Raises:
        DifferentDataError: when they were evaluated on different data.
        UserError: when nothing was trained or evaluated yet.
    """
    return summarize(make_comparison(config))


def summarize(comparison: Comparison) -> str:
    """Returns the comparison as text; saves the picture of its curves in the work directory, if it may write there."""
    if not comparison.runs:
        return format_comparison(comparison, None)
    picture = comparison.config.path(PICTURE)
    try:
        draw_curves(comparison, picture)
    except UserError as error:
        return f"{format_comparison(comparison, None)}\n\nNo picture of the loss curves: {error}"
    return format_comparison(comparison, picture)
