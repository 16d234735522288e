import json

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sft_core.model.export import export_model, full_weights, weight_names
from sft_core.run.distributed import init_distributed, shutdown
from tests.processes import run_ranks

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"


def make_policy(tied):
    """A sharded tiny Llama with checkpointed blocks, and the plain model from which it was created."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=30,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        eos_token_id=2,
    )
    plain = LlamaForCausalLM(config)
    plain.register_buffer("kept", torch.arange(3))
    policy = nn.Module()
    policy.model = LlamaForCausalLM(config)
    policy.model.register_buffer("kept", torch.arange(3))
    policy.model.load_state_dict(plain.state_dict())
    policy.model.config.use_cache = False
    policy.model.generation_config.temperature = 0.6  # without do_sample, as in some published models
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layers = policy.model.model.layers
    for i in range(len(layers)):
        layers[i] = checkpoint_wrapper(layers[i])
        fully_shard(layers[i], mesh=mesh)
    fully_shard(policy, mesh=mesh)
    return policy, plain


def make_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<end>", "<unk>", "one", "two"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="<end>", unk_token="<unk>"
    )
    made.chat_template = TEMPLATE
    return made


def export(folder, tied, dtype):
    init_distributed(60)
    policy, _ = make_policy(tied)
    export_model(policy, make_tokenizer(), folder, dtype, stop_ids={5, 2})
    state = policy.model.config.dtype, policy.model.config.use_cache, policy.model.generation_config.temperature
    shutdown()
    return state


def load(folder, tied):
    """Load the export with transformers, and return whether every tensor equals the plain model's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    init_distributed(60)
    _, plain = make_policy(tied)
    model, problems = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    for parameter in plain.parameters():  # not the rotary buffers, which stay float32 in a loaded model
        parameter.data = parameter.data.to(model.dtype)
    expected, loaded = plain.state_dict(), model.state_dict()
    same = all(torch.equal(loaded[name], tensor) for name, tensor in expected.items() if name != "kept")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        same = same and torch.equal(model(ids).logits, plain(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "one two"}], tokenize=False)
    generation = GenerationConfig.from_pretrained(folder)
    return same, sorted(problems["missing_keys"]), text, generation.eos_token_id, generation.pad_token_id


@pytest.mark.parametrize(
    "world_size, tied, dtype",
    [(1, True, torch.float32), (2, False, torch.float32), (2, True, torch.bfloat16)],
    ids=["1-tied-f32", "2-untied-f32", "2-tied-bf16"],
)
def test_round_trip_through_transformers(tmp_path, world_size, tied, dtype):
    for state in run_ranks(world_size, export, tmp_path, tied, dtype):
        assert state[1:] == (False, 0.6)  # the policy's own configuration is unchanged
    ((same, missing, text, eos, pad),) = run_ranks(1, load, tmp_path, tied)
    assert same and missing == [] and text == "one two<end>" and (eos, pad) == ([3, 2, 5], 0)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["use_cache"] is True and config["dtype"] == str(dtype).removeprefix("torch.")
    assert config["architectures"] == ["LlamaForCausalLM"] and config["tie_word_embeddings"] is tied
    assert not (tmp_path / ".export.tmp").exists()


def test_an_earlier_export_is_replaced_whole(tmp_path):
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    for name in [*names, "config.json"]:
        (tmp_path / name).write_text("old")
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "metrics.jsonl").write_text("kept")
    (tmp_path / ".export.tmp").mkdir()  # left by a kill
    (tmp_path / ".export.tmp" / "model-00001-of-00009.safetensors").touch()
    run_ranks(1, export, tmp_path, False, torch.float32)
    assert not any((tmp_path / name).exists() for name in names)
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {"model.safetensors"}
    assert (tmp_path / "metrics.jsonl").read_text() == "kept" and (tmp_path / "checkpoint-3").is_dir()
    ((same, *_),) = run_ranks(1, load, tmp_path, False)
    assert same


def gather(tied, dtype):
    init_distributed(60)
    policy, plain = make_policy(tied)
    weights = dict(full_weights(policy, dtype))
    assert list(weights) == weight_names(policy)
    expected = dict(plain.named_parameters()) | {"kept": plain.kept}
    same = all(torch.equal(weights[n], t.to(dtype) if t.is_floating_point() else t) for n, t in expected.items())
    shutdown()
    return same, weights.keys() == expected.keys(), "lm_head.weight" in weights


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_full_weights_have_plain_names_once_on_every_rank(world_size, tied):
    assert run_ranks(world_size, gather, tied, torch.bfloat16) == [(True, True, not tied)] * world_size
