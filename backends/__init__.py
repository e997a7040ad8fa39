"""What answers requests: SGLang over HTTP, and models of it."""
