"""What a training step of an adapter costs, relative to others of the same model."""

from collections.abc import Sequence

from peft import PeftConfig, PeftType

from foretune.models.sites import Site
from foretune.ranking.candidates import Candidate


def step_cost(candidate: Candidate, sites: Sequence[Site]) -> float:
    """Tell what a step costs: the whole way forward, and back down to the lowest adapted layer.

    Args:
        candidate: Placement.
        sites: Every module of the model that can be adapted.

    Returns:
        (1 + share of the layers that the way back goes through) / 2: 1 for both ways through all.
    """
    layers = sorted({site.layer for site in sites if site.layer is not None})
    used = [sites[position].layer for position in candidate.sites]
    reached = [layer for layer in used if layer is not None]
    if not layers or not reached:
        return 0.5
    return (1.0 + (len(layers) - layers.index(min(reached))) / len(layers)) / 2.0


def lengthened(config: PeftConfig | None, mean_length: float) -> float:
    """Tell how much longer a prompt makes the texts.

    Args:
        config: peft's configuration of a method beside LoRA; None of LoRA.
        mean_length: Tokens of a text, on average.

    Returns:
        1 + virtual tokens / tokens; 1 of methods without, and of prefixes, which no layer runs on.
    """
    if config is None or config.peft_type not in (PeftType.PROMPT_TUNING, PeftType.P_TUNING):
        return 1.0
    virtual: int = config.num_virtual_tokens
    return 1.0 + virtual / mean_length
