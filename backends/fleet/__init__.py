"""A local fleet of SGLang servers: planned from a short table, started together, ended together."""
