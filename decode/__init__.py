"""The decode role: workers that pull prompts' KV and generate."""
