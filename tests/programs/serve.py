"""Serve the tests of ranks.Team: python serve.py FOLDER PID

task-0, task-1, ... in the folder are pickled (function, argument). Every rank calls them one after the other; rank 0
writes what they return to result-0, result-1, ... They end when process PID, which runs the tests, has ended.
"""

import itertools
import os
import pickle
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "programs")]


def main() -> None:
    folder = Path(sys.argv[1])
    served = Path(f"/proc/{sys.argv[2]}")
    is_root = os.environ.get("OMPI_COMM_WORLD_RANK", "0") == "0"
    for number in itertools.count():
        task, result = (folder / f"{name}-{number}" for name in ("task", "result"))
        while not task.exists():
            time.sleep(0.02)
            if not served.exists():
                return
        function, argument = pickle.loads(task.read_bytes())
        returned = function(argument)
        if is_root:
            result.with_suffix(".new").write_bytes(pickle.dumps(returned))
            result.with_suffix(".new").rename(result)


if __name__ == "__main__":
    main()
