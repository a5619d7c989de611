"""The ten experiments of `make accept`, one room each; `registry` lists them."""
