"""Policies, log-probabilities and losses."""
