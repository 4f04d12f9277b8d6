"""What the command line does: a file a command, sweeps, help pages, flags and how a command ends."""
