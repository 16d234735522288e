"""The architectures of transformers: each is right when packed, or refused in one sentence."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface, AutoConfig

import kernels.attention
from kernels.attention import packed_attention, packed_layout
from sft_core.data.packing import pack_sequences
from sft_core.model import architectures
from sft_core.model.architectures import (
    BEGUN,
    SEQUENCES,
    SHARED,
    check_architecture,
    logps_alone,
    shares_beginnings,
    shrunken,
)
from sft_core.model.policy import Policy, check_positions
from sft_core.run.config import ModelConfig

GUIDE = (Path(__file__).parents[2] / "sft_core" / "README.md").read_text()
MODEL = ModelConfig("some/model")
# What the guide says of an architecture, and what its refusal says.
RIGHT = "trained"
MIXES = "mixes tokens by convolutions, state spaces or linear attention"
ASKS = "attention with a cap, sinks, biases or a mask of its own"
POSITIONS = "positions that are not those of the layout"
CLASS = "not built of blocks that take a registered attention"
HEAD = "a head with a bias, a scale or a cap"
SENTENCES = {
    MIXES: "packing changes the log-probs of tokens",
    ASKS: r"packed attention has no (softcap|s_aux|position_bias)|and no mask|NoneType' object is not subscriptable"
    "|packing changes the log-probs of tokens",  # XGLM's own attention is causal by its mask alone
    POSITIONS: "packing changes the log-probs of tokens",
    CLASS: r"has no list of blocks|KeyError\('packed'\)|needs packed=packed_layout",
    HEAD: "is not a single matrix|packing changes the log-probs of tokens",
}
FOUR, MIX = {"num_hidden_layers": 4}, ["full_attention", "linear_attention"] * 2
SLIDING = ["sliding_attention", "full_attention"] * 2
MAMBA = {"mamba_n_heads": 64, "mamba_d_head": 32, "hidden_size": 1024}
CASES: dict[str, tuple[dict, str]] = {
    "apertus": (FOUR, RIGHT),
    "arcee": (FOUR, RIGHT),
    "bamba": (FOUR | MAMBA | {"attn_layer_indices": [1]}, MIXES),
    "bart": ({}, POSITIONS),
    "biogpt": (FOUR, RIGHT),
    "bloom": ({"n_layer": 2}, CLASS),
    "cohere": (FOUR | {"logit_scale": 1.0}, RIGHT),
    "cohere2": (FOUR | {"logit_scale": 1.0, "layer_types": SLIDING}, RIGHT),
    "deepseek_v3": (FOUR | {"first_k_dense_replace": 2}, RIGHT),
    "diffllama": (FOUR, RIGHT),
    "doge": (FOUR, ASKS),
    "ernie4_5": (FOUR, RIGHT),
    "ernie4_5_moe": (FOUR, RIGHT),
    "exaone4": (FOUR | {"sliding_window": 4096, "layer_types": SLIDING}, RIGHT),
    "falcon": (FOUR, CLASS),
    "falcon_h1": (FOUR | MAMBA | {"mamba_d_ssm": 2048}, MIXES),
    "falcon_mamba": (FOUR, MIXES),
    "gemma": (FOUR, RIGHT),
    "gemma2": (FOUR | {"final_logit_softcapping": None}, ASKS),
    "gemma3_text": (FOUR | {"layer_types": SLIDING}, RIGHT),
    "gemma3n_text": ({"num_hidden_layers": 10, "num_kv_shared_layers": 5}, HEAD),
    "gemma4_text": (FOUR | {"layer_types": SLIDING}, RIGHT),
    "glm": (FOUR, RIGHT),
    "glm4": (FOUR, RIGHT),
    "glm4_moe": (FOUR | {"head_dim": 128}, RIGHT),
    "glm_moe_dsa": (FOUR, ASKS),
    "gpt2": ({"n_layer": 4}, CLASS),
    "gpt_bigcode": ({"n_layer": 4}, CLASS),
    "gpt_neo": ({"num_layers": 2, "attention_types": [[["global", "local"], 1]]}, CLASS),
    "gpt_neox": (FOUR, RIGHT),
    "gpt_oss": (FOUR | {"layer_types": SLIDING}, ASKS),
    "gptj": ({"n_layer": 4}, CLASS),
    "granite": (FOUR, RIGHT),
    "granitemoe": (FOUR, RIGHT),
    "granitemoehybrid": (FOUR | MAMBA | {"layer_types": ["mamba", "attention"] * 2}, MIXES),
    "helium": (FOUR, RIGHT),
    "hunyuan_v1_dense": (FOUR | {"head_dim": 128}, RIGHT),
    "inkling_text": (FOUR, ASKS),
    "jamba": ({"num_hidden_layers": 8}, MIXES),
    "kimi_linear": (FOUR, MIXES),
    "lfm2": (FOUR | {"layer_types": ["conv", "full_attention"] * 2}, MIXES),
    "llama": (FOUR, RIGHT),
    "llama4_text": (FOUR, CLASS),
    "mamba": (FOUR, MIXES),
    "mamba2": (FOUR, MIXES),
    "minicpm3": (FOUR, HEAD),
    "minimax": (FOUR | {"layer_types": MIX}, MIXES),
    "minimax_m2": (FOUR, RIGHT),
    "ministral": (FOUR | {"head_dim": 128, "layer_types": SLIDING}, RIGHT),
    "mistral": (FOUR, RIGHT),
    "mixtral": (FOUR, RIGHT),
    "modernbert-decoder": (FOUR, CLASS),
    "mpt": ({"n_layers": 4}, CLASS),
    "nemotron": (FOUR | {"num_key_value_heads": 8}, CLASS),
    "nemotron_h": ({}, MIXES),
    "olmo": (FOUR, RIGHT),
    "olmo2": (FOUR, RIGHT),
    "olmo3": (FOUR | {"layer_types": SLIDING}, RIGHT),
    "olmo_hybrid": (FOUR | {"layer_types": MIX}, MIXES),
    "olmoe": (FOUR, RIGHT),
    "opt": (FOUR, RIGHT),
    "persimmon": (FOUR, RIGHT),
    "phi": (FOUR, HEAD),
    "phi3": (FOUR, RIGHT),
    "phimoe": (FOUR, RIGHT),
    "qwen2": (FOUR | {"use_sliding_window": True, "sliding_window": 4096, "layer_types": SLIDING}, RIGHT),
    "qwen2_moe": (FOUR, RIGHT),
    "qwen3": (FOUR, RIGHT),
    "qwen3_5_text": (FOUR | {"layer_types": MIX}, MIXES),
    "qwen3_moe": (FOUR, RIGHT),
    "qwen3_next": (FOUR | {"layer_types": MIX}, MIXES),
    "recurrent_gemma": ({"num_hidden_layers": 3}, MIXES),
    "rwkv": (FOUR, CLASS),
    "seed_oss": (FOUR, RIGHT),
    "smollm3": (FOUR, RIGHT),
    "stablelm": (FOUR, CLASS),
    "starcoder2": (FOUR | {"sliding_window": 4096}, RIGHT),
    "vaultgemma": (FOUR | {"final_logit_softcapping": None}, ASKS),
    "xglm": ({"num_layers": 4}, ASKS),
    "zamba2": ({"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2}, MIXES),
}


def gradients(info, packed: bool, sequences=SEQUENCES, shared=None):
    """The gradients of a weighted sum of all tokens' log-probs, by parameter."""
    torch.manual_seed(0)
    with torch.no_grad():
        model = architectures._build(shrunken(info), MODEL, "packed" if packed else "eager")
    if packed:
        scored = [[True] * len(sequence) for sequence in sequences]
        logps = Policy(model)(pack_sequences(sequences, scored, torch.device("cpu"), shared))[0]
    else:
        logps = logps_alone(model)
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", CASES)
def test_right_or_refused(name):
    options, outcome = CASES[name]
    info = AutoConfig.for_model(name, **options)
    state = torch.get_rng_state()
    if outcome != RIGHT:
        with pytest.raises(ValueError, match=f"^some/model cannot be trained here: its architecture, {name}, is") as no:
            check_architecture(info, MODEL)
        assert re.search(SENTENCES[outcome], str(no.value)), no.value
        assert "\n" not in str(no.value) and str(no.value).endswith("Choose a model of another architecture.")
    else:
        check_architecture(info, MODEL)
        assert torch.equal(torch.get_rng_state(), state)
        packed, alone = gradients(info, True), gradients(info, False)
        assert packed.keys() == alone.keys()
        for key, gradient in alone.items():
            assert (packed[key] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-6, key


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][1] == RIGHT])
def test_beginnings_are_shared_exactly(name):
    """This includes sliding windows that are shorter than the shared beginning."""
    info = AutoConfig.for_model(name, **CASES[name][0])
    assert shares_beginnings(info, MODEL)
    sharing, plain = gradients(info, True, BEGUN, SHARED), gradients(info, True, BEGUN)
    assert sharing.keys() == plain.keys()
    for key, gradient in plain.items():
        assert (sharing[key] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-6, key


def test_an_attention_that_shares_no_beginnings_is_seen():
    """Such an attention would take only the sequence's own tokens in the row for the whole sequence."""

    def own_alone(*arguments, packed, **kwargs):
        return packed_attention(*arguments, packed=packed_layout(packed.cu_queries.diff().tolist()), **kwargs)

    info = AutoConfig.for_model("llama", **FOUR)
    try:
        AttentionInterface.register("packed", own_alone)
        assert not shares_beginnings(info, MODEL)
    finally:
        kernels.attention.register()
    assert shares_beginnings(info, MODEL)


def test_the_guide_has_this_table():
    found = {kind: names.split(", ") for kind, names in re.findall(r"^\| (.+?) \| ([\w, -]+) \|$", GUIDE, re.M)}
    for kind in (RIGHT, *SENTENCES):
        assert found[kind] == [name for name in CASES if CASES[name][1] == kind], kind


def ignoring(*names: str):
    """Our attention, but without these arguments."""

    def attention(module, query, key, value, attention_mask=None, **kwargs):
        mask = None if "attention_mask" in names else attention_mask
        kept = {name: given for name, given in kwargs.items() if name not in names}
        return packed_attention(module, query, key, value, mask, **kept)

    return attention


def blind(module, query, key, value, attention_mask=None, *, packed, **kwargs):
    """Our attention, but treating the row as one sequence."""
    layout = packed_layout([sum(packed.lengths)])
    return packed_attention(module, query, key, value, attention_mask, packed=layout, **kwargs)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("llama", blind),
        ("llama", lambda *args, scaling, **kwargs: packed_attention(*args, scaling=2 * scaling, **kwargs)),
        ("mistral", ignoring("sliding_window")),
        ("gemma3_text", ignoring("sliding_window")),
        ("qwen2", ignoring("sliding_window")),
        ("gemma2", ignoring("softcap")),
        ("gpt_oss", ignoring("s_aux")),
        ("inkling_text", ignoring("position_bias")),
        ("doge", ignoring("attention_mask")),
    ],
)
def test_an_argument_that_is_dropped_is_seen(name, fault):
    """The windows, caps, sinks and biases of the small copy all affect its short sequences."""
    try:
        AttentionInterface.register("packed", fault)
        with pytest.raises(ValueError, match="packing changes the log-probs of tokens"):
            check_architecture(AutoConfig.for_model(name, **CASES[name][0]), MODEL)
    finally:
        kernels.attention.register()


