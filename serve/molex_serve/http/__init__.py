"""The HTTP face: OpenAI's API, the administration of adapters, health, metrics and a page."""
