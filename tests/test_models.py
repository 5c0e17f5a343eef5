"""The networks of the paper's evaluation have their known sizes and shapes, and torch.fx can trace them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from pipedream_hpc import zoo
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.capture import capture


def images(side: int, channels: int = 3) -> tuple[torch.Tensor]:
    return (torch.randn(2, channels, side, side),)


def tokens(vocabulary: int, length: int) -> torch.Tensor:
    return torch.randint(1, vocabulary, (2, length))


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model without memory for its weights."""
    with torch.device("meta"):
        return build()


def count_parameters(build: Callable[[], nn.Module]) -> int:
    return sum(parameter.numel() for parameter in on_meta(build).parameters())


FULL_SIZE = {
    "vgg16": (zoo.vgg16, 138_357_544),
    "vgg16, BatchNorm": (lambda: zoo.vgg16(batch_norm=True), 138_365_992),
    "alexnet": (zoo.alexnet, 61_100_840),
    "resnet18": (zoo.resnet18, 11_689_512),
    "resnet50": (zoo.resnet50, 25_557_032),
    "inception_v3": (zoo.inception_v3, 27_161_264),
    "inception_v3, one head": (lambda: zoo.inception_v3(auxiliary=False), 23_834_568),
    "s2vt": (zoo.s2vt, 36_968_094),
    "gnmt-8": (lambda: zoo.gnmt(8), 193_757_758),
    "gnmt-8, one embedding": (lambda: zoo.gnmt(8, share_embedding=True), 160_665_150),
    "gnmt-16": (lambda: zoo.gnmt(16), 277_709_374),
    "awd_lm": (zoo.awd_lm, 24_221_600),
    "awd_lm, 6 layers": (lambda: zoo.awd_lm(layers=6), 55_989_200),
    "gpt": (zoo.gpt, 124_439_808),
}


@pytest.mark.parametrize(("build", "count"), FULL_SIZE.values(), ids=FULL_SIZE)
def test_parameter_count(build, count):
    assert count_parameters(build) == count


@pytest.mark.parametrize(
    ("build", "inputs", "shape"),
    [
        (zoo.vgg16, images(224), (2, 1000)),
        (zoo.alexnet, images(224), (2, 1000)),
        (zoo.resnet18, images(224), (2, 1000)),
        (zoo.resnet50, images(224), (2, 1000)),
        (lambda: zoo.inception_v3(auxiliary=False), images(299), (2, 1000)),
        (zoo.s2vt, (torch.randn(2, 8, 4096), tokens(12_594, 5)), (2, 5, 12_594)),
        (lambda: zoo.gnmt(8), (tokens(32_317, 7), torch.tensor([7, 3]), tokens(32_317, 5)), (2, 5, 32_317)),
        (lambda: zoo.gnmt(16), (tokens(32_317, 7), torch.tensor([7, 3]), tokens(32_317, 5)), (2, 5, 32_317)),
        (zoo.awd_lm, (tokens(10_000, 6),), (2, 6, 10_000)),
        (zoo.gpt, (tokens(50_257, 6),), (2, 6, 50_257)),
    ],
    ids=["vgg16", "alexnet", "resnet18", "resnet50", "inception_v3", "s2vt", "gnmt-8", "gnmt-16", "awd_lm", "gpt"],
)
def test_full_size_models_can_be_traced_without_weights(build, inputs, shape):
    traced = fx.symbolic_trace(on_meta(build))

    assert traced(*(tensor.to("meta") for tensor in inputs)).shape == shape


SENTENCE = (tokens(20, 7), torch.tensor([7, 3]), tokens(20, 5))
TINY = {
    "vgg_small, 32 x 32": (zoo.vgg_small, images(32), (2, 10)),
    "vgg_small, 8 x 8": (lambda: zoo.vgg_small(channels=1), images(8, channels=1), (2, 10)),
    "resnet_tiny, 32 x 32": (zoo.resnet_tiny, images(32), (2, 10)),
    "resnet_tiny, 8 x 8": (lambda: zoo.resnet_tiny(channels=1), images(8, channels=1), (2, 10)),
    "inception_tiny, 32 x 32": (zoo.inception_tiny, images(32), (2, 10)),
    "inception_tiny, 8 x 8": (lambda: zoo.inception_tiny(channels=1), images(8, channels=1), (2, 10)),
    "s2vt": (lambda: zoo.s2vt(20, 12, 6, 8), (torch.randn(2, 4, 12), tokens(20, 5)), (2, 5, 20)),
    "gnmt": (lambda: zoo.gnmt(8, 20, 8), SENTENCE, (2, 5, 20)),
    "awd_lm": (lambda: zoo.awd_lm(3, 20, 6, 8), (tokens(20, 5),), (2, 5, 20)),
    "gpt": (lambda: zoo.gpt(2, 8, 2, 20, 16, dropout=0.1), (tokens(20, 5),), (2, 5, 20)),
}


