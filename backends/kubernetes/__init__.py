"""The few calls of the Kubernetes API that scale servers and find them, and the lease on them."""
