"""Settings of every test. What tests share stands in `tests/tiny.py`."""

from __future__ import annotations

import torch
from hypothesis import settings

# The models are tiny: threads that wait for each other on a busy machine made these tests ten times as slow.
torch.set_num_threads(1)

settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")
