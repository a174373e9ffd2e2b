"""Mixtures on disk: safetensors and JSON, written whole or not at all, read strictly."""
