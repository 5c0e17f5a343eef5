"""One compute thread everywhere: sums are then taken in one order, and results compare bit for bit."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
