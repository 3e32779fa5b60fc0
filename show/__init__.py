"""Checkpoints at work: predictions, explanations, reports, exports."""
