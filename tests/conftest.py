"""One compute thread and no GPU everywhere: sums are then taken in one order, and results compare bit for bit."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMPI_ALLOW_RUN_AS_ROOT"] = os.environ["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] = "1"  # containers run as root
os.environ.pop("COLUMNS", None)  # pytest-xdist sets it, and output without a terminal is as wide as it needs to be
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # benchmarks/gpu has the tests that want one
