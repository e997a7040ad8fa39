"""How a server is made something else: each way behind the same two methods."""
