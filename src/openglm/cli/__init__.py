"""The command line: one file per command, each imports its room only when it runs. Nothing here imports torch."""
