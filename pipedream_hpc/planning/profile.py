"""Profile: the measured cost of every layer of a model on one device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Le

from pipedream_hpc.files import STRICT

#: Upper limit of times, in seconds (thirty years): sums, quotients and squares of smaller times stay finite.
LONGEST_S = 1e9
Seconds = Annotated[float, Ge(0), Le(LONGEST_S)]
Bytes = Annotated[int, Ge(0)]
Count = Annotated[int, Gt(0)]


#: Kinds of layers whose backward can be split: products with a weight, whose gradient for the weight can be deferred
#: and takes about as long as the gradient for the input.
SPLITTABLE_KINDS = (
    "Linear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d",
)  # fmt: skip


@dataclass(frozen=True)
class LayerProfile:
    """The cost of one layer for one whole minibatch (T_l, a_l and w_l of the paper, section 3.1).

    The last layer's times include the loss function if the profiler knew it.

    Attributes:
        name: fully qualified name in the model, such as `features.3`.
        kind: class or function, such as `Conv2d`.
        forward_s: forward time in seconds.
        backward_s: backward time in seconds.
        output_bytes: bytes of the output activations, and of their gradients.
        parameter_bytes: bytes of the trainable parameters.
        stash_bytes: bytes that autograd keeps from this layer's forward to its backward.
        output_shape: shape of the output; its first dimension is the minibatch. None when imported.
        output_dtype: dtype of the output, such as `float32`; None when imported.
        update_s: time of the optimizer step on the layer's parameters; 0 when not measured.
        inner_bytes: output bytes of the splittable layers inside a composite layer; 0 when not measured.
        unsplit_bytes: bytes of the trainable parameters whose gradients cannot be deferred, because something
            else than one splittable layer uses them; 0 when not measured.
    """

    __pydantic_config__ = STRICT

    name: str
    kind: str
    forward_s: Seconds
    backward_s: Seconds
    output_bytes: Bytes
    parameter_bytes: Bytes
    stash_bytes: Bytes = 0
    output_shape: tuple[Annotated[int, Ge(0)], ...] | None = None
    output_dtype: str | None = None
    update_s: Seconds = 0.0
    inner_bytes: Bytes = 0
    unsplit_bytes: Bytes = 0

    @property
    def weight_gradient_s(self) -> float:
        """Estimated time of the gradients of the weights: half of the backward of a splittable layer, in seconds.

        0 for other layers and for composite layers.
        """
        return self.backward_s / 2 if self.parameter_bytes and self.kind in SPLITTABLE_KINDS else 0.0

    @property
    def waiting_bytes(self) -> int:
        """Bytes kept in addition to the stash while the backward for the weights is deferred: output gradients."""
        return self.output_bytes if self.parameter_bytes and self.kind in SPLITTABLE_KINDS else self.inner_bytes

    @property
    def work_s(self) -> float:
        """Forward, backward and update of this layer for one minibatch, in seconds."""
        return self.forward_s + self.backward_s + self.update_s


@dataclass(frozen=True)
class Profile:
    """The layers of one model in topological order.

    Attributes:
        model: name of the model.
        device: device that was measured, such as `cpu` or the GPU's name.
        minibatch: samples in the measured minibatch.
        layers: the layers, in topological order of the layer graph.
        edges: (producer, consumer) pairs of layer indices; a chain is (0, 1), (1, 2), ...
        read_s: time of reading one minibatch of data in the measuring process; 0 when not measured, or when
            other processes read.
        overhead_s: time per minibatch that a stage spends outside its layers; 0 when not measured.
        optimizer: kind of the optimizer by its memory, one of planning.memory.OPTIMIZERS; None when not measured, or
            when it is of no such kind.
    """

    __pydantic_config__ = STRICT
    FORMAT: ClassVar[str] = "pipedream-profile"
    VERSION: ClassVar[int] = 2

    model: str
    device: str
    minibatch: Count
    layers: tuple[LayerProfile, ...]
    edges: tuple[tuple[int, int], ...]
    read_s: Seconds = 0.0
    overhead_s: Seconds = 0.0
    optimizer: str | None = None

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("a profile needs at least one layer")
        names: dict[str, int] = {}
        for index, layer in enumerate(self.layers):
            if layer.name in names:
                raise ValueError(f"layers[{index}].name: '{layer.name}' is also the name of layer {names[layer.name]}")
            names[layer.name] = index
        for index, (producer, consumer) in enumerate(self.edges):
            if not 0 <= producer < consumer < len(self.layers):
                raise ValueError(
                    f"edges[{index}]: ({producer}, {consumer}) does not run forwards between "
                    f"layers 0 and {len(self.layers) - 1}"
                )

    @property
    def total_s(self) -> float:
        """Forward, backward and update of the whole model for one minibatch, in seconds."""
        return sum(layer.work_s for layer in self.layers)
