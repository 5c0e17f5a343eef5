"""Each of two ranks creates a pipeline and prints on which cores its threads may run."""

import os
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from pipedream_hpc import Pipeline
from pipedream_hpc.cluster.cores import assign_cores, numa_order
from pipedream_hpc.core import load_comm
from pipedream_hpc.runtime.launch import wiring

# torch's compute threads exist before the pipeline, as in any program that has prepared its data.
torch.set_num_threads(2)
torch.ones(1 << 20).add_(1)
before = {task.name for task in Path("/proc/self/task").iterdir()}

# Record what the pipeline passes to its progress thread.
core, given = load_comm(), {}
noting = SimpleNamespace(**vars(core))
noting.Progress = lambda comm, **options: given.update(options) or core.Progress(comm, **options)
wiring.load_comm = lambda: noting

torch.manual_seed(0)
pipeline = Pipeline(
    nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
    loss_fn=nn.MSELoss(),
    optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    example_inputs=torch.zeros(1, 2),
    plan=2,
)
world = pipeline.world
assert world.size == 2
cores = assign_cores(world.cpusets, world.cpuset_index, 1, numa_order())
if os.environ.get("PIPEDREAM_BIND") != "0":
    assert (given["cores"], given["spare"]) == (sorted(cores.progress), cores.progress_is_dedicated), given
else:
    assert (given["cores"], given["spare"]) == ([], False), given
wanted = cores.progress
threads = [os.sched_getaffinity(int(task.name)) for task in Path("/proc/self/task").iterdir()]
compute = ",".join(map(str, sorted(os.sched_getaffinity(0))))
found = "where it should be" if wanted in threads else f"not on {sorted(wanted)}"
own = {frozenset(os.sched_getaffinity(int(task))) for task in before if Path(f"/proc/self/task/{task}").exists()}
assert own == {frozenset(os.sched_getaffinity(0))}, "threads that existed before are bound too"
print(f"rank {world.rank} compute {compute} progress thread is {found}", flush=True)
pipeline.close()
