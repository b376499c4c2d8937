"""How a program runs: targets as data, lowering, schedules, build, runtime, artifact."""
