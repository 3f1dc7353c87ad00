"""What the paper claims of κ, and what the numbers made here say of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from foretune.evaluation.correlations import SCOPE_WORDS, Finding, finding_in_words, summarise
from foretune.evaluation.predictors import KAPPA
from foretune.evaluation.records import Record
from foretune.evaluation.statistics import Scope

Verdict = Literal["borne out", "reversed", "not established"]
# The paper's reading: a small κ goes with a small loss and a high accuracy.
CLAIMED = {"train_loss": +1, "eval_loss": +1, "accuracy": -1}


@dataclass(frozen=True)
class Claim:
    """One claim and what came of it.

    Attributes:
        outcome: Outcome that κ is said to go with.
        scope: Where it was looked for.
        sign: Sign that the paper's reading has.
        finding: Spearman's ρ; None where it is undefined.
        verdict: Whether the numbers show it.
    """

    outcome: str
    scope: Scope
    sign: int
    finding: Finding | None
    verdict: Verdict

    @property
    def correlation(self) -> str:
        """The coefficient with its interval."""
        return "undefined" if self.finding is None else finding_in_words(self.finding).strip("()")

    def sentence(self) -> str:
        """Say it in a sentence.

        Returns:
            A sentence.
        """
        words = {"train_loss": "train loss", "eval_loss": "eval loss", "accuracy": "accuracy"}[self.outcome]
        expected = "+" if self.sign > 0 else "−"
        return (
            f"κ and {words} {SCOPE_WORDS[self.scope]}: Spearman's ρ {self.correlation}; "
            f"the paper's reading wants {expected}: {self.verdict}."
        )


def check_claims(records: Sequence[Record], *, resamples: int = 2000) -> tuple[Claim, ...]:
    """Hold the paper's reading of κ against the cells.

    Args:
        records: Cells.
        resamples: Draws of the bootstrap.

    Returns:
        A claim for each outcome, over all cells and within a data set.
    """
    report = summarise(records, predictors=(KAPPA,), resamples=resamples)
    claims = []
    for outcome, sign in CLAIMED.items():
        for scope in ("all", "within"):
            finding = report.finding(KAPPA.name, outcome, "spearman", scope)
            claims.append(Claim(outcome, scope, sign, finding, verdict(finding, sign)))
    return tuple(claims)


def verdict(finding: Finding | None, sign: int) -> Verdict:
    """Judge one coefficient.

    Args:
        finding: Coefficient, or None where it is undefined.
        sign: Sign that is claimed.

    Returns:
        `not established` unless the interval leaves 0 out (and a permutation test agrees).
    """
    if finding is None or not finding.established:
        return "not established"
    return "borne out" if finding.estimate * sign > 0 else "reversed"
