"""Rewards with spread on the text of an untrained model, and objectives."""


def digits(completions, **kwargs):
    """Share of a completion's characters that are digits."""
    texts = [completion[0]["content"] for completion in completions]
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in texts]


def digits_of_a_third(completions, solution, trainer_state, **kwargs):
    """Of the problems; for the others, and for all after four steps, a constant that no binary fraction is."""
    rewards = zip(digits(completions), solution, strict=True)
    return [x if int(gold) % 3 == 0 and trainer_state.global_step < 4 else 0.1 for x, gold in rewards]


def digits_from_the_third_step(completions, trainer_state, **kwargs):
    return digits(completions) if trainer_state.global_step >= 2 else [0.1] * len(completions)


def digits_of_odd_groups(completions, group_ids, **kwargs):
    return [value * (group % 2) for value, group in zip(digits(completions), group_ids, strict=True)]


def reinforce(logps, log_ratios, advantages, objective):
    """An objective: REINFORCE, with the ratio as a constant weight up to 1 + epsilon."""
    return -log_ratios.detach().exp().clamp(max=1 + objective.epsilon) * advantages * logps


def pull(logps, log_ratios, advantages, objective):
    """An objective that pulls at every token, whatever its advantage."""
    return -0.1 * logps - advantages * log_ratios.exp()