@pytest.mark.parametrize(("build", "inputs", "shape"), TINY.values(), ids=TINY)
def test_a_traced_tiny_model_computes_the_same(build, inputs, shape):
    """One trace is valid in training and in evaluation, and its backward reaches every parameter."""
    model = build()
    traced = fx.symbolic_trace(model)

    for training in (True, False):
        model.train(training)
        traced.train(training)
        torch.manual_seed(0)
        expected = model(*inputs)
        torch.manual_seed(0)
        assert torch.equal(traced(*inputs), expected)
        assert expected.shape == shape

    traced(*inputs).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", [name for name in TINY if name not in ("s2vt", "gnmt")])
def test_captured_layers_together_have_every_parameter(name):
    build, (example,), shape = TINY[name]
    model = build()
    graph = capture(model, example)

    assert len(graph.layers) > 3
    assert graph.layers[-1].output_shape == shape
    captured = {id(model.get_parameter(parameter)) for layer in graph.layers for parameter in layer.parameters}
    assert captured == {id(parameter) for parameter in model.parameters()}


@pytest.mark.parametrize("build", [zoo.inception_tiny, zoo.inception_v3])
def test_auxiliary_logits_are_returned_in_training_only(build):
    model = on_meta(lambda: build(auxiliary=True))
    (batch,) = images(299)

    logits, auxiliary = model.train()(batch.to("meta"))
    assert logits.shape == auxiliary.shape
    assert model.eval()(batch.to("meta")).shape == logits.shape


@pytest.mark.parametrize(
    "build",
    [lambda **options: zoo.awd_lm(2, 20, 6, 8, **options), lambda **options: zoo.gpt(1, 8, 2, 20, 16, **options)],
)
def test_tied_weights_are_one_parameter(build):
    model, untied = build(tied=True), build(tied=False)
    embedding = model.get_submodule("tokens" if hasattr(model, "tokens") else "embedding")

    assert model.classifier.weight is embedding.weight
    assert len(list(untied.parameters())) == len(list(model.parameters())) + 1


def test_gnmt_can_share_its_embedding():
    assert zoo.gnmt(4, 20, 8).source is not zoo.gnmt(4, 20, 8).target
    shared = zoo.gnmt(4, 20, 8, share_embedding=True)
    assert shared.source is shared.target


def test_invalid_sizes_are_refused():
    with pytest.raises(PipedreamError, match="GNMT: layers is 5: choose an even number of at least 4"):
        zoo.gnmt(5, 20, 8)
    with pytest.raises(PipedreamError, match="GPT: width is 9 and heads is 2: choose a width that is a multiple"):
        zoo.gpt(1, 9, 2, 20, 16)


def test_gnmt_ignores_padding():
    model = zoo.gnmt(8, 20, 8).eval()
    source, lengths, target = SENTENCE
    longer = torch.cat([source, tokens(20, 4)], dim=1)

    torch.testing.assert_close(model(longer, lengths, target), model(source, lengths, target))


@pytest.mark.parametrize("name", ["s2vt", "gnmt", "awd_lm", "gpt"])
def test_the_logits_at_a_word_do_not_depend_on_later_words(name):
    build, (*before, words), _ = TINY[name]
    model = build().eval()
    changed = words.clone()
    changed[:, 3:] = changed[:, 3:] % 19 + 1

    torch.testing.assert_close(model(*before, changed)[:, :3], model(*before, words)[:, :3])
    assert not torch.allclose(model(*before, changed)[:, 3:], model(*before, words)[:, 3:])


def test_awd_lm_equals_nn_lstm():
    """In evaluation, without dropout, nn.LSTM with the same weights is the reference."""
    model = zoo.AWDLM(1, 20, 6, 8).eval()
    reference = nn.LSTM(6, 6, batch_first=True)
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    reference.load_state_dict({f"{name}_l0": model.get_parameter(f"layers.0.{name}") for name in names})
    x = torch.randn(2, 5, 6)

    torch.testing.assert_close(model.layers(x), reference(x)[0])


def test_awd_lm_drops_whole_channels_and_whole_words():
    model = zoo.AWDLM(2, 50, 6, 8, dropout_words=0.5)
    dropped = zoo.awd_lm(1, 20, 6, 8).dropout(torch.ones(4, 9, 6))
    assert torch.equal(dropped, dropped[:, :1].expand(4, 9, 6))

    words = model.embedding(torch.arange(50).repeat(1, 2))[0]
    is_dropped = (words == 0).all(dim=1)
    assert 0 < is_dropped.sum() < 100
    assert torch.equal(is_dropped[:50], is_dropped[50:])
    assert not (words[~is_dropped] == 0).any()


def test_vgg_small_learns():
    """There are two classes of images, bright on the left or on the right."""
    torch.manual_seed(0)
    classes = torch.arange(32) % 2
    batch = 0.1 * torch.randn(32, 1, 8, 8)
    batch[classes == 0, :, :, :4] += 1
    batch[classes == 1, :, :, 4:] += 1
    model = zoo.vgg_small(classes=2, channels=1, widths=(4, 8), hidden=16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch), classes).backward()
        optimizer.step()

    assert torch.equal(model.eval()(batch).argmax(dim=1), classes)
