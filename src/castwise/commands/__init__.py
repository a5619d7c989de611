"""Commands that gather evidence on a user's own model: one room for each.

A command room imports no torch; it fetches what it needs when it runs, so that
`castwise --help` answers at once. What a command needs of a target stands in `options`.
"""
