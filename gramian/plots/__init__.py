"""The pictures of the theory, one function each, and all of them on one page."""

from gramian.plots.flow import *  # noqa: F403
