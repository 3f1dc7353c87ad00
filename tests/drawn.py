"""What a figure shows, as numbers."""

import numpy as np
from matplotlib.collections import PathCollection


def lines(axes):
    """Points of each line by its label; of several with one label, and of those without, all in order."""
    drawn = {}
    for line in axes.lines:
        drawn.setdefault(line.get_label(), []).append(np.column_stack(line.get_data()))
    return drawn


def points(axes):
    """Points of each scatter plot by its label."""
    plots = (plot for plot in axes.collections if isinstance(plot, PathCollection))
    return {plot.get_label(): np.asarray(plot.get_offsets()) for plot in plots}


def bars(axes):
    """Ends of each horizontal error bar, n × 2 (from, to), by plot."""
    return [
        np.array([segment[:, 0] for segment in collection.get_segments()])
        for container in axes.containers
        for collection in container.lines[2]
    ]
