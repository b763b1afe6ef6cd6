"""Learning without labels: masked prediction and its strategies."""
