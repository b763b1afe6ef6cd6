"""Papers' headline claims as small experiments; one file a paper, found by its slug."""

from .base import Claim, Evidence, Lab, claim_of, claim_slugs, verdict

__all__ = ["Claim", "Evidence", "Lab", "claim_of", "claim_slugs", "verdict"]
