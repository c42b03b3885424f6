"""The prefill role: workers that compute prompts and publish their KV."""
