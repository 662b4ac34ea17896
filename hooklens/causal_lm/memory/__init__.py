"""How much memory a call takes, known before it runs: what is counted, the plan, and the refusal of what cannot fit."""
