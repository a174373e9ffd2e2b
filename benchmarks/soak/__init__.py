"""Random traffic over real HTTP against a whole server, every answer checked against each adapter alone."""
