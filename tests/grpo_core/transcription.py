"""The objective's mathematics as loops in NumPy: one token at a time, with the gradient from the formulas."""

import math

import numpy as np

CLIPPED = ("grpo", "dapo", "bnpo", "dr_grpo", "luspo")
NEUTRAL = {
    "loss_type": "grpo", "epsilon": 0.2, "epsilon_high": None, "delta": None, "beta": 0.0,
    "importance_sampling_level": "token", "max_completion_length": None, "use_bias_correction_kl": False,
    "vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_min": None,
    "vllm_importance_sampling_clip_max": 2.0, "off_policy_mask_threshold": None, "entropy_coef": 0.0,
    "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05, "vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0, "ref_logps": None, "sampler_logps": None, "kept": None,
}  # fmt: skip


def transcription(logps, old, advantages, ids, totals, given, entropies=None):
    """The loss and its gradients by log-probs and by entropies. `totals`: tokens, sequences and kept tokens of the
    step; `given`: options and data that differ from NEUTRAL; `kept`: True for the tokens with high entropy."""
    tokens, sequences, kept_tokens = totals
    o = NEUTRAL | given
    members = [[t for t in range(len(ids)) if ids[t] == s] for s in range(len(advantages))]
    loss, grad, grad_entropies = 0.0, np.zeros(len(logps)), np.zeros(len(logps))
    for s, own in enumerate(members):
        a = advantages[s]
        rho = {t: bounded(value, o) for t, value in mismatch(old, own, o).items()}
        dropped = o["off_policy_mask_threshold"] is not None and a < 0 and strayed(logps, old, own, o)
        for t in own:
            weight = {
                "grpo": 1 / (sequences * len(own)),
                "sapo": 1 / (sequences * len(own)),
                "luspo": 1 / sequences,
                "dr_grpo": 1 / (sequences * (o["max_completion_length"] or 1)),
            }.get(o["loss_type"], 1 / tokens)
            reach = [t] if o["importance_sampling_level"] == "token" else own  # the tokens whose log-probs determine r
            r = math.exp(sum(logps[u] - old[u] for u in reach) / len(reach))
            term, by_ratio, by_logp = policy_term(logps, old, t, own, a, r, rho, o)
            keeps = not dropped and (o["kept"] is None or o["kept"][t])
            factor = weight * keeps * (1.0 if o["loss_type"] == "vespo" else rho[t])
            loss += factor * term
            grad[t] += factor * by_logp
            slope = factor * by_ratio
            if o["beta"]:
                d = o["ref_logps"][t] - logps[t]
                k, times = math.exp(d) - d - 1, r if o["use_bias_correction_kl"] else 1.0
                loss += weight * o["beta"] * times * k
                grad[t] += weight * o["beta"] * times * (1 - math.exp(d))
                slope += weight * o["beta"] * k if o["use_bias_correction_kl"] else 0.0
            for u in reach:
                grad[u] += slope * r / len(reach)
            if o["entropy_coef"] and (o["kept"] is None or o["kept"][t]):
                loss -= o["entropy_coef"] * entropies[t] / kept_tokens
                grad_entropies[t] -= o["entropy_coef"] / kept_tokens
    return loss, grad, grad_entropies


def policy_term(logps, old, t, own, a, r, rho, o):
    """The policy term and its derivatives by the ratio and by the log-prob."""
    high = o["epsilon"] if o["epsilon_high"] is None else o["epsilon_high"]
    if o["loss_type"] == "cispo":
        return -min(r, high) * a * logps[t], 0.0, -min(r, high) * a
    if o["loss_type"] == "sapo":
        temperature = float(np.float32(o["sapo_temperature_pos"] if a > 0 else o["sapo_temperature_neg"]))
        gate = 1 / (1 + math.exp(-temperature * (r - 1)))
        return -4 / temperature * gate * a, -4 * gate * (1 - gate) * a, 0.0
    if o["loss_type"] == "vespo":
        log_w = sum(min(max(logps[u] - old[u], -20), 20) for u in own)
        if o["sampler_logps"] is not None:
            log_w += sum(math.log(max(rho[u], 1e-8)) for u in own)
        log_w = min(max(log_w, math.log(1e-8)), 20)
        sign = "pos" if a >= 0 else "neg"
        phi = math.exp(o[f"vespo_lambda_{sign}"] * (1 - math.exp(log_w))) * math.exp(log_w) ** o[f"vespo_k_{sign}"]
        return -phi * a * logps[t], 0.0, -phi * a
    assert o["loss_type"] in CLIPPED
    capped = r if o["delta"] is None else min(r, o["delta"])
    clipped = min(max(r, 1 - o["epsilon"]), 1 + high)
    taken = capped if capped * a < clipped * a else clipped
    return -taken * a, -a if taken == r else 0.0, 0.0


