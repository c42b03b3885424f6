"""What moves KV between an engine and the region: the only part of the bus that knows vLLM and torch."""
