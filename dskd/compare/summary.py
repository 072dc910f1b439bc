"""What is printed of a comparison, and the picture that goes with it."""

from dskd.compare.comparison import Comparison, make_comparison
from dskd.compare.pictures import draw_curves
from dskd.compare.text import format_comparison
from dskd.config import Config

PICTURE = "curves.png"


def compare(config: Config) -> str:
    """The newest run of each name, as text; saves the picture of their curves beside the artifacts.

    Raises:
        DifferentDataError: when they were evaluated on different data.
        UserError: when nothing was trained or evaluated yet.
    """
    return summarize(make_comparison(config))


def summarize(comparison: Comparison) -> str:
    """The comparison as text; saves the picture of its curves beside the artifacts."""
    if not comparison.runs:
        return format_comparison(comparison, None)
    picture = comparison.config.path(PICTURE)
    draw_curves(comparison, picture)
    return format_comparison(comparison, picture)
