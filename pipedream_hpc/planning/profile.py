"""Profile: what each layer of a model costs, measured on one device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Le

from pipedream_hpc.files import STRICT

#: Thirty years: what is added, divided and squared of less stays finite.
LONGEST_S = 1e9
Seconds = Annotated[float, Ge(0), Le(LONGEST_S)]
Bytes = Annotated[int, Ge(0)]
Count = Annotated[int, Gt(0)]


#: Kinds of layers whose weights' gradients can wait, and take as long as their input's: products with a weight.
PRODUCTS = (
    "Linear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d",
)  # fmt: skip


@dataclass(frozen=True)
class LayerProfile:
    """One layer, for one whole minibatch (the T_l, a_l and w_l of the paper, section 3.1).

    The last layer's times include the loss where it was known.

    Attributes:
        name: fully qualified name in the model, such as `features.3`.
        kind: class or function, such as `Conv2d`.
        forward_s: forward time in seconds.
        backward_s: backward time in seconds.
        output_bytes: bytes of the output activations; as many come back as gradients.
        parameter_bytes: bytes of the trainable parameters.
        stash_bytes: bytes autograd keeps from this layer's forward to its backward.
        output_shape: shape of the output, first dimension the minibatch; None when imported.
        output_dtype: such as `float32`; None when imported.
        update_s: time of the optimizer's step on its parameters; 0 when not measured.
        inner_bytes: bytes that products within a layer made of others put out; 0 when not measured.
        outside_bytes: bytes of the trainable parameters that anything but a single product uses; 0 when not measured.
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
    outside_bytes: Bytes = 0

    @property
    def weight_gradient_s(self) -> float:
        """About what the gradients of the weights take of its backward, in seconds: half of it in a product.

        0 for other layers, and for those made of others.
        """
        return self.backward_s / 2 if self.parameter_bytes and self.kind in PRODUCTS else 0.0

    @property
    def waiting_bytes(self) -> int:
        """What has to be kept beside the stash where the weights' gradients wait: those of outputs."""
        return self.output_bytes if self.parameter_bytes and self.kind in PRODUCTS else self.inner_bytes

    @property
    def work_s(self) -> float:
        """All that one minibatch costs in this layer, in seconds."""
        return self.forward_s + self.backward_s + self.update_s


@dataclass(frozen=True)
class Profile:
    """The layers of one model in topological order.

    Attributes:
        model: the name it is known by.
        device: where it was measured, such as `cpu` or the GPU's name.
        minibatch: samples in the measured minibatch.
        layers: in topological order of the layer graph.
        edges: (producer, consumer) pairs of layer indices; a chain is (0, 1), (1, 2), ...
        read_s: time to read one minibatch of data on the measuring process; 0 when not measured, or others read.
        beside_s: what a stage takes per minibatch beside its layers, whatever they are; 0 when not measured.
    """

    __pydantic_config__ = STRICT
    FORMAT: ClassVar[str] = "pipedream-profile"
    VERSION: ClassVar[int] = 1

    model: str
    device: str
    minibatch: Count
    layers: tuple[LayerProfile, ...]
    edges: tuple[tuple[int, int], ...]
    read_s: Seconds = 0.0
    beside_s: Seconds = 0.0

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("a profile needs at least one layer")
        names: dict[str, int] = {}
        for index, layer in enumerate(self.layers):
            if layer.name in names:
                raise ValueError(f"layers[{index}].name: '{layer.name}' is also layer {names[layer.name]}")
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
