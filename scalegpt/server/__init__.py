"""The server: one model answers several people at once, on a page and through OpenAI's API."""
