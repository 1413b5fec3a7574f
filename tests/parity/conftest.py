"""Puts the helpers of tests/ and of this folder within reach. The tests here need the extra ``parity``."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
