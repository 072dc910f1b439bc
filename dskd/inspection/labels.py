"""Placing the words of a picture next to their points, so that no words overlap and few points are covered."""

import numpy as np

_ANGLES = np.arange(16) * (2 * np.pi / 16)
_GAPS = (3.0, 10.0, 20.0, 35.0, 55.0, 80.0)  # pixels between a point's edge and its label
_RING_COST = 0.15  # covering points with this share of a label is as bad as moving one ring further out


def place_labels(
    anchors: np.ndarray,
    radii: np.ndarray,
    sizes: np.ndarray,
    obstacles: np.ndarray,
    obstacle_radii: np.ndarray,
    bounds: tuple[float, float, float, float],
) -> list[tuple[float, float] | None]:
    """Returns the centre of each label. Labels are placed in their order, so the first ones get better places.

    Each label gets the place that is best by closeness to its point and by how little it covers points. No two labels
    overlap, and all are within the bounds; a label without such a place gets None.

    All numbers are pixels: `anchors` [n, 2] and `radii` [n] of the points that the labels belong to; `sizes` [n, 2],
    width and height of the labels; `obstacles` [m, 2] and `obstacle_radii` [m], all points of the picture; `bounds`,
    left, bottom, right and top of it.
    """
    points = np.concatenate([obstacles - obstacle_radii[:, None], obstacles + obstacle_radii[:, None]], axis=1)
    placed = np.empty((0, 4))  # left, bottom, right, top
    centres: list[tuple[float, float] | None] = []
    for anchor, radius, size in zip(anchors, radii, sizes, strict=True):
        # Try places in rings around the point. The cost of a place is the share of the label on points plus a charge
        # for each ring further out.
        boxes = np.concatenate([_boxes_around(anchor, radius + gap, size) for gap in _GAPS])
        free = ~(_shared_areas(boxes, placed) > 0).any(-1) & _inside(boxes, bounds)
        if not free.any():
            centres.append(None)
            continue
        cost = _shared_areas(boxes, points).sum(-1) / size.prod()
        cost += _RING_COST * np.arange(len(_GAPS)).repeat(len(_ANGLES))
        best = boxes[np.where(free, cost, np.inf).argmin()]
        placed = np.concatenate([placed, best[None]])
        centres.append((float(best[[0, 2]].mean()), float(best[[1, 3]].mean())))
    return centres


def _boxes_around(anchor: np.ndarray, distance: float, size: np.ndarray) -> np.ndarray:
    """Returns boxes [16, 4] of a size in all directions around the anchor, with edges about `distance` away from it."""
    directions = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)
    centres = anchor + directions * (distance + size / 2)
    return np.concatenate([centres - size / 2, centres + size / 2], axis=1)


def _shared_areas(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns the area [n, m] that each of `boxes` shares with each of `others`."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return (high - low).clip(min=0).prod(-1)


def _inside(boxes: np.ndarray, bounds: tuple[float, float, float, float]) -> np.ndarray:
    left, bottom, right, top = bounds
    return (boxes[:, 0] >= left) & (boxes[:, 1] >= bottom) & (boxes[:, 2] <= right) & (boxes[:, 3] <= top)
