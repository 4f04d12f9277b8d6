"""What a run leaves behind for people: round lines, the summary, plots and the report. Reads and writes run folders only."""
