"""Measuring mixtures: lm-evaluation-harness, composite prompts, and pictures of the routing."""
