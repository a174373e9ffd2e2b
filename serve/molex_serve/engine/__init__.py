"""Engines: which requests run in a step, and what becomes of their tokens."""
