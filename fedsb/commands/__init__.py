"""What the command line does: a file a command, and help pages, flags, signals and streams."""
