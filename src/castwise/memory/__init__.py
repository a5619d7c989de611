"""Where the bytes of a step go: foretold, measured, and made to fit."""
