"""Run all steps on one machine: profile, probe, partition and train.

    python examples/demo.py                                 digits, 4 ranks
    python examples/demo.py --data fashion-mnist DIR        Fashion-MNIST from its IDX files

Every command is printed, so that you can run it again by hand.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

BIN = Path(sys.executable).parent
JOB = Path(__file__).with_name("classifier.py")
#: Test accuracy at which training stops.
GOALS = {"digits": 0.97, "fashion-mnist": 0.88}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["digits"], metavar=("NAME", "DIR"))
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("demo-out"))
    options = parser.parse_args()
    out, ranks = options.out, options.ranks
    out.mkdir(parents=True, exist_ok=True)

    # More threads than cores would only compete: each rank gets its share of the cores, and waiting ranks yield.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    os.environ.setdefault("PIPEDREAM_SHARE_GPUS", "1")  # several ranks may use one GPU
    os.environ.setdefault("OMPI_MCA_btl", "^ofi")  # on one node MPI need not search for a fabric, and starts faster
    mpirun = ["mpirun", "-n", str(ranks), "--oversubscribe", "--bind-to", "none"]
    data = ["--", "--data", *options.data] if options.data != ["digits"] else []
    goal = str(GOALS.get(options.data[0], 0.9))

    began = time.perf_counter()
    run("pipedream", "profile", JOB, "-o", out / "profile.json", *data)
    run(*mpirun, "pipedream", "probe", "-o", out / "topology.json")
    run("pipedream", "partition", out / "profile.json", "--topology", out / "topology.json", "--straight",
        "-o", out / "plan.json")  # fmt: skip
    print(f"\nready to train after {time.perf_counter() - began:.1f} s", flush=True)
    run(*mpirun, "pipedream", "train", JOB, "--plan", out / "plan.json", "--out", out, "--until-accuracy", goal, *data)


def run(*command: object) -> None:
    """Print a command and run it, with the programs of this Python's environment; exit if it fails."""
    words = [str(word) for word in command]
    print(f"\n$ {shlex.join(words)}", flush=True)
    path = f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"
    status = subprocess.run([BIN / words[0], *words[1:]], env={**os.environ, "PATH": path}, check=False).returncode
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
