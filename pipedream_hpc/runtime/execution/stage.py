"""Stage: one replica of one stage, and what it does for each action.

A stage takes no scheduling decisions: each action names the microbatch and the weight version, and the channels hide
how a tensor travels. Independent examples::

    Recv activation 5      receive slot ──► stage inputs (autograd leaves on the slot's memory)
    Forward 5 on v2        module(model inputs, stage inputs) ──► stage outputs; pins v2 until the backward is complete
    Send activation 5      stage outputs ──► send channel
    Recv gradient 2        receive slot ──► gradients of stage outputs
    Backward 2 on v0       backward(stage outputs, gradients) ──► gradients of stage inputs and of parameters
    Send gradient 2        gradients of stage inputs ──► send channel
    OptimizerStep to v3    gradients of the round ──► the optimizer writes version 3

    A backward in two parts (zero bubble, see split_backward):
    BackwardInput 2 on v0  backward(stage outputs, gradients) ──► gradients of stage inputs
    Send gradient 2        gradients of stage inputs ──► send channel
    BackwardWeight 2 on v0 the gradients of parameters that BackwardInput deferred

Life of a microbatch. In training it is in flight from its first Recv or Forward until its backward is complete and
all its gradients are sent; in evaluation until its last output is sent or, in the output stage, its score is recorded.

Memory. A *slot* is a receive buffer that a channel owns; once released, the sender may overwrite it. A release is
ordered after the work that is queued on the current stream. A *slab* is the memory of one weight version;
`stash.acquire` and `stash.bind` point the module's parameters at it. Every edge has a Send and a Recv of gradients.
Where no tensor of the edge needs a gradient, nothing is transmitted; the Send still makes the stage that received the
activation release its slot.

Gradients. Every microbatch's loss is weighted and multiplied by the loss scale; the round's sum is divided once, then
unscaled and clipped. Where minibatches are cut, the weight (`data.weight`) is the microbatch's share of its minibatch's
samples, and the divisor is 1; elsewhere the weight is 1, and the divisor the number of microbatches. A loss that is a
pair (sum, count) is not weighted: backward starts from the sum, and each stage divides a round's gradients by the
counts of its microbatches, which it asks the output stage for (see stage_loss).
The loss scale changes only at steps where nothing is in flight, which fp16 requires of the schedule.

Python numbers that cross a boundary are no tensors of a message: every stage computes them itself (see StageModule).

Numbers. Three counts of microbatches and two of versions meet here::

    microbatch           within the pass: actions, data, loss meter, split backward
    of the run           + _first_microbatch: channels and stash; no two passes share one
    trained              + _first_trained: seeds of random layers; evaluations do not count
    version              within the pass: actions; + _first_version: stash
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.arguments import Arguments
from pipedream_hpc.model.graph import Value
from pipedream_hpc.model.precision import Precision
from pipedream_hpc.model.randomness import seed_for, seeding, set_seed
from pipedream_hpc.model.stage_module import StageModule, writable
from pipedream_hpc.planning.plan import Edge
from pipedream_hpc.runtime.comm.channels import ChannelKey, RecvChannel, StageChannels
from pipedream_hpc.runtime.comm.tensor_view import clone_if_shared
from pipedream_hpc.runtime.execution.data import MicrobatchLoader
from pipedream_hpc.runtime.execution.memory_probe import MemoryProbe
from pipedream_hpc.runtime.execution.others_weights import HeldWeights
from pipedream_hpc.runtime.execution.score import Score, ScoreFn
from pipedream_hpc.runtime.execution.split_backward import SplitBackward
from pipedream_hpc.runtime.execution.stage_loss import StageLoss
from pipedream_hpc.runtime.weights.batchnorm import keep_running_stats
from pipedream_hpc.runtime.weights.grad_accumulation import GradAccumulator
from pipedream_hpc.runtime.weights.grad_allreduce import GradAllReduce
from pipedream_hpc.runtime.weights.optimizer_step import StageOptimizer
from pipedream_hpc.runtime.weights.stage_state import StageState
from pipedream_hpc.runtime.weights.stash import WeightStash
from pipedream_hpc.schedule.actions import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    OptimizerStep,
    Payload,
    Recv,
    Send,
)

#: Called as watch("gradient", version, named tensors) before every optimizer step, with the round's averaged gradients
#: (not yet unscaled and clipped), and as watch("weight", version, named tensors) after it. `version` is the one before
#: the step in both calls, and counts in the run. For verification and tests.
Watch = Callable[[str, int, Iterable[tuple[str, torch.Tensor | None]]], None]


_NULL_CONTEXT = nullcontext()


@dataclass(slots=True)
class MicrobatchState:
    """What a stage holds of one microbatch in flight.

    Attributes:
        arguments: the model's arguments; None if the stage does not need them.
        stage_inputs: received activations as autograd leaves, by source stage; an entry is removed when its gradients
            are sent, so that none is left when all are.
        output_gradients: received gradients of the stage outputs, by target stage.
        held_slots: the channels whose receive slots the microbatch holds, by (payload, peer stage).
        stage_outputs: tensors that later stages use, None for those that this mode does not compute; empty once
            backward has consumed them.
        loss: the loss; in the output stage only.
        loss_gradient: the gradient that backward starts with at the loss.
        module_state: attributes and buffers as they were before the forward changed them (see StageModule.keep_state).
        split: whether BackwardInput and BackwardWeight replace Backward.
        backward_done: whether the gradients of all parameters are computed.
        sends_left: activations still to be sent; used in evaluation only.
    """

    arguments: Arguments | None = None
    stage_inputs: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    output_gradients: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    held_slots: dict[tuple[Payload, int], RecvChannel] = field(default_factory=dict)
    stage_outputs: tuple[torch.Tensor | None, ...] = ()
    loss: torch.Tensor | None = None
    loss_gradient: torch.Tensor | None = None
    module_state: list[Any] = field(default_factory=list)
    split: bool = False
    backward_done: bool = False
    sends_left: int = 0

    def gradient_storages(self) -> set[int]:
        """Return the addresses of the memory that received gradients are in."""
        return {_storage(tensor) for received in self.output_gradients.values() for tensor in received}


class Stage:
    """One replica of one stage.

    Args:
        index: index of the stage in the pipeline.
        replica: index among the stage's data-parallel replicas.
        stage_module: the stage's module with its inputs and outputs.
        edges: (source stage, target stage) to the values that travel there, in the order of the message.
        stash: the weight versions that microbatches in flight still need.
        optimizer: unscales, clips and steps, once the gradients of a round are complete.
        grad_allreduce: averages gradients over the replicas; None if there is only one.
        channels: the stage's ends of the channels to other stages.
        loss: computes and records losses in the output stage, and counts what gradients are divided by.
        seed: seed of the run; every random layer is reseeded from (seed, microbatch, layer name).
        split_backward: defers the gradients of parameters; None if the schedule splits no backward here.
        recompute: run the forward again before the backward instead of keeping activations (activation checkpointing).
        precision: factory of the context that forwards run in, such as autocast; None for none.
        compile_backend: backend of torch.compile that compiles the module; None for none.
    """

    def __init__(
        self,
        index: int,
        replica: int,
        stage_module: StageModule,
        edges: Mapping[Edge, tuple[Value, ...]],
        stash: WeightStash,
        optimizer: StageOptimizer,
        grad_allreduce: GradAllReduce | None,
        channels: StageChannels,
        loss: StageLoss,
        seed: int,
        *,
        split_backward: SplitBackward | None,
        recompute: bool,
        precision: Precision | None = None,
        compile_backend: str | None = None,
    ) -> None:
        self.index, self.replica = index, replica
        #: `module` holds the stage's weights and buffers under the user's names and is never called: a forward runs the
        #: user's own modules (stage_module.modules).
        self.stage_module, self.module = stage_module, stage_module.module
        self.stash, self.optimizer, self.grad_allreduce, self.channels = stash, optimizer, grad_allreduce, channels
        #: Set by launch/evaluation when minibatches of an evaluation are larger than the example; None otherwise.
        self.evaluation_channels: StageChannels | None = None
        self._channels = channels  # the ones that this pass uses
        self.recomputes = recompute
        self._compiled = compile_backend is not None
        self.is_last = stage_module.is_last
        #: Whether the stage reads inputs or targets from the data set.
        self.reads_data = stage_module.reads_inputs or stage_module.is_last
        self.loss, self.memory_probe = loss, MemoryProbe()
        self.watch: Watch | None = None
        #: Makes the context of every forward and its loss, also of one that runs again, from the microbatch's number
        #: among those trained. For verification.
        self.around_forward: Callable[[int], AbstractContextManager[None]] | None = None
        self._seed, self._precision, self._split_backward = seed, precision, split_backward
        # By source stage: whether each stage input needs a gradient.
        self._needs_gradient: dict[int, list[bool]] = {}
        # By target stage: positions of the stage outputs that are sent there.
        self._sent: dict[int, list[int]] = {}
        # By target stage: positions of the stage outputs whose gradients come back from there.
        self._gradients_of: dict[int, list[int]] = {}
        # Orders of dimensions in memory: tensors travel in them, and get their strides back (see Value.order).
        # The stage inputs of a source stage are in the order of its message, as `edges` has them.
        self._orders_back: dict[int, list[tuple[int, ...] | None]] = {}
        for source, value in stage_module.stage_inputs:
            self._orders_back.setdefault(source, []).append(value.order_back)
        self._orders = [value.order for value in stage_module.stage_outputs]
        self._reorders = any(value.order for _, value in stage_module.stage_inputs) or any(self._orders)
        output_position = {value.name: number for number, value in enumerate(stage_module.stage_outputs)}
        for (source, target), values in edges.items():
            if target == index:
                self._needs_gradient[source] = [value.needs_gradient for value in values]
            elif source == index:
                self._sent[target] = [output_position[value.name] for value in values]
                self._gradients_of[target] = [output_position[value.name] for value in values if value.needs_gradient]
        self._accumulator = GradAccumulator(
            stash, grad_allreduce, split_backward.keeps if split_backward is not None else None
        )
        self._in_flight: dict[int, MicrobatchState] = {}
        self._data: MicrobatchLoader | None = None
        self._training = True
        self._n_deferred = 0  # microbatches between BackwardInput and BackwardWeight
        # How many microbatches ran before this pass, how many of them trained, and the version that it starts from.
        self._first_microbatch = self._first_trained = 0
        self._first_version = 0
        self._trained_microbatch = 0  # the number that random layers are seeded with

        def reseed(name: str) -> None:
            """Make dropout and the like independent of the plan."""
            set_seed(seed_for(seed, self._trained_microbatch, name))

        self._seeding = seeding(torch.compiler.disable(reseed) if compile_backend else reseed)  # type: ignore[no-untyped-call]
        if compile_backend:
            # Parameters are inputs of the compiled code, so switching the weight version causes no recompilation.
            stage_module.compile(compile_backend)

    @property
    def state(self) -> StageState:
        """The part of the stage that outlives a pass: weights, buffers, optimizer."""
        return StageState(self.index, self.replica, self.module, self.stash, self.optimizer)

    def begin(
        self,
        data: MicrobatchLoader,
        *,
        training: bool,
        first_microbatch: int,
        first_trained: int,
        score_fn: ScoreFn | None = None,
        publish: bool = False,
    ) -> None:
        """Prepare for one pass over the data.

        Args:
            data: the microbatches of the pass.
            training: whether there are backwards and optimizer steps.
            first_microbatch: number, within the run, of the first microbatch of this pass. Messages carry it, so that
                no microbatch of one epoch is taken for one of another.
            first_trained: microbatches trained before this pass. Random layers are seeded by this count, so that
                neither evaluations nor a restart change what they draw.
            score_fn: what the output stage computes from (output, target) instead of the loss.
            publish: publish every loss on the loss board, for step.loss; otherwise only those that divisors need.
        """
        self._data, self._training = data, training
        self.loss.begin(data, training=training, first_microbatch=first_microbatch, score_fn=score_fn, publish=publish)
        self._channels = self.channels if training else self.evaluation_channels or self.channels
        self._first_microbatch, self._first_trained = first_microbatch, first_trained
        self._first_version = self.stash.version
        self.stage_module.train(training)
        self.stash.refuse_replaced()
        self.stash.set_frozen()
        if not training:
            self.stash.use_newest()

    def end(self) -> None:
        """Wait for the last sends of the pass, after which nothing is in flight."""
        for channel in self._channels.send.values():
            channel.drain()
        assert not self._in_flight, "a verified schedule leaves no microbatch in flight"
        self.loss.end()
        self._data = None
        self.stash.use_newest()  # what the user's model shows between passes

    def ready(self, action: Recv | Send) -> bool:
        """Return whether `recv` or `send` would not block."""
        key: ChannelKey = (action.payload, action.peer_stage, action.peer_rank)
        if isinstance(action, Recv):
            return self._channels.recv[key].ready(self._first_microbatch + action.microbatch)
        return self._channels.send[key].ready()

    # -- one method per action ---------------------------------------------------------------------------------------

    def recv(self, action: Recv) -> None:
        """Take the tensors of a microbatch from a channel; they stay in its receive slot."""
        channel = self._channels.recv[action.payload, action.peer_stage, action.peer_rank]
        tensors = channel.receive(self._first_microbatch + action.microbatch)
        state = self._in_flight.setdefault(action.microbatch, MicrobatchState())
        state.held_slots[action.payload, action.peer_stage] = channel
        if action.payload == "gradient":
            if self._reorders:
                outputs = [self.stage_module.stage_outputs[each] for each in self._gradients_of[action.peer_stage]]
                tensors = [_permuted(each, value.order_back) for each, value in zip(tensors, outputs, strict=True)]
            state.output_gradients[action.peer_stage] = tensors
            return
        if self._reorders:
            orders = self._orders_back[action.peer_stage]
            tensors = [_permuted(each, order) for each, order in zip(tensors, orders, strict=True)]
        # Leaves on the slot's memory, without a copy: autograd puts the gradient to send back into their `.grad`.
        state.stage_inputs[action.peer_stage] = [
            tensor.detach().requires_grad_(needed and (self._training or self.stage_module.takes_gradients))
            for tensor, needed in zip(tensors, self._needs_gradient[action.peer_stage], strict=True)
        ]

    def forward(self, action: Forward) -> None:
        """Run the module on a weight version; in the output stage record the score."""
        assert self._data is not None
        microbatch = action.microbatch
        state = self._in_flight.setdefault(microbatch, MicrobatchState())
        if self.stage_module.reads_inputs:
            state.arguments = self._data.arguments(microbatch)
        if self._training:
            self.stash.acquire(self._first_microbatch + microbatch, self._first_version + action.version)
            self.memory_probe.in_flight = max(self.memory_probe.in_flight, self.stash.holders)
            state.split = action.split
            if self.stage_module.state:
                # The next forward then changes copies, and not what autograd has saved for this one's backward.
                state.module_state = self.stage_module.keep_state()
        else:
            state.sends_left = len(self._sent)
        state.stage_outputs, scores = self._run(microbatch, state, graph=self._training and not self.recomputes)
        if self.is_last:
            self.loss.record(microbatch, scores)
            if not self._training:
                self._finish(microbatch, state)
            elif not self.recomputes:  # else the loss has no graph yet
                state.loss, state.loss_gradient = self.loss.root(microbatch, scores[0])

    def send(self, action: Send) -> None:
        """Send stage outputs, or the gradients of stage inputs."""
        microbatch, state = action.microbatch, self._in_flight[action.microbatch]
        channel = self._channels.send[action.payload, action.peer_stage, action.peer_rank]
        if action.payload == "activation":
            channel.send(self._first_microbatch + microbatch, self._outputs_to_send(state, action.peer_stage))
            if not self._training:
                state.sends_left -= 1
                if not state.sends_left:
                    self._finish(microbatch, state)
            return
        received = zip(state.stage_inputs.pop(action.peer_stage), self._needs_gradient[action.peer_stage], strict=True)
        leaves = [leaf for leaf, needed in received if needed]
        # An input that no output depends on has no gradient: send zeros.
        input_gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        if self._reorders:
            values = [v for source, v in self.stage_module.stage_inputs if source == action.peer_stage]
            orders = [value.order for value in values if value.needs_gradient]
            input_gradients = [_permuted(each, order) for each, order in zip(input_gradients, orders, strict=True)]
        channel.send(self._first_microbatch + microbatch, input_gradients)
        # In a split backward the slot stays held until BackwardWeight, which reads the inputs.
        if state.backward_done:
            self._release(microbatch, state, ("activation", action.peer_stage))
            if not state.stage_inputs:
                self._finish(microbatch, state)

    def backward(self, action: Backward) -> None:
        """Compute the gradients of stage inputs and parameters."""
        microbatch, state = action.microbatch, self._in_flight[action.microbatch]
        roots, gradients = self._prepare_backward(action, state)
        slab = self.stash.slab_of(self._first_microbatch + microbatch)
        self._accumulator.begin(slab, last=action.last)
        if roots:  # there are none where neither this stage nor one before it trains a weight
            _run_backward(roots, gradients)
        self._free_graph(state)
        self._end_backward(microbatch, state, slab)

    def backward_input(self, action: BackwardInput) -> None:
        """Compute the gradients of stage inputs; SplitBackward keeps what belongs to parameters, per microbatch."""
        assert self._split_backward is not None
        microbatch, state = action.microbatch, self._in_flight[action.microbatch]
        roots, gradients = self._prepare_backward(action, state)
        if roots:
            self._split_backward.backward_input(microbatch, lambda: _run_backward(roots, gradients))
        self._n_deferred += 1
        self.memory_probe.deferred = max(self.memory_probe.deferred, self._n_deferred)
        if self.memory_probe.deferred_bytes is None:
            self._measure_deferred(microbatch, state)
        self._free_graph(state)

    def backward_weight(self, action: BackwardWeight) -> None:
        """Compute the deferred gradients of parameters; add them, and those computed before, to the round's."""
        assert self._split_backward is not None
        microbatch, state = action.microbatch, self._in_flight[action.microbatch]
        self._check_version(microbatch, action)
        slab = self.stash.slab_of(self._first_microbatch + microbatch)
        self._accumulator.begin(slab, last=action.last)
        for parameter, gradient in self._split_backward.backward_weight(microbatch):
            self._accumulator.add(parameter, gradient)
        self._n_deferred -= 1
        self._end_backward(microbatch, state, slab)

    def optimizer_step(self, action: OptimizerStep) -> None:
        """Write the next weight version; a step that fp16 skips makes a version, too."""
        gradients = self.round_gradients(action.n_microbatches)
        self.loss.end_round(action.n_microbatches)
        self._accumulator.close()  # the next round begins; nothing writes to `gradients` before its first gradient
        self.memory_probe.count_round(gradients)
        before = self.stash.version
        if self.watch is not None:
            self.watch("gradient", before, zip(self.stash.trained_names, gradients, strict=True))
        version = self.optimizer.apply(self.stash, gradients, action.n_microbatches)
        if version - self._first_version != action.version:
            raise RuntimeError(f"stage {self.index} made version {version - self._first_version}, not {action.version}")
        if self.watch is not None:
            self.watch("weight", before, zip(self.stash.trained_names, self.stash.trained, strict=True))

    # -- helpers -----------------------------------------------------------------------------------------------------

    def round_gradients(self, n_microbatches: int) -> list[torch.Tensor | None]:
        """Return the averaged gradients of a round of `n_microbatches` over all replicas.

        Calling it again before the optimizer step returns the same tensors: nothing is divided twice.
        """
        return self._accumulator.average(lambda: self.loss.divisor(n_microbatches))

    def _run(
        self, microbatch: int, state: MicrobatchState, *, graph: bool
    ) -> tuple[tuple[torch.Tensor, ...], Sequence[Score]]:
        """Run the module; return the stage outputs and, in the output stage, the scores of the model's output."""
        self._trained_microbatch = self._first_trained + microbatch
        # Seed what is drawn outside the seeded layers, too, so that it does not depend on what this process ran before.
        set_seed(seed_for(self._seed, self._trained_microbatch, self.index))
        leaves = [leaf for peer_stage in sorted(state.stage_inputs) for leaf in state.stage_inputs[peer_stage]]
        for position in self.stage_module.written_inputs:
            if self.recomputes:
                leaves[position] = leaves[position].clone()  # the second forward reads the slot again
            elif leaves[position].requires_grad:
                leaves[position] = writable(leaves[position])  # autograd forbids writing to a leaf
        again = graph and self.recomputes
        watched = None if again else self.loss.watch(microbatch)
        around: list[AbstractContextManager[Any]] = []  # contexts of the forward and, in the output stage, of the loss
        within: list[AbstractContextManager[Any]] = []  # contexts of the forward alone
        if torch.is_grad_enabled() != graph:
            around.append(torch.set_grad_enabled(graph))
        if self._precision is not None:
            around.append(self._precision())
        if self.around_forward is not None:
            around.append(self.around_forward(self._trained_microbatch))
        if watched is not None:
            within.append(watched)
        if self._split_backward is not None and state.split and graph:
            within.append(self._split_backward.recording(microbatch))
        # The check takes time, so it ends with the first backward; compiled code does not call torch's functions.
        if self._training and self.memory_probe.microbatch_bytes is None and not self._compiled:
            within.append(HeldWeights(self.stage_module.originals))
        with _entering(around):
            with _entering(within), self._seeding:
                outputs, model_output = self.stage_module.run(state.arguments, leaves)
            if not self.is_last:
                return tuple(outputs), ()
            return tuple(outputs), self.loss.compute(microbatch, model_output, again=again)

    def _recompute(self, microbatch: int, state: MicrobatchState) -> None:
        """Run the forward again on the weights it ran on, with the same random numbers.

        The module stays bound to that version; the next `acquire` binds it anew.
        """
        self.stash.bind(self._first_microbatch + microbatch)
        with keep_running_stats(self.stage_module.modules), self.stage_module.state_of(state.module_state):
            state.stage_outputs, scores = self._run(microbatch, state, graph=True)
        if self.is_last:
            state.loss, state.loss_gradient = self.loss.root(microbatch, scores[0])
        # This one, and those between the two parts of their backward.
        self.memory_probe.recomputed = max(self.memory_probe.recomputed, 1 + self._n_deferred)

    def _prepare_backward(
        self, action: Backward | BackwardInput, state: MicrobatchState
    ) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        """Check the version, recompute if the stage does, and return the roots of backward with their gradients."""
        microbatch = action.microbatch
        self._check_version(microbatch, action)
        self._trained_microbatch = self._first_trained + microbatch  # the model's own forward may run again in backward
        if self.stage_module.runs_modules_in_backward:
            self.stash.bind(self._first_microbatch + microbatch)
        if self.recomputes:
            self._recompute(microbatch, state)
        roots: list[torch.Tensor] = []
        gradients: list[torch.Tensor | None] = []
        if state.loss is not None:
            if not state.loss.requires_grad:
                raise PipedreamError(
                    "the loss depends on no weight that requires a gradient, so nothing would be trained: compute it "
                    "from the model's output without detaching it, and train some weights (requires_grad)"
                )
            roots.append(state.loss)
            gradients.append(state.loss_gradient)
        # In the order of the stages: an output with several targets is a root several times, and autograd sums up.
        for peer_stage in sorted(state.output_gradients):
            received = state.output_gradients[peer_stage]
            for position, gradient in zip(self._gradients_of[peer_stage], received, strict=True):
                output = state.stage_outputs[position]
                if output is not None and output.requires_grad:
                    roots.append(output)
                    gradients.append(gradient)
        if self.memory_probe.microbatch_bytes is None:
            self._check_leaves(state, roots)
            self._measure_microbatch(microbatch, state, roots)
        return roots, gradients

    def _check_leaves(self, state: MicrobatchState, roots: Sequence[torch.Tensor]) -> None:
        """Refuse a forward or loss that depends on weights that are not the stage's: no optimizer would train them.

        It looks at the first microbatch only. Examples are a penalty over all parameters of the model in the loss, and
        a patched forward that holds a parameter itself instead of the module that has it.
        """
        for leaf in graph_leaves(roots):
            # Leaves of another type are stage inputs, or the forward's own, such as positions that forces derive from.
            if isinstance(leaf, nn.Parameter) and not self.stash.trains(leaf):
                raise PipedreamError(
                    f"the forward or the loss of stage {self.index} depends on {self.stage_module.name_of(leaf)}, "
                    "which belongs to no module of this stage: let forwards refer to modules instead of "
                    "their parameters, and a loss use the model's output alone; the optimizer's weight_decay replaces "
                    "a penalty on weights"
                )

    def _free_graph(self, state: MicrobatchState) -> None:
        """Drop the graph that backward has consumed; gradients that are still to be sent stay."""
        if state.loss_gradient is not None:
            self.loss.drop_if_shared(state.loss_gradient)
        state.loss, state.loss_gradient, state.stage_outputs = None, None, ()
        for leaves in state.stage_inputs.values():
            for leaf in leaves:
                # Clone aliased gradients: a leaf's `.grad` can be the received gradient itself (a stage of views), or
                # share its memory with a parameter's (input + parameter). That memory may be reused or accumulated
                # into before the send completes.
                leaf.grad = None if leaf.grad is None else clone_if_shared(leaf.grad)

    def _end_backward(self, microbatch: int, state: MicrobatchState, slab: int) -> None:
        """Finish a backward: pass on its gradients, release the weight version and the receive slots."""
        # A parameter's gradient may be in a receive slot, which is released before the optimizer step.
        self._accumulator.clone_gradients_in(slab, state.gradient_storages())
        self._accumulator.end(slab)
        self.stash.release(self._first_microbatch + microbatch)
        for peer_stage in state.output_gradients:
            self._release(microbatch, state, ("gradient", peer_stage))
        state.output_gradients = {}
        state.backward_done = True
        if state.split:
            # Slots of inputs whose gradients were sent before BackwardWeight were held for it.
            for payload, peer_stage in list(state.held_slots):
                if peer_stage not in state.stage_inputs:
                    self._release(microbatch, state, (payload, peer_stage))
        if not state.stage_inputs:
            self._finish(microbatch, state)

    def _outputs_to_send(self, state: MicrobatchState, peer_stage: int) -> list[torch.Tensor]:
        """Return the outputs for a stage, cloned where their memory may be reused before the send is complete.

        An output can be a view of a receive slot or of the data set's tensor. A gradient that comes back proves that
        the message has arrived; outputs that need none have no such proof. Where the forward will run again, no output
        has a graph yet, and all are cloned.
        """
        outputs: list[torch.Tensor] = []
        for position in self._sent[peer_stage]:
            output = state.stage_outputs[position]
            outputs.append(self._absent(position) if output is None else output)
        if self._reorders:
            orders = [self._orders[position] for position in self._sent[peer_stage]]
            outputs = [
                each if each.numel() == 0 else _permuted(each, order)  # empty ones stand for what is absent
                for each, order in zip(outputs, orders, strict=True)
            ]
        if all(output.requires_grad for output in outputs):
            return outputs
        read = [] if state.arguments is None else state.arguments.tensors()
        reused = {
            _storage(tensor) for tensor in (*read, *(leaf for each in state.stage_inputs.values() for leaf in each))
        }
        return [output if output.requires_grad else _clone_if_in(output, reused) for output in outputs]

    def _absent(self, position: int) -> torch.Tensor:
        """Return what is sent for an output that is computed in training only, such as that of an auxiliary head."""
        value = self.stage_module.stage_outputs[position]
        return torch.empty([0] * len(value.shape), dtype=value.dtype, device=self.stash.device)

    def _measure_microbatch(self, microbatch: int, state: MicrobatchState, roots: Sequence[torch.Tensor]) -> None:
        """Measure what autograd keeps for the first microbatch's backward, besides weights and slots."""
        graphs = [tensor.grad_fn for tensor in roots if tensor.grad_fn is not None]
        if state.split:
            assert self._split_backward is not None
            graphs += self._split_backward.graphs(microbatch)  # those of the layers, which it has cut off
        leaves = [leaf for each in state.stage_inputs.values() for leaf in each]
        assert self._data is not None
        target = tree_leaves(self._data.target(microbatch)) if self.is_last else []
        data = [each for each in target if isinstance(each, torch.Tensor)]
        data += [] if state.arguments is None else state.arguments.tensors()
        self.memory_probe.count_microbatch(graphs, [*self.module.parameters(), *leaves], data)

    def _measure_deferred(self, microbatch: int, state: MicrobatchState) -> None:
        """Measure what the first microbatch keeps between the two parts of its backward."""
        assert self._split_backward is not None
        gradients = self._split_backward.output_gradients(microbatch)
        sizes = {_storage(gradient): gradient.untyped_storage().nbytes() for gradient in gradients}
        slots = state.gradient_storages()
        outputs = (size for storage, size in sizes.items() if storage not in slots)
        self.memory_probe.count_deferred(outputs, self._split_backward.early_gradients(microbatch))

    def _release(self, microbatch: int, state: MicrobatchState, key: tuple[Payload, int]) -> None:
        """Release the receive slot that a message of the microbatch is in."""
        state.held_slots.pop(key).release(self._first_microbatch + microbatch)

    def _finish(self, microbatch: int, state: MicrobatchState) -> None:
        """Forget the microbatch; release what it still holds."""
        assert self._data is not None
        del self._in_flight[microbatch]
        for channel in state.held_slots.values():
            channel.release(self._first_microbatch + microbatch)
        if self.reads_data:
            self._data.release(microbatch)

    def _check_version(self, microbatch: int, action: Backward | BackwardInput | BackwardWeight) -> None:
        held = self.stash.version_of(self._first_microbatch + microbatch) - self._first_version
        if held != action.version:
            raise RuntimeError(
                f"microbatch {microbatch} of stage {self.index} holds version {held}, not {action.version}"
            )


