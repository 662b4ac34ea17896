"""What every experiment stands on.

`checks` refuses models whose runs would not be the plain ones. `sites` resolves which activations are meant: hook
points, positions, heads. `baseline` runs both prompts of each pair without a patch, and holds what patches take from
them. `sources` makes activations of a data set. `memory` says how much runs at once, `progress` shows how far an
experiment is and keeps what it has when it stops.
"""
