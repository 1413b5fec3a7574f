"""An HTTP server for programs that speak Ollama's or OpenAI's API."""
