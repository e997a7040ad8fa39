"""Runs a scenario in virtual time with the gateway's own core and driver, and tells what came."""