def graph_leaves(roots: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the leaves of autograd's graph that a backward from `roots` would reach."""
    found: list[torch.Tensor] = []
    todo = [root.grad_fn for root in roots if root.grad_fn is not None]
    seen = set(todo)
    while todo:
        node = todo.pop()
        if hasattr(node, "variable"):
            found.append(node.variable)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                todo.append(following)
    return found


def _entering(contexts: Sequence[AbstractContextManager[Any]]) -> AbstractContextManager[Any]:
    """Return a context that enters all of them. Mostly there is none: an ExitStack would take time."""
    if not contexts:
        return _NULL_CONTEXT
    return contexts[0] if len(contexts) == 1 else _entering_all(contexts)


@contextmanager
def _entering_all(contexts: Sequence[AbstractContextManager[Any]]) -> Iterator[None]:
    with ExitStack() as entered:
        for context in contexts:
            entered.enter_context(context)
        yield


def _run_backward(tensors: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]) -> None:
    """Run torch.autograd.backward without its checks, which take 5 µs; the engine checks shapes itself."""
    torch.autograd.Variable._execution_engine.run_backward(
        tuple(tensors),
        tuple(gradients),
        False,  # keep_graph
        False,  # create_graph
        (),  # inputs: all leaves
        allow_unreachable=True,
        accumulate_grad=True,
    )


def _permuted(tensor: torch.Tensor, order: tuple[int, ...] | None) -> torch.Tensor:
    return tensor if order is None else tensor.permute(order)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _clone_if_in(tensor: torch.Tensor, storages: set[int]) -> torch.Tensor:
    """Return `tensor`, cloned if its memory is one of `storages`."""
    return tensor.clone() if storages and _storage(tensor) in storages else tensor