def mismatch(old, own, o):
    """The ratios old / sampler, per token or per sequence."""
    if o["sampler_logps"] is None:
        return {t: None for t in own}
    differences = {t: old[t] - o["sampler_logps"][t] for t in own}
    if o["vllm_importance_sampling_mode"].startswith("sequence"):
        differences = dict.fromkeys(own, sum(differences.values()))
    return {t: math.exp(value) for t, value in differences.items()}


def bounded(ratio, o):
    low, high = o["vllm_importance_sampling_clip_min"] or 0.0, o["vllm_importance_sampling_clip_max"] or math.inf
    if ratio is None:
        return 1.0
    if o["vllm_importance_sampling_mode"].endswith("mask"):
        return ratio if low <= ratio <= high else 0.0
    return min(max(ratio, low), high)


def strayed(logps, old, own, o):
    before = old if o["sampler_logps"] is None else o["sampler_logps"]
    return sum(before[t] - logps[t] for t in own) / len(own) > o["off_policy_mask_threshold"]


TYPES = (*CLIPPED, "cispo", "sapo", "vespo")
LENGTHS = (4, 1, 7, 3, 2, 5)
ADVANTAGES = np.array([1.3, -0.4, 0.0, -1.7, 0.6, -0.9])


def seeds(loss_type, count):
    """The seeds below `count` that draw this loss type."""
    return range(TYPES.index(loss_type), count, len(TYPES))


def draw(seed):
    """Random options, with each loss type in turn, and data for them: logps, old_logps, entropies and more, all [N]."""
    rng = np.random.default_rng(seed)

    def one_of(*choices):
        return choices[rng.integers(len(choices))]

    loss_type = TYPES[seed % len(TYPES)]
    modes = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")[: 2 if loss_type == "vespo" else 4]
    options = {
        "loss_type": loss_type,
        "epsilon": one_of(0.1, 0.2),
        "epsilon_high": one_of(1.4, 5.0) if loss_type == "cispo" else one_of(None, 0.28),
        "delta": one_of(None, 1.15, 1.5) if loss_type in CLIPPED else None,
        "beta": one_of(0.0, 0.04),
        "importance_sampling_level": one_of("token", "sequence") if loss_type != "vespo" else "token",
        "max_completion_length": 9,
        "use_bias_correction_kl": one_of(True, False),
        "vllm_importance_sampling_mode": one_of(*modes),
        "vllm_importance_sampling_clip_min": one_of(None, 0.7),
        "vllm_importance_sampling_clip_max": one_of(1.3, 3.0),
        "off_policy_mask_threshold": one_of(None, None, 0.05),
        "top_entropy_quantile": one_of(1.0, 1.0, 0.4),
        "entropy_coef": one_of(0.0, 0.0, 0.03),
        "sapo_temperature_pos": one_of(1.0, 2.0),
        "sapo_temperature_neg": one_of(1.05, 0.5),
        "vespo_k_pos": one_of(2.0, 1.0),
        "vespo_lambda_pos": one_of(3.0, 2.0),
        "vespo_k_neg": one_of(3.0, 2.0),
        "vespo_lambda_neg": one_of(2.0, 1.0),
    }
    ids = rng.permutation(np.repeat(np.arange(len(LENGTHS)), LENGTHS))  # the tokens of a sequence need not be adjacent
    old = -rng.exponential(1.0, len(ids))
    logps = old + rng.normal(0, 0.5, len(ids))
    data = {
        "logps": logps,
        "old_logps": old,
        "ref_logps": logps + rng.normal(0, 0.3, len(ids)),
        "sampler_logps": one_of(None, old + rng.normal(0, 0.3, len(ids))),
        "entropies": rng.exponential(1.0, len(ids)),
        "advantages": ADVANTAGES,
        "sequence_ids": ids,
    }
    return options, data
