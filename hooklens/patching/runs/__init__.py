"""What every experiment stands on.

- `options` reads what all experiments can be told; `checks` refuses models whose runs would not be the plain ones.
- `sites` says which activations are meant, and resolves positions, heads and sources in each prompt, once.
- `baseline` runs both prompts of each pair without a patch, and holds what patches take from them; `vocabulary`
  unembeds what the metric reads.
- `sources` makes activations of a data set.
- `memory` says how much runs at once; `tally` keeps what was measured, and gives it when the work stops.
"""
