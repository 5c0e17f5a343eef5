"""Pass position: how messages to people count what runs: epoch, minibatch and, where cut, microbatch; all from 0."""

from __future__ import annotations

from dataclasses import dataclass

from pipedream_hpc.schedule.actions import Action, AllReduceGradNorm, OptimizerStep, ReduceGradients


@dataclass(frozen=True)
class PassPosition:
    """Names the microbatches of one pass over the data.

    Attributes:
        where: the pass, such as `epoch 2` or `evaluation after epoch 1`.
        n_microbatches: microbatches per minibatch.
    """

    where: str = "this pass"
    n_microbatches: int = 1

    def of_microbatch(self, microbatch: int) -> str:
        """Return such as `epoch 2, minibatch 17` or `epoch 2, minibatch 17, microbatch 3`."""
        minibatch, piece = divmod(microbatch, self.n_microbatches)
        cut = f", microbatch {piece}" if self.n_microbatches > 1 else ""
        return f"{self.where}, minibatch {minibatch}{cut}"

    def of(self, action: Action) -> str:
        """Return the position of an action; that of a round, where it belongs to one."""
        if isinstance(action, OptimizerStep):
            return f"{self.where}, round {action.version - 1}"
        if isinstance(action, ReduceGradients | AllReduceGradNorm):
            return f"{self.where}, round {action.round}"
        return self.of_microbatch(action.microbatch)
