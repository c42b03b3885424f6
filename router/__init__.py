"""The router: the cluster's OpenAI endpoint."""
