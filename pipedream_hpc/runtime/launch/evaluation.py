"""Evaluation of minibatches that are larger than the example.

Channels have slots for the tensors that the example leads to. If the first minibatch of an evaluation is larger, in any
dimension, the stages get further channels for evaluations::

    first minibatch ──► tensors on every edge ──► the same on all ranks ──► channels
    (ranks that read)   (forward without values)
"""

from __future__ import annotations

from collections.abc import Sequence

from pipedream_hpc.cluster.world import World
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.arguments import Arguments
from pipedream_hpc.model.record import CannotOpenError, NeedsValuesError
from pipedream_hpc.runtime.comm.channels import EdgeTensors, TensorMeta
from pipedream_hpc.runtime.comm.handshake import exchange
from pipedream_hpc.runtime.execution.data import MicrobatchLoader
from pipedream_hpc.runtime.execution.worker import Worker
from pipedream_hpc.runtime.launch.deployment import Deployment
from pipedream_hpc.runtime.launch.wiring import Wiring


class EvaluationChannels:
    """Gives the stages larger channels where an evaluation needs them.

    Args:
        world: all ranks.
        deployment: plan and model.
        wiring: creates channels.
        workers: of this process.
        limit_s: seconds to wait for other ranks.
    """

    def __init__(
        self, world: World, deployment: Deployment, wiring: Wiring, workers: Sequence[Worker], limit_s: float
    ) -> None:
        self._world, self._deployment, self._wiring, self._workers = world, deployment, wiring, workers
        self._limit_s, self._tensors = limit_s, deployment.edge_tensors

    def fit(self, loader: MicrobatchLoader) -> None:
        """Create channels for the loader's first microbatch if those that are there are too small. Collective.

        Raises:
            PipedreamError: the model does not accept the microbatch.
        """
        own = None
        if loader.first is not None and loader.first.exceeds(self._deployment.graph.inputs):
            own = self._tensors_for(loader.first)
        answers = exchange(self._world, {"tensors": own}, limit_s=self._limit_s)
        needed = next((answer["tensors"] for answer in answers if answer["tensors"] is not None), None)
        if needed is None or not self._enlarge(needed):
            return
        channels = self._wiring.connect(self._tensors)
        for worker in self._workers:
            for stage in worker.stages.values():
                stage.evaluation_channels = channels[stage.index, worker.rank]
        exchange(self._world, {}, limit_s=self._limit_s)  # no rank sends before all have posted their receives

    def _tensors_for(self, first: Arguments) -> EdgeTensors:
        try:
            return self._deployment.evaluation_tensors(first)
        except (CannotOpenError, NeedsValuesError) as error:
            missing = ", ".join(set(self._deployment.graph.inputs.named()) - set(first.named()))
            without = f" without {missing}, which example_inputs has" if missing else ""
            raise PipedreamError(
                f"the model does not accept the first minibatch of the evaluation{without}: {error.reason}"
            ) from error

    def _enlarge(self, needed: EdgeTensors) -> bool:
        """Take over what is larger; return whether anything is."""
        before = self._tensors
        self._tensors = {edge: tuple(map(TensorMeta.larger, own, needed[edge])) for edge, own in before.items()}
        return self._tensors != before
