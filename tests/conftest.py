"""One compute thread and no GPU everywhere: sums are then taken in one order, and results compare bit for bit."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMPI_ALLOW_RUN_AS_ROOT"] = os.environ["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] = "1"  # containers run as root
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # benchmarks/gpu has the tests that want one
