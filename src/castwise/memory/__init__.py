"""Where the bytes go: measured by `monitor`, and never guessed."""
