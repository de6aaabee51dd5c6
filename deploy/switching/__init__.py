"""Which engine runs a step, and how a request moves through its steps."""
