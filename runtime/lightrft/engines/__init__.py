"""Rollout engines: vLLM, and transformers for machines without vLLM."""
