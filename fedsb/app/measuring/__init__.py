"""What a model is worth: the server's measurements in a run, those of `fedsb eval`, and the hand-over to lm-eval."""
