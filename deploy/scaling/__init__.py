"""A day of load on simulated pools that are scaled by the router's own rule: a discrete-event simulation, for ``headstart bench scaling``."""
