"""Run trainings of tests/training.py one after the other; many in one launch save its seconds.

python train_chain.py TRAININGS REPORTS    (files: a pickled list of Training, and of Report, written by rank 0)
"""

import pickle
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import training

from pipedream_hpc.cluster.world import join


def main() -> None:
    trainings, reports = map(Path, sys.argv[1:])
    found = training.train_all(pickle.loads(trainings.read_bytes()))
    if join().is_root:
        reports.write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main()
