"""The Batch API: files of requests that are run when there is room, and their answers."""
