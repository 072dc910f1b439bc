"""Where the words of a picture go: beside their points, without covering each other, on as few points as can be."""

import numpy as np

_ANGLES = np.arange(16) * (2 * np.pi / 16)
_GAPS = (3.0, 10.0, 20.0, 35.0, 55.0, 80.0)  # pixels between a point's edge and its label
_RING_COST = 0.15  # the share of a label that may lie on points before the next ring is better


def place_labels(
    anchors: np.ndarray,
    radii: np.ndarray,
    sizes: np.ndarray,
    obstacles: np.ndarray,
    obstacle_radii: np.ndarray,
    bounds: tuple[float, float, float, float],
) -> list[tuple[float, float] | None]:
    """The centre of each label, in the order of the labels: the first ones get the better places.

    A place that is near its point and lies little on others. No two labels overlap, and all are
    within the bounds; a label for which there is no such place gets None.

    Args:
        anchors: [n, 2], the points the labels belong to. All numbers are pixels.
        radii: [n], of the points.
        sizes: [n, 2], width and height of the labels.
        obstacles: [m, 2], all points of the picture.
        obstacle_radii: [m], theirs.
        bounds: left, bottom, right and top of the picture.
    """
    points = np.concatenate([obstacles - obstacle_radii[:, None], obstacles + obstacle_radii[:, None]], axis=1)
    placed = np.empty((0, 4))  # left, bottom, right, top
    centres: list[tuple[float, float] | None] = []
    for anchor, radius, size in zip(anchors, radii, sizes, strict=True):
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
    """Boxes [16, 4] of a size whose edge is so far from the anchor, all around it."""
    directions = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)
    centres = anchor + directions * (distance + size / 2)
    return np.concatenate([centres - size / 2, centres + size / 2], axis=1)


def _shared_areas(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[n, m], the area that each box shares with each other one."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return (high - low).clip(min=0).prod(-1)


def _inside(boxes: np.ndarray, bounds: tuple[float, float, float, float]) -> np.ndarray:
    left, bottom, right, top = bounds
    return (boxes[:, 0] >= left) & (boxes[:, 1] >= bottom) & (boxes[:, 2] <= right) & (boxes[:, 3] <= top)
