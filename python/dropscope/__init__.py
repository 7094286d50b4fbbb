"""dropscope: see the noise that dropout makes, and the curvature it meets."""

from __future__ import annotations

import torch as torch  # first: our extension shares torch's OpenMP runtime, which must be the one loaded

__version__ = "0.1.0.dev0"
