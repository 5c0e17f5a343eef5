"""Models of Hugging Face's transformers: stages train what a plain torch loop over the same module trains.

All of them are tiny, made from a configuration, without a download. Minibatches have variable length, a mask with
padding, and labels, as a tokenizer and collator make them.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from torch import nn
from torch.func import functional_call

from pipedream_hpc import PipedreamError, Pipeline, ScheduleConfig, TrainConfig
from pipedream_hpc.model.capture import capture
from pipedream_hpc.model.counting import count
from pipedream_hpc.planning.even import even_plan

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

SGD = partial(torch.optim.SGD, lr=0.1)
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 50,
    "max_position_embeddings": 64,
}
GROUPED = {**SMALL, "num_key_value_heads": 1}
SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 50,
}

#: Class of the model, its configuration, and what a minibatch has: text, pairs, images or sound.
MODELS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_layer": 4, "n_head": 2, "n_embd": 32, "vocab_size": 50}, "text"),
    "bert": ("BertForMaskedLM", "BertConfig", SMALL, "text"),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED, "text"),
    "qwen2, tied": ("Qwen2ForCausalLM", "Qwen2Config", {**GROUPED, "tie_word_embeddings": True}, "text"),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED, "text"),
    "gemma, tied": ("GemmaForCausalLM", "GemmaConfig", {**GROUPED, "head_dim": 16}, "text"),
    "phi": ("PhiForCausalLM", "PhiConfig", {**SMALL, "num_hidden_layers": 4}, "text"),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SMALL, "text"),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            **{key: SMALL[key] for key in ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")},
            "ffn_dim": 64,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
        },
        "text",
    ),
    "mixtral, routers' losses": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**GROUPED, "num_local_experts": 4, "output_router_logits": True},
        "text",
    ),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", SMALL, "text"),
    "electra": ("ElectraForMaskedLM", "ElectraConfig", {**SMALL, "embedding_size": 32}, "text"),
    "distilbert": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"dim": 32, "hidden_dim": 64, "n_heads": 2, "n_layers": 4, "vocab_size": 50, "max_position_embeddings": 64},
        "text",
    ),
    "t5, tied": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            **{"d_model": 32, "d_kv": 16, "d_ff": 64, "num_heads": 2, "num_layers": 2, "vocab_size": 50},
            "decoder_start_token_id": 0,
        },
        "pairs",
    ),
    "bart, tied": ("BartForConditionalGeneration", "BartConfig", {**SEQ2SEQ, "max_position_embeddings": 64}, "pairs"),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {
            **{key: SMALL[key] for key in SMALL if key not in ("vocab_size", "max_position_embeddings")},
            **{"image_size": 16, "patch_size": 4, "num_labels": 3},
        },
        "images",
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            **SEQ2SEQ,
            **{"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32},
            **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
        },
        "sound",
    ),
}
#: Forwards that do what those above do not: they are trained under one plan only.
OTHERS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "llama, checkpointed": ("LlamaForCausalLM", "LlamaConfig", GROUPED, "text"),
    "bert, hooks keep attentions": (
        "BertForMaskedLM",
        "BertConfig",
        {**SMALL, "output_attentions": True, "output_hidden_states": True, "attn_implementation": "eager"},
        "text",
    ),
    "xlnet, memories in evaluation": (
        "XLNetLMHeadModel",
        "XLNetConfig",
        {"d_model": 32, "n_layer": 4, "n_head": 2, "d_inner": 64, "vocab_size": 50},
        "text",
    ),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 4, "vocab_size": 50},
        "text",
    ),
    "wav2vec2, a loss of values": (
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        {
            **{key: SMALL[key] for key in SMALL if key != "max_position_embeddings"},
            **{"conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2},
            **{"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False},
        },
        "waves",
    ),
    "switch, experts by name": (
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersConfig",
        {
            **{"d_model": 32, "d_kv": 16, "d_ff": 64, "num_heads": 2, "num_layers": 2, "num_decoder_layers": 2},
            **{"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 4, "vocab_size": 50},
            **{"decoder_start_token_id": 0, "router_jitter_noise": 0.0},
        },
        "pairs",
    ),
    "prophetnet, positions returned": (
        "ProphetNetForConditionalGeneration",
        "ProphetNetConfig",
        {
            **{"hidden_size": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 50},
            **{"num_encoder_layers": 2, "num_decoder_layers": 2, "num_encoder_attention_heads": 2},
            **{"num_decoder_attention_heads": 2, "max_position_embeddings": 64},
        },
        "pairs",
    ),
    "m2m100, layers dropped": ("M2M100ForConditionalGeneration", "M2M100Config", SEQ2SEQ, "pairs"),
}
#: Fields of configurations that are probabilities of dropping something.
DROPS = ("drop", "layerdrop")


def model_of(name: str, *, dropout: bool = False) -> nn.Module:
    kind, config_kind, options, _ = (MODELS | OTHERS)[name]
    config = getattr(transformers, config_kind)(**options)
    for key, value in vars(config).items():
        drops = "dropout" in key or key.endswith(DROPS)
        if isinstance(value, float) and drops:
            setattr(config, key, 0.1 if dropout else 0.0)
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, kind)(config)
    if "checkpointed" in name:
        model.gradient_checkpointing_enable()  # type: ignore[operator]
    return model


def minibatches(name: str) -> list[dict[str, torch.Tensor]]:
    """Return three minibatches; the second one is shorter, and one sentence of each is padded."""
    draw, form = torch.Generator().manual_seed(3), (MODELS | OTHERS)[name][3]
    found = []
    for length in (16, 12, 16):
        words = torch.randint(3, 50, (4, length), generator=draw)
        mask = torch.ones_like(words)
        mask[0, -3:] = 0
        if form == "images":
            images = torch.randn(4, 3, 16, 16, generator=draw)
            found.append({"pixel_values": images, "labels": torch.randint(0, 3, (4,), generator=draw)})
        elif form == "sound":
            found.append(
                {"input_features": torch.randn(4, 8, 32, generator=draw), "labels": words[:, :12].contiguous()}
            )
        elif form == "waves":
            found.append({"input_values": torch.randn(4, 400, generator=draw), "labels": words[:, :3].contiguous()})
        elif form == "pairs":
            found.append({"input_ids": words, "attention_mask": mask, "labels": words[:, :8].contiguous()})
        else:
            found.append({"input_ids": words, "attention_mask": mask, "labels": words})
    return found


def loss_fn(output: Any, minibatch: dict[str, torch.Tensor]) -> torch.Tensor:
    loss: torch.Tensor = output.loss
    return loss


def pipeline_of(model: nn.Module, batches: list[Any], plan: Any, schedule: ScheduleConfig) -> Pipeline:
    return Pipeline(
        model,
        loss_fn=loss_fn,
        optimizer=SGD,
        example_inputs=batches[0],
        plan=plan,
        schedule=schedule,
        train_config=TrainConfig(),
    )


def plain(model: nn.Module, batches: list[Any]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train in an ordinary loop; return the losses and the state dict."""
    steps, losses = SGD(model.parameters()), []
    model.train()
    for minibatch in batches:
        steps.zero_grad()
        loss = model(**minibatch).loss
        loss.backward()
        steps.step()
        losses.append(float(loss))
    return losses, dict(model.state_dict())


