"""The choice of the engine that runs a step, and the course of a request through its steps."""
