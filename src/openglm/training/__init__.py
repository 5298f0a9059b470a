"""Pre-training: recipe, optimizer, step, snapshots, validation, and the run that ties them together."""
