"""Puts the helpers of tests/ within reach. These tests need the extra ``parity`` and fail without it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
