"""Every exit of a model as a model of one OpenAI-compatible server."""
