"""The HTTP server: OpenAI's and Mistral's interfaces over an engine that is handed in."""
