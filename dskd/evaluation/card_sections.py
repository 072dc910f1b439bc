"""The part of an evaluation's results that the model card of an export shows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_Measures = Mapping[str, Any]  # the content of measures.json


@dataclass(frozen=True)
class CardSection:
    """A section of a model card, as functions of a model's measures."""

    data: str  # a name for the evaluated data, for the head of the card
    title: Callable[[_Measures], str]
    rows: Callable[[_Measures], dict[str, str]]  # {label: value as text}
    scores: Callable[[_Measures], dict[str, float]]  # {name of a metric: value}, for the head of the card


def readable(value: float) -> str:
    """Returns a number with four digits, and without an exponent if it is large."""
    return f"{float(f'{value:.4g}'):,.0f}" if 1e4 <= value < 1e15 else f"{value:.4g}"


def with_error(value: float, error: float | None, factor: float = 1) -> str:
    """Returns a value with its standard error, if there is one, which is multiplied by `factor`."""
    return f"{value:.4g}" + (f" ± {factor * error:.2g}" if error is not None else "")