DEEP = {
    "llama": {
        "hidden_size": 16384,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "num_hidden_layers": 126,
        "intermediate_size": 53248,
    },
    "qwen2": {"hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 8, "num_hidden_layers": 80},
    "qwen3_moe": {
        "hidden_size": 4096,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "num_hidden_layers": 94,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    },
    "deepseek_v3": {},
    "phi3": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 48,
            "long_factor": [2.0] * 48,
        },
        "original_max_position_embeddings": 4096,
        "max_position_embeddings": 131072,
    },
}


@pytest.mark.parametrize("name", DEEP)
def test_large_and_deep_models_are_right(name):
    """For models of published sizes, the copy has all layers, and rounding stays far below the limit for a refusal."""
    check_architecture(AutoConfig.for_model(name, **DEEP[name]), MODEL)


def test_rotary_factors_that_depend_on_the_length():
    phi = AutoConfig.for_model("phi3", **DEEP["phi3"])
    check_positions(phi, 4096, "a row", "lower it to {limit}")
    with pytest.raises(
        ValueError, match="a row may take 4097 tokens, but the model's longrope .* 4096: lower it to 4096"
    ):
        check_positions(phi, 4097, "a row", "lower it to {limit}")
    dynamic = AutoConfig.for_model(
        "llama",
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    )
    check_architecture(dynamic, MODEL)
    with pytest.raises(
        ValueError, match="a row may take 2049 tokens, but the model has 2048 positions: lower it to 2048"
    ):
        check_positions(dynamic, 2049, "a row", "lower it to {limit}")
    layers = {"sliding_attention": {"rope_type": "default"}, "full_attention": phi.rope_parameters}
    vars(phi)["rope_parameters"] = layers
    with pytest.raises(ValueError, match="longrope"):
        check_positions(phi, 4097, "a row", "")


def test_quantised_checkpoints():
    info = AutoConfig.for_model("llama", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match="some/model is quantised already.*--use_peft true --load_in_4bit true"):
        check_architecture(info, MODEL)


@pytest.mark.parametrize(
    ("limit", "options", "says"),
    [(10**6, {"initializer_range": "x"}, "llama, is not known to work"), (1000, {}, "a small copy of it still has")],
)
def test_a_model_that_cannot_be_made_small_is_refused(limit, options, says, monkeypatch):
    """The sizes do not fit together, or there are too many parameters."""
    monkeypatch.setattr(architectures, "LARGEST_COPY", limit)
    info = AutoConfig.for_model("llama", **FOUR)
    vars(info).update(options)
    with pytest.raises(
        ValueError, match=f"^some/model cannot be trained here: .*{says}.* Choose a model of another architecture.$"
    ):
        check_architecture(info, MODEL)