def delayed(model: nn.Module, batches: list[Any], stage_of: dict[str, int], stages: int) -> dict[str, torch.Tensor]:
    """Train with PipeDream's delayed weights (paper, section 3.3): stage s computes on weights p - 1 - s steps old."""
    model.train()
    named = dict(model.named_parameters())
    history = [{name: value.detach().clone() for name, value in named.items() if value.requires_grad}]
    for number, minibatch in enumerate(batches):
        weights = {
            name: history[max(0, number - (stages - 1 - stage_of.get(name, 0)))][name].clone().requires_grad_()
            for name, parameter in named.items()
            if parameter.requires_grad
        }
        loss = functional_call(model, weights, (), minibatch, tie_weights=True).loss
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        newest = history[-1]
        history.append(
            {
                name: newest[name] if gradient is None else newest[name] - 0.1 * gradient
                for name, gradient in zip(weights, gradients, strict=True)
            }
        )
    return history[-1]


def differences(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    return {
        name: float((found[name].double() - value.double()).abs().max())
        for name, value in expected.items()
        if not torch.equal(found[name], value)
    }


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("plan", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_the_bits_are_those_of_a_plain_loop(name: str, plan: int) -> None:
    batches = minibatches(name)
    pipeline = pipeline_of(model_of(name), batches, plan, ScheduleConfig("1f1b-flush", 1))
    losses = [step.loss for step in pipeline.train(batches)]
    expected_losses, expected = plain(model_of(name), batches)
    assert losses == expected_losses
    assert differences(pipeline.state_dict(), expected) == {}


@pytest.mark.parametrize("name", OTHERS)
def test_forwards_of_other_kinds(name: str) -> None:
    batches = minibatches(name)
    pipeline = pipeline_of(model_of(name), batches, 3, ScheduleConfig("1f1b-flush", 1))
    pipeline.fit(batches)
    _, expected = plain(model_of(name), batches)
    assert differences(pipeline.state_dict(), expected) == {}
    model = model_of(name)
    model.load_state_dict(expected)
    model.eval()
    with torch.no_grad():
        loss = float(torch.stack([model(**each).loss for each in batches]).mean())
    assert pipeline.evaluate(batches)["loss"] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("name", [name for name in MODELS if "routers" not in name])
def test_gpipe_and_replicas_up_to_the_order_of_sums(name: str) -> None:
    """Two microbatches per minibatch. (The losses of routers are no mean over samples.)"""
    batches = minibatches(name)
    _, expected = plain(model_of(name), batches)
    for plan, schedule in ((2, "gpipe"), ("2-1", "1f1b-flush")):
        pipeline = pipeline_of(model_of(name), batches, plan, ScheduleConfig(schedule, 2))
        pipeline.fit(batches)
        different = differences(pipeline.state_dict(), expected)
        assert max(different.values(), default=0.0) < 1e-6, (plan, different)


@pytest.mark.parametrize("name", MODELS)
def test_1f1b_computes_on_the_papers_delayed_weights(name: str) -> None:
    batches = minibatches(name) * 2
    pipeline = pipeline_of(model_of(name), batches, 2, ScheduleConfig("1f1b"))
    pipeline.fit(batches)
    expected = delayed(model_of(name), batches, pipeline.stage_of_parameters(), 2)
    found = pipeline.state_dict()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama", "t5, tied"])
def test_masks_of_dropout_do_not_depend_on_the_plan(name: str) -> None:
    batches, losses = minibatches(name), []
    for plan in (1, 2, 4):
        pipeline = pipeline_of(model_of(name, dropout=True), batches, plan, ScheduleConfig("1f1b-flush", 1))
        losses.append([step.loss for step in pipeline.train(batches)])
    assert losses[0] == losses[1] == losses[2]
    without = pipeline_of(model_of(name), batches, 1, ScheduleConfig("1f1b-flush", 1))
    if name != "llama":  # which has none but in attention
        assert losses[0] != [step.loss for step in without.train(batches)]


def test_layers_that_are_dropped_do_not_depend_on_the_plan() -> None:
    """A dropped layer leaves a cache that the encoder or decoder returns without its keys and values."""
    name = "m2m100, layers dropped"

    def dropping() -> nn.Module:
        model = model_of(name)
        model.model.encoder.layerdrop = model.model.decoder.layerdrop = 0.4  # type: ignore[union-attr]
        return model

    batches, losses = minibatches(name) * 3, []
    for plan in (1, 2, 3):
        pipeline = pipeline_of(dropping(), batches, plan, ScheduleConfig("1f1b-flush", 1))
        losses.append([step.loss for step in pipeline.train(batches)])
    assert losses[0] == losses[1] == losses[2]
    assert losses[0] != plain(model_of(name), batches)[0]
    closed = capture(dropping(), batches[0]).closed
    reason = "its Python decides by random numbers that it draws (`if dropout_probability < self.layerdrop:`)"
    assert closed["model.encoder"] == closed["model.decoder"] == reason
    with pytest.raises(PipedreamError, match=r"; 'model\.encoder' cannot be cut, because its Python decides by random"):
        pipeline_of(dropping(), batches, 12, ScheduleConfig("1f1b-flush", 1))


def test_layers_are_named_by_their_modules() -> None:
    model = model_of("llama")
    graph = capture(model, minibatches("llama")[0])
    modules = {name for name, _ in model.named_modules()}
    named = [layer.name for layer in graph.layers if layer.name in modules]
    assert {f"model.layers.{index}.self_attn" for index in range(2)} <= set(named)
    assert {"model.embed_tokens", "lm_head"} <= set(named)


def test_a_large_model_without_weights_is_planned() -> None:
    """48 layers of Llama's form on the meta device."""
    config = transformers.LlamaConfig(**{**GROUPED, "num_hidden_layers": 48, "hidden_size": 4096, "head_dim": 128})

    def build() -> nn.Module:
        with torch.device("meta"):
            return transformers.LlamaForCausalLM(config)

    graph = capture(build(), {key: value[:1] for key, value in minibatches("llama")[0].items()})
    assert sum(layer.name.endswith("self_attn") for layer in graph.layers) == 48
    assert all(parameter.is_meta for parameter in graph.module.parameters())
    plan = even_plan(count(graph), [1] * 8)
    nbytes = [stage.parameter_bytes for stage in plan.stages]
    assert len(nbytes) == 8
    assert max(nbytes) < 2 * min(nbytes), nbytes


@pytest.mark.parametrize("given", ["index", "folder"])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_read_from_what_save_pretrained_writes(given: str, tied: bool, tmp_path: Path) -> None:
    def build() -> nn.Module:
        config = transformers.GPT2Config(
            vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=16, tie_word_embeddings=tied
        )
        return transformers.GPT2LMHeadModel(config)

    whole = build()
    whole.save_pretrained(tmp_path, max_shard_size="30kB")
    index = tmp_path / "model.safetensors.index.json"
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    words = torch.randint(0, 64, (4, 8))
    with pipeline_of(build, [{"input_ids": words, "labels": words}], 3, ScheduleConfig("1f1b")) as pipeline:
        pipeline.load_state_dict(str(index) if given == "index" else tmp_path)
        found, expected = pipeline.state_dict(), whole.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_the_example_saves_what_from_pretrained_reads(tmp_path: Path) -> None:
    program = Path(__file__).parents[1] / "examples" / "huggingface.py"
    finished = ranks.mpirun(4, sys.executable, program, tmp_path / "llama")
    assert finished.status == 0, finished.output
    assert f"saved to {tmp_path / 'llama'}, which LlamaForCausalLM.from_pretrained reads" in finished.output
    perplexities = [float(line.split()[-1]) for line in finished.output.splitlines() if line.startswith("epoch")]
    assert len(perplexities) == 3
    assert perplexities[2] < perplexities[0]
