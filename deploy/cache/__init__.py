"""``headstart cache``: what a node's tiers hold, how people change it, fill it ahead of traffic and carry it elsewhere."""
