"""Train on two ranks with a DataLoader that has a worker process."""

from functools import partial

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pipedream_hpc import Pipeline


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(24, 6), torch.randint(0, 3, (24,)))
    loader = DataLoader(data, 4, shuffle=True, num_workers=1)
    with Pipeline(
        nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)),
        loss_fn=nn.CrossEntropyLoss(),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        example_inputs=torch.zeros(4, 6),
        plan=2,
    ) as pipeline:
        losses = pipeline.fit(loader)
        if pipeline.rank == 0:
            print("losses", losses)
            if pipeline.world.size > 1:
                print("started by", loader.multiprocessing_context.get_start_method())


if __name__ == "__main__":
    main()
