"""Memory that is reserved once and committed when adapters come: arenas, ranges in them, and the arithmetic of it."""
