"""``headstart plan``: how many GPUs of each role and which tiers a traffic needs, and what that costs with and without the cache."""
