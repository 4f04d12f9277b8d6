"""What travels: messages, arrays and their bytes, the frozen log, the layouts of a sketch."""
