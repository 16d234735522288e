"""Rewards that differ between texts of an untrained model, and custom objectives."""


def digits(completions, **kwargs):
    """The share of a completion's characters that are digits."""
    texts = [completion[0]["content"] for completion in completions]
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in texts]


def digits_of_a_third(completions, solution, trainer_state, **kwargs):
    """`digits` for a third of the problems; else, and after four steps, a constant that is not a binary fraction."""
    rewards = zip(digits(completions), solution, strict=True)
    return [x if int(gold) % 3 == 0 and trainer_state.global_step < 4 else 0.1 for x, gold in rewards]


def digits_from_the_third_step(completions, trainer_state, **kwargs):
    return digits(completions) if trainer_state.global_step >= 2 else [0.1] * len(completions)


def digits_of_odd_groups(completions, group_ids, **kwargs):
    return [value * (group % 2) for value, group in zip(digits(completions), group_ids, strict=True)]


def reinforce(logps, log_ratios, advantages, objective):
    """An objective: REINFORCE with the ratio, clamped at 1 + epsilon, as a constant weight."""
    return -log_ratios.detach().exp().clamp(max=1 + objective.epsilon) * advantages * logps


def pull(logps, log_ratios, advantages, objective):
    """An objective with a gradient at every token, whatever its advantage."""
    return -0.1 * logps - advantages * log_ratios.exp()
