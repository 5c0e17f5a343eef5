"""Ranks send tensors on a GPU around: `exchange.py ROUTE [no-wait]`, run by test_gpu.py.

Four tensors to a message, which one kernel packs on the direct route. Each is written by a kernel that begins late,
behind a sleep on the same stream: what is sent before the kernel has run is what stood there before. With `no-wait`
the channel is told of another, idle stream.
"""

import math
import sys

import torch
from mpi4py import MPI

from pipedream_hpc.core import load_comm
from pipedream_hpc.runtime.comm.gpu_route import child_command, run_child
from pipedream_hpc.runtime.comm.tensor_view import tensor_over

PARTS = [
    ("a", torch.float32, (64, 1000)),
    ("b", torch.bfloat16, (333, 77)),
    ("c", torch.int64, (5,)),
    ("d", torch.float32, (2048, 1031)),  # of several chunks
]
DTYPES = [dtype for _, dtype, _ in PARTS]
SLEEP_CYCLES = 50_000_000  # tens of milliseconds


def main() -> None:
    staged, waits = sys.argv[1] == "staged", "no-wait" not in sys.argv
    comm = MPI.COMM_WORLD
    index = comm.rank % torch.cuda.device_count()
    torch.cuda.set_device(index)
    device = torch.device("cuda", index)
    if not staged:
        wrong = comm.bcast(run_child(child_command("device", index)) if comm.rank == 0 else None)
        if wrong:
            print(f"cannot take device memory: {wrong}", flush=True)
            return
    core = load_comm()
    progress = core.Progress(comm, oversubscribed=True, device=index)
    planned = [(name, str(dtype).split(".")[1], dtype.itemsize, shape) for name, dtype, shape in PARTS]
    following, preceding = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    receiver = core.RecvChannel(progress, preceding, 0, planned, 2, "device", staged, 1 << 20)
    sender = core.SendChannel(progress, following, 0, planned, "device", staged, 1 << 20)
    compute, idle = torch.cuda.current_stream(), torch.cuda.Stream()
    late = 0
    for microbatch in range(8):
        draw = torch.Generator().manual_seed(microbatch)
        shapes = [
            (*(int(torch.randint(1, size + 1, (), generator=draw)) for size in shape[:1]), *shape[1:])
            for _, _, shape in PARTS
        ]
        # Every other one begins where sixteen bytes do not.
        tensors = [
            torch.full((microbatch % 2 + math.prod(each),), 99, dtype=dtype, device=device)[microbatch % 2 :].view(each)
            for each, dtype in zip(shapes, DTYPES, strict=True)
        ]
        torch.cuda.synchronize()
        torch.cuda._sleep(SLEEP_CYCLES)
        for tensor in tensors:
            tensor.fill_(microbatch + 10 * comm.rank)
        stream = compute if waits else idle
        sender.send(microbatch, [(each.data_ptr(), tuple(each.shape)) for each in tensors], 60.0, stream.cuda_stream)
        slot, found = receiver.receive(microbatch, 60.0)
        assert found is not None or shapes == [shape for _, _, shape in PARTS]
        offsets = found or list(zip(core.tensor_offsets(planned), shapes, strict=True))
        for (offset, shape), dtype in zip(offsets, DTYPES, strict=True):
            got = tensor_over(receiver.slot(slot), torch.Size(shape), dtype, offset=offset, device=device)
            late += int((got != microbatch + 10 * preceding).any())
        receiver.release(slot, compute.cuda_stream)
        sender.drain(60.0)
        torch.cuda.synchronize()
    comm.Barrier()
    progress.close()
    print("too early" if late else "all as sent", flush=True)


if __name__ == "__main__":
    main()
