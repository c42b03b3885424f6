"""The cache bus: the node's store of KV, its directory and the protocol of those who use it."""
