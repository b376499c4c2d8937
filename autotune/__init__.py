"""How fast a program could run. The tuner arrives here; until then every kernel runs on its analytic default knobs."""
