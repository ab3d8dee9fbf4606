"""Benchmarks of natgrad_array, one module a room, and what the modules share.

`backends` knows the array libraries, `problems` makes the inputs, `peers` is what a user
would write instead, `contests` sets the two against each other, `measure` has the clock.
"""
