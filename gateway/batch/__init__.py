"""The Batch and Files API: what is stored, how it is checked, and the routes to it."""
