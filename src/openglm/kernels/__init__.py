"""Fast paths; each names its readable twin."""
