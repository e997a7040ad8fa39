"""SGLang servers as Ray actors: what runs on a node, and the process that owns them all."""
