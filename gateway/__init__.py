"""The shell around the policies: configuration, the core and its driver, the HTTP front."""
