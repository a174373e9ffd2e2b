"""Adapters as they are read from disk, known by name, and moved between disk, host and device."""
