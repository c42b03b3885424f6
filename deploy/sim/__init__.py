"""Simulated workers: the bus, the bytes and the HTTP of a real one, and no model."""
